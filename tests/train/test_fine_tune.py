"""Fine-tuning: a captured network learns as eager PyTorch does, with its masks and its fake-quantization."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.train.options import Keywords
from tests.train.tasks import Mask, capture, net, nodes, parameters_equal, sgd, task


def eager_losses(model: nn.Module, masks: dict[str, Tensor], epochs: int) -> list[float]:
    """Plain PyTorch, with the masks applied before each step's forward."""
    for name, mask in masks.items():
        owner, _, leaf = name.rpartition(".")
        torch.nn.utils.parametrize.register_parametrization(
            model.get_submodule(owner), leaf, _Masked(mask)
        )
    optimizer = sgd()(list(model.parameters()))
    model.train()
    losses = []
    for epoch in range(epochs):
        torch.manual_seed(5 + 1_000_003 * epoch)
        for images, labels in task():
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def step_rows(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"]


@pytest.mark.parametrize("captured_in_training", [False, True])
def test_a_pruned_program_learns_as_eager_does_step_by_step(
    tmp_path: Path, captured_in_training: bool
) -> None:
    model = net()
    program = Mask()(capture(copy.deepcopy(model).train(captured_in_training)))
    buffers = dict(program.graph_module.named_buffers())
    masks = {name.removesuffix("_mask"): m for name, m in buffers.items() if name.endswith("_mask")}
    assert set(masks) == {"conv.weight", "second.weight", "fc.weight"}
    log = tmp_path / "log.jsonl"
    trained = go.fine_tune(program, task(), epochs=2, optimizer=sgd(), seed=5, log=log)
    want = eager_losses(model, masks, 2)
    # the same operators in the same order, on one thread: rounding alone, grown over 12 steps of momentum
    assert [row["loss"] for row in step_rows(log)] == pytest.approx(want, rel=1e-5)
    assert want[-1] < 0.7 * want[0]
    images = task()[0][0]
    torch.testing.assert_close(trained.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    mean = trained.graph_module.get_buffer("norm.running_mean")
    torch.testing.assert_close(mean, model.get_buffer("norm.running_mean"))


def test_the_input_is_untouched_and_the_result_keeps_its_mode() -> None:
    program = capture(net())
    before = program.copy()
    trained = go.fine_tune(program, task(), optimizer=sgd())
    assert parameters_equal(program, before)
    assert not parameters_equal(trained, before)
    assert trained.training is program.training is False
    assert all(p.grad is None for p in trained.graph_module.parameters())
    assert go.fine_tune(program.train(), task(2)).training


def test_masks_hold_and_masked_weights_stay_where_they_were() -> None:
    program = Mask()(capture(net()))
    trained = go.fine_tune(program, task(), epochs=2, optimizer=sgd())
    for node in nodes(trained, "mul"):
        weight, mask = (trained.tensor(source) for source in node.all_input_nodes)
        before = program.graph_module.get_parameter(str(node.all_input_nodes[0].target))
        assert torch.equal(weight[mask == 0], before[mask == 0])
        assert not torch.equal(weight[mask == 1], before[mask == 1])


def test_quantized_weights_learn_straight_through() -> None:
    program = capture(net(drop=0.0))
    quantized = go.passes.Quantize(calibration=[images for images, _ in task()])(program)
    data = task()
    before = go.evaluate(quantized, data)
    trained = go.fine_tune(quantized, data, epochs=6, optimizer=sgd(0.05))
    after = go.evaluate(trained, data)
    assert after.loss < 0.8 * before.loss
    kinds = ("fake_quantize", "fake_quantize_channel")
    counts = [sum(len(nodes(p, kind)) for kind in kinds) for p in (quantized, trained)]
    assert counts[0] == counts[1] > 3
    for name, buffer in quantized.graph_module.named_buffers():
        assert torch.equal(buffer, trained.graph_module.get_buffer(name))  # scales are no weights
    integer = go.integerize(trained)
    images = data[0][0]
    with torch.no_grad():
        assert (integer(images).argmax(1) == trained(images).argmax(1)).float().mean() > 0.9


def test_batch_norm_can_keep_its_statistics() -> None:
    program = capture(net())
    trained = go.fine_tune(program, task(), optimizer=sgd(), frozen_statistics=True)
    for name, buffer in program.graph_module.named_buffers():
        assert torch.equal(buffer, trained.graph_module.get_buffer(name))
    assert not parameters_equal(program, trained)


def test_the_history_says_what_was_done() -> None:
    trained = go.fine_tune(
        capture(net()), task(), epochs=2, optimizer=sgd(), validation=task(2, seed=3)
    )
    record = trained.history[-1]
    assert record.name == "fine-tune"
    assert record.contract == "lossy"
    assert record.rewrites == 9  # every parameter and both running statistics
    assert record.error is not None
    assert record.error > 0
    assert record.options["epochs"] == 2
    assert record.options["loss"] == "cross_entropy"
    assert record.notes[0].startswith("2 epoch(s), 12 step(s) (all epochs done): loss ")
    assert "the weights of epoch" in record.notes[1]
    json.dumps(record.to_json())


def test_a_program_is_a_plain_module_for_a_loop_of_ones_own() -> None:
    program = capture(net())
    module = program.graph_module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    first = go.evaluate(program, task()).loss
    module.train()
    for images, labels in task() * 3:
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
    module.eval()
    after = go.evaluate(program, task())
    assert after.loss < 0.7 * first
    assert after.score is not None
    assert after.samples == 96


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    go.fine_tune(capture(net()), task(2), seed=9)
    program = capture(net())
    torch.manual_seed(3)
    go.fine_tune(program, task(2), seed=9)
    assert torch.equal(torch.rand(3), want)


def test_two_runs_are_equal_and_another_seed_is_not() -> None:
    program = capture(net())
    one, again, other = (go.fine_tune(program, task(), seed=seed) for seed in (0, 0, 1))
    assert parameters_equal(one, again)
    assert not parameters_equal(one, other)  # dropout


@pytest.mark.parametrize(
    "keywords",
    [
        {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)},
        {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)},
        {
            "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
            "scheduler_every": "step",
        },
        {"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0)},
        {"clip_norm": 0.5},
    ],
    ids=["adamw", "step-lr", "one-cycle", "plateau", "clipped"],
)
def test_optimizers_and_schedulers_of_torch(
    tmp_path: Path, keywords: Keywords, request: pytest.FixtureRequest
) -> None:
    log = tmp_path / "log.jsonl"
    options: Any = {"optimizer": sgd(), **keywords}
    program = capture(net())
    go.fine_tune(program, task(), epochs=2, validation=task(1, seed=2), log=log, **options)
    rows = step_rows(log)
    rates = [row["learning_rate"] for row in rows]
    if request.node.callspec.id in ("step-lr", "one-cycle"):
        assert rates[0] != rates[-1]
    if "clip_norm" in keywords:
        assert all(isinstance(row["gradient_norm"], float) for row in rows)
    assert [row["step"] for row in rows] == list(range(12))


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    """A learning rate that jumps from good to ruinous: the weights before the jump are kept."""
    log = tmp_path / "log.jsonl"
    jump = [1.0, 1.0, 200.0, 200.0, 200.0, 200.0, 200.0]
    validation = task(2, seed=3)
    options: Any = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: jump[epoch]),
        "metric": lambda output, labels: -F.cross_entropy(output, labels),
        "validation": validation,
    }
    program = capture(net(drop=0.0))
    trained = go.fine_tune(program, task(), epochs=6, patience=2, log=log, **options)
    two = go.fine_tune(program, task(), epochs=2, **options)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["event"] for row in rows if row["event"] != "step"] == [
        "start",
        *["epoch"] * 4,
        "end",
    ]
    assert rows[-1]["reason"] == "no improvement in 2 epoch(s)"
    assert rows[-2]["best_epoch"] == 2
    assert parameters_equal(trained, two)
    assert go.evaluate(trained, validation).loss == pytest.approx(
        min(row["validation_loss"] for row in rows if row["event"] == "epoch")
    )


class _Pruner:
    """Keeps fewer weights of the second layer each epoch, and none of its state."""

    def step(self, program: go.Program, step: int) -> float:
        share = min(0.9, 0.1 * (step // 6 + 1))
        if step % 6 == 0:
            weight = program.graph_module.get_parameter("second.weight").detach().abs()
            kept = weight > weight.flatten().quantile(share)
            program.graph_module.get_buffer("second.weight_mask").copy_(kept)
        return share


def test_a_pruner_steps_inside_and_earlier_sparsities_are_never_the_best(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    program = Mask()(capture(net()))
    trained = go.fine_tune(
        program,
        task(),
        epochs=5,
        pruner=_Pruner(),
        validation=task(2, seed=3),
        metric=lambda _output, _labels: 1.0,  # no epoch is better than the first
        log=log,
    )
    mask = trained.graph_module.get_buffer("second.weight_mask")
    assert float(mask.mean()) == pytest.approx(0.5, abs=0.01)
    assert [row["pruner"] for row in step_rows(log)][::6] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert "the weights of epoch 5 are kept" in trained.history[-1].notes[1]
    assert not torch.equal(mask, program.graph_module.get_buffer("second.weight_mask"))


def test_steps_end_a_run_inside_an_epoch() -> None:
    trained = go.fine_tune(capture(net()), task(), epochs=9, steps=8)
    assert trained.history[-1].notes[0].startswith("2 epoch(s), 8 step(s) (all steps done)")


def test_programs_of_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    program = go.capture(Two().eval(), (x, y))

    def loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        return sum(
            (F.mse_loss(o, t) for o, t in zip(outputs, targets, strict=True)), start=torch.zeros(())
        )

    data = [((x, y), (torch.ones(4, 2), torch.zeros(4, 2)))]
    trained = go.fine_tune(program, data, loss=loss, epochs=20, optimizer=sgd(0.05))
    assert go.evaluate(trained, data, loss).loss < 0.3 * go.evaluate(program, data, loss).loss
    assert go.evaluate(trained, data, loss).score is None
