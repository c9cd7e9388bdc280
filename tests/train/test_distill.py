"""Distillation: the formula, the temperature, features with adapters, and a student that learns from a teacher."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import TrainError
from graphopt.train.features import Adapter, Features, find
from graphopt.train.objective import soft_loss
from tests.models import example
from tests.train.tasks import Mask, capture, net, parameters_equal, sgd, task

X, Y = task(1)[0]


def first_row(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return next(row for row in rows if row["event"] == "step")


def test_soft_loss_is_the_cross_entropy_of_softened_logits_less_the_teachers_entropy() -> None:
    student, teacher = example(5, 7).double(), example(5, 7, seed=1).double()
    for temperature in (1.0, 4.0):
        p = (teacher / temperature).softmax(1)
        cross = -(p * (student / temperature).softmax(1).log()).sum(1).mean()
        entropy = -(p * p.log()).sum(1).mean()
        want = temperature**2 * (cross - entropy)
        assert float(soft_loss(student, teacher, temperature, "")) == pytest.approx(float(want))
    assert float(soft_loss(student, student, 2.0, "")) == pytest.approx(0, abs=1e-12)


def test_the_gradient_does_not_shrink_with_the_temperature() -> None:
    """For high T it approaches that of mean((s - t)^2) / 2 on centred logits (Hinton et al. 2015, section 2.1)."""
    student, teacher = example(5, 7).double().requires_grad_(), example(5, 7, seed=1).double()
    (gradient,) = torch.autograd.grad(soft_loss(student, teacher, 1e4, ""), student)
    centred = [logits - logits.mean(1, keepdim=True) for logits in (student.detach(), teacher)]
    torch.testing.assert_close(gradient, (centred[0] - centred[1]) / 7 / 5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum(tmp_path: Path, alpha: float) -> None:
    student, teacher = capture(net(4, drop=0)), capture(net(8, drop=0, seed=1))
    log = tmp_path / "log.jsonl"
    go.distill(
        student, teacher, [(X, Y)], alpha, 3.0, features={"norm": "norm"}, feature_weight=0.1, log=log,
        frozen_statistics=True,
    )  # fmt: skip
    row = first_row(log)
    with torch.no_grad():
        hard = float(F.cross_entropy(student(X), Y))
        soft = float(soft_loss(student(X), teacher(X), 3.0, ""))
    assert row["soft"] == pytest.approx(soft, rel=1e-5)
    assert row.get("hard", 0.0) == (pytest.approx(hard, rel=1e-5) if alpha else 0.0)
    assert row["features"] > 0
    want = alpha * hard + (1 - alpha) * soft + 0.1 * row["features"]
    assert row["loss"] == pytest.approx(want, rel=1e-5)


def accuracy(program: go.Program) -> float:
    score = go.evaluate(program, task(4, seed=8)).score
    assert score is not None
    return score


def divergence(student: go.Program, teacher: go.Program) -> float:
    """Of the student's answers from the teacher's, on images that neither has seen."""
    images = torch.cat([x for x, _ in task(4, seed=8)])
    with torch.no_grad():
        return float(soft_loss(student(images), teacher(images), 1.0, ""))


def test_a_pruned_student_gets_near_its_teacher_without_labels() -> None:
    teacher = go.fine_tune(capture(net(drop=0)), task(12), epochs=6, optimizer=sgd())
    student = Mask(0.9)(teacher)
    bare = [X for X, _ in task(12, seed=4)]
    taught = go.distill(student, teacher, bare, alpha=0.0, epochs=5, optimizer=sgd(0.02))
    assert accuracy(teacher) > 0.95
    assert divergence(taught, teacher) < 0.05 * divergence(student, teacher)
    assert accuracy(taught) > 0.93
    assert taught.history[-1].name == "distill"
    assert taught.history[-1].options["alpha"] == 0.0
    assert torch.count_nonzero(taught.graph_module.get_buffer("second.weight_mask") == 0) > 0


def test_a_teacher_may_be_a_module_and_is_left_alone() -> None:
    model = net(8, seed=1)
    before = copy.deepcopy(model.state_dict())
    student = capture(net(4))
    one = go.distill(student, model, task(2), optimizer=sgd())
    other = go.distill(student, capture(model), task(2), optimizer=sgd())
    assert parameters_equal(one, other)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_features_draw_the_students_values_to_the_teachers(tmp_path: Path) -> None:
    student, teacher = capture(net(4, drop=0)), capture(net(8, drop=0, seed=1))
    log = tmp_path / "log.jsonl"
    pairs = {"norm": "norm", "conv2d_1": "second"}
    options: Any = {"features": pairs, "optimizer": sgd(0.05), "log": log}
    go.distill(student, teacher, task(), 0.0, feature_weight=10.0, epochs=8, **options)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    seen = [row["features"] for row in rows if row["event"] == "step"]
    assert seen[-1] < 0.5 * seen[0]


def test_adapters_stand_where_widths_differ_and_are_seeded() -> None:
    narrow, wide = capture(net(4)), capture(net(8))
    matched = Features(narrow, wide, [("norm", "norm"), ("fc", "fc")])
    assert [type(a).__name__ for a in matched.adapters] == ["Adapter", "Identity"]
    adapter = matched.adapters[0]
    assert isinstance(adapter, Adapter)
    y = torch.randn(2, 4, 6, 6)
    want = F.conv2d(y, adapter.linear.weight[:, :, None, None], adapter.linear.bias)
    torch.testing.assert_close(adapter(y), want)
    data = task(2)
    one, again = (go.distill(narrow, wide, data, features={"norm": "norm"}) for _ in range(2))
    assert parameters_equal(one, again)
    assert "adapters" not in str(one.graph_module.state_dict().keys())


def test_checkpoints_hold_the_adapters(tmp_path: Path) -> None:
    narrow, wide, path = capture(net(4)), capture(net(8)), tmp_path / "run.checkpoint"
    options: Any = {"features": {"norm": "norm"}, "optimizer": sgd()}
    go.distill(narrow, wide, task(), checkpoint=path, **options)
    resumed = go.distill(narrow, wide, task(), epochs=2, checkpoint=path, **options)
    assert parameters_equal(resumed, go.distill(narrow, wide, task(), epochs=2, **options))
    with pytest.raises(TrainError, match="of another run: its objective is"):
        go.distill(narrow, wide, task(), 0.9, checkpoint=path, **options)


@pytest.mark.parametrize("captured", [True, False])
def test_a_run_is_not_resumed_with_another_teacher(tmp_path: Path, captured: bool) -> None:
    path, student = tmp_path / "run.checkpoint", capture(net(4))
    modules = [net(8).eval() for _ in range(2)]
    modules[1].fc.weight.data[0, 0] += 1
    first, other = (capture(one) if captured else one for one in modules)
    go.distill(student, first, task(2), checkpoint=path)
    go.distill(student, first, task(2), epochs=2, checkpoint=path)
    with pytest.raises(TrainError, match="of another run: its objective is"):
        go.distill(student, other, task(2), epochs=3, checkpoint=path)


def test_a_name_is_a_node_or_a_modules_output() -> None:
    program = capture(net())
    assert find(program, "relu_", "student").name == "relu_"
    assert find(program, "second", "student").name == "conv2d_1"
    message = "the teacher has no node or module 'secnd' to take features from; near it: second"
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        find(program, "secnd", "teacher")


def test_features_of_another_resolution() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.conv(x).mean((2, 3)))
            return result

    message = (
        "features 'conv' of the student are [N, 4, 6, 6] and 'conv' of the teacher [N, 8, 3, 3]; choose "
        "nodes that differ in their channels only"
    )
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        go.distill(capture(net(4)), capture(Strided().eval()), task(1), features={"conv": "conv"})


STUDENT = capture(net(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, "distill: alpha must be 0 to 1, not 1.5"),
        ({"temperature": 0.0}, "distill: temperature must be positive, not 0.0"),
        (
            {"teacher": net().train()},
            "distill: the teacher is in training mode; call teacher.eval()",
        ),
        (
            {"teacher": net(), "features": {"conv": "conv"}},
            "distill: features need a teacher that is a Program; give graphopt.capture(teacher, inputs)",
        ),
        (
            {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(36, 9)).eval()},
            "distill: batch 0 of epoch 1: the student gives float32[16, 4] and the teacher float32[16, 9]; "
            "both must be logits of one shape, classes along axis 1",
        ),
        (
            {"teacher": go.capture(net(), (X[:8],))},
            "distill: batch 0 of epoch 1, for the teacher: input 'x' must have size 8 in dimension 0, not 16; "
            "capture with dynamic_batch=(low, high), or leave the last, smaller batch out",
        ),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        go.distill(STUDENT, data=[(X, Y)], **{"teacher": capture(net()), **arguments})
