"""Batches taken apart: the bits of one image, whatever the batch; graphs that mix images stay whole and say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.artifact import Artifact
from graphopt.backends.lower import images
from graphopt.backends.x86.isa import ISAS
from graphopt.bench.bert import Bert, Shape
from graphopt.errors import Decline
from graphopt.program import Program
from graphopt.torchvision_import import torchvision_models
from graphopt.weights_file import aligned_empty
from tests.models import example, randomize

Forward = Callable[..., Any]
ISA = ISAS["avx512-vnni"]


class _Model(nn.Module):
    """A forward function with a convolution, a norm and a linear layer at hand."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = forward
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(6, 5)
        self.table = nn.Embedding(11, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.own = nn.Parameter(torch.randn(3, 6))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _program(forward: Forward, *inputs: Tensor, dynamic: tuple[int, int] | None = None) -> Program:
    return go.capture(_Model(forward).eval(), inputs, dynamic_batch=dynamic)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network that allows it is run image by image: small ones would not be worth it."""
    monkeypatch.setattr(images, "_cycles", lambda *_: (1.0, 0.0))


def _rows(size: int = 3) -> Tensor:
    return example(size, 7, 6)


def _heads(model: Any, x: Tensor) -> Tensor:
    """Attention whose heads are folded into the batch."""
    n, t, _ = x.shape
    q = x.reshape(n, t, 2, 3).transpose(1, 2).reshape(n * 2, t, 3)
    scores = torch.bmm(q, q.transpose(1, 2)).softmax(-1)
    y = torch.bmm(scores, q).reshape(n, 2, t, 3).transpose(1, 2).reshape(n, t, 6)
    return model.linear(y)  # type: ignore[no-any-return]


def _classes(model: Any, x: Tensor) -> Tensor:
    """A token for every image before the others, as in ViT."""
    token = model.token.expand(x.shape[0], -1, -1)
    y = model.linear(torch.cat([token, x], dim=1))
    return y[:, 0]  # type: ignore[no-any-return]


def _windows(model: Any, x: Tensor) -> Tensor:
    """Windows folded into the batch, as in Swin."""
    n = x.shape[0]
    y = x.view(n, 4, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(n * 6, 4, 4)
    y = (y @ y.transpose(1, 2)).softmax(-1)
    return torch.roll(y.view(n, 6, 16), 1, 1)


def _shuffled(model: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _sequence_first(model: Any, x: Tensor) -> Tensor:
    return torch.relu(model.linear(x.transpose(0, 1))).transpose(0, 1)


ALONE: dict[str, tuple[Forward, Tensor]] = {
    "layers": (lambda m, x: m.norm(m.conv(x)).relu().mean((2, 3)), example(3, 4, 6, 6)),
    "flattened": (lambda m, x: F.max_pool2d(m.conv(x), 2).flatten(1), example(3, 4, 6, 6)),
    "own sizes": (lambda m, x: x.view(x.size(0), -1), example(3, 4, 6, 6)),
    "heads in the batch": (_heads, _rows()),
    "a token an image": (_classes, _rows()),
    "windows in the batch": (_windows, example(3, 4, 4, 6)),
    "shuffled channels": (_shuffled, example(3, 4, 4, 6)),
    "sequence first": (_sequence_first, _rows()),
    "made for the batch": (
        lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 1, 6)], 1),
        _rows(),
    ),
    "squeezed": (lambda m, x: m.linear(x.mean(1, keepdim=True)).squeeze(1), _rows()),
    "a constant for all": (lambda m, x: x[:, :3] * m.own, _rows()),
    "split": (lambda m, x: torch.stack([y.amax(1) for y in x.split(3, 2)], 1), _rows()),
    "taken": (lambda m, x: x[:, torch.tensor([2, 0])] + x[:, 1:2], _rows()),
    "sorted": (lambda m, x: x.topk(2, 1)[0].cumsum(2), _rows()),
}  # fmt: skip

MIXED: dict[str, tuple[Forward, Tensor, str]] = {
    "mean": (lambda m, x: x - x.mean(0), _rows(), "it computes along the batch"),
    "all": (lambda m, x: x / x.sum(), _rows(), "it computes along the batch"),
    "softmax": (lambda m, x: x.softmax(0), _rows(), "it computes along the batch"),
    "gram": (lambda m, x: x[:, 0] @ x[:, 1].t(), _rows(), "it multiplies images by images"),
    "summed": (lambda m, x: x[:, 0].t() @ x[:, 1], _rows(), "it sums over the batch"),
    "flip": (lambda m, x: x.flip(0), _rows(), "it moves elements from image to image"),
    "folded": (
        lambda m, x: x.transpose(0, 1).reshape(21, 6),
        _rows(),
        "it folds the batch into other axes",
    ),
    "some": (lambda m, x: x[1:], _rows(), "it takes some of the images"),
    "joined": (lambda m, x: torch.cat([x, x]), _rows(), "it joins along the batch"),
    "own constants": (
        lambda m, x: x[:, 0] + m.own,
        _rows(),
        "it gives every image a constant of its own",
    ),
    "channels": (lambda m, x: m.conv(x), example(4, 6, 6), "it takes the batch for channels"),
    "weights": (
        lambda m, x: F.linear(m.own, x[:, 0]),
        _rows(),
        "the weights of a layer depend on the images",
    ),
    "unknown": (
        lambda m, x: torch.linalg.inv_ex(x[:, :6])[0],
        _rows(),
        "nothing is known of what it does to a batch",
    ),
}


@pytest.mark.parametrize("dynamic", [None, (1, 8)], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", ALONE)
def test_a_batch_of_one_computes_what_the_batch_does(
    name: str, dynamic: tuple[int, int] | None
) -> None:
    forward, x = ALONE[name]
    program = _program(forward, x, dynamic=dynamic)
    one = images.one_image(program)
    with torch.no_grad():
        parts = [one(x[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(torch.cat(parts), program(x), rtol=1e-5, atol=1e-6)
    assert one.dynamic_batch is None
    assert [node.name for node in one.inputs] == [node.name for node in program.inputs]


@pytest.mark.parametrize("name", MIXED)
def test_images_that_are_mixed_stay_together_and_the_reason_is_given(name: str) -> None:
    forward, x, reason = MIXED[name]
    with pytest.raises(Decline) as caught:
        images.one_image(_program(forward, x))
    assert str(caught.value).endswith(f"may mix images: {reason}")


def test_a_number_of_images_that_is_computed_with_keeps_them_together() -> None:
    program = _program(lambda m, x: x * x.shape[0], _rows(), dynamic=(1, 8))
    assert images.choose(program, ISA, threads=1).reason == (
        "together: node 'mul' (aten.mul.Tensor) may mix images: it computes with the number of images"
    )


def test_an_output_or_input_without_the_batch_keeps_the_images_together() -> None:
    def scalar(model: Any, x: Tensor) -> Any:
        return model.linear(x), model.own.sum()

    assert images.choose(_program(scalar, _rows()), ISA, threads=1).reason == (
        "together: output 'sum_1' does not begin with the batch"
    )
    added = _program(lambda m, x, y: x + y, _rows(), example(7, 6))
    assert (
        images.choose(added, ISA, threads=1).reason
        == "together: input 'inputs_1' does not begin with the batch"
    )
    assert images.choose(_program(lambda m, x: x + 1, _rows(1)), ISA, threads=1).reason == (
        "together: the batch is of one image"
    )


def test_a_layer_in_training_keeps_the_images_together() -> None:
    model = _Model(lambda m, x: F.dropout(m.linear(x), 0.5, training=True))
    choice = images.choose(go.capture(model, (_rows(),)), ISA, threads=1)
    assert not choice.alone
    assert "it is random or has an effect" in choice.reason


def _artifact(program: Program, threads: int = 1) -> Artifact:
    artifact: Artifact = go.compile(program, threads=threads)
    return artifact


def _equal(left: Any, right: Any) -> bool:
    return bool(left.dtype == right.dtype and np.array_equal(left, right))


def _two_inputs(model: Any, x: Tensor, ids: Tensor) -> Any:
    y = model.linear(model.table(ids) + x.mean(1, keepdim=True))
    return {"y": y.relu(), "parts": (y[:, 0], ids, y.argmax(2))}


def _batch(size: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 11, (size, 7), generator=torch.Generator().manual_seed(size))
    return example(size, 7, 6), ids


@pytest.mark.usefixtures("alone")
def test_a_range_of_batches_with_the_bits_of_one_image_through_nested_outputs() -> None:
    ranged = _artifact(_program(_two_inputs, *_batch(2), dynamic=(1, 8)))
    assert ranged.manifest.image_by_image
    single = _artifact(_program(_two_inputs, *_batch(1))).session()
    session = ranged.session()
    for size in (1, 3, 8):
        x, ids = (tensor.numpy() for tensor in _batch(size))
        result = session(x, ids)
        assert result["y"].shape == (size, 7, 5)
        for i in range(size):
            one = single(x[i : i + 1], ids[i : i + 1])
            assert _equal(result["y"][i : i + 1], one["y"])
            for part, want in zip(result["parts"], one["parts"], strict=True):
                assert _equal(part[i : i + 1], want)
        with torch.no_grad():
            wanted = ranged.program(torch.from_numpy(x), torch.from_numpy(ids))["y"]
        np.testing.assert_allclose(result["y"], wanted, rtol=1e-5, atol=1e-6)
    result["parts"][1][...] = 0  # an input that is an output is a copy of it
    assert ids.any()


def _misplaced(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    memory = aligned_empty((x.nbytes + 4,), np.dtype(np.uint8))
    place: np.ndarray[Any, Any] = memory[4:].view(x.dtype).reshape(x.shape)
    place[...] = x
    return place


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "place",
    [_misplaced, np.asfortranarray, lambda x: x[:, ::-1].copy()[:, ::-1]],
    ids=["unaligned", "fortran", "reversed"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fixed_batch_wherever_the_inputs_lie(place: Callable[..., Any], threads: int) -> None:
    x = example(3, 4, 5, 7)
    program = _program(lambda m, x: m.norm(m.conv(x)).relu().flatten(1), x)
    quantized = go.passes.Quantize(calibration=[(x,)])(program)
    artifact = _artifact(quantized, threads)
    assert artifact.manifest.image_by_image
    with torch.no_grad():
        wanted = artifact.program(x).numpy()
    assert _equal(artifact.session()(place(x.numpy())), wanted)


@pytest.mark.usefixtures("alone")
def test_rows_of_an_image_and_layers_left_to_relax() -> None:
    """Windows are outputs that have several rows an image; a batch of one leaves no dimension out."""

    def forward(model: Any, x: Tensor) -> Any:
        rows = torch.erf(x).reshape(-1, 6)
        return rows, model.linear(x).squeeze()

    x = _rows()
    artifact = _artifact(_program(forward, x))
    assert artifact.manifest.image_by_image
    rows, y = artifact.session()(x.numpy())
    assert rows.shape == (21, 6)
    assert y.shape == (3, 7, 5)
    with torch.no_grad():
        for ours, wanted in zip((rows, y), artifact.program(x), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def _mobilenet() -> Program:
    model = randomize(torchvision_models().get_model("mobilenet_v2", weights=None))
    return go.capture(model, (example(4, 3, 160, 160),))


def test_a_network_whose_tensors_leave_the_cache_is_run_image_by_image() -> None:
    choice = images.choose(_mobilenet(), ISA, threads=1)
    assert choice.alone
    assert choice.reason.startswith("one by one: waiting is estimated at ")
    assert choice.program.stats().macs == _mobilenet().stats().macs // 4


def test_weights_that_layers_wait_for_are_read_once_a_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12_000, 2000), nn.ReLU(), nn.Linear(2000, 10))
    assert not images.choose(go.capture(model, (example(8, 3, 40, 100),)), ISA, threads=1).alone


def test_tensors_that_fit_the_cache_stay_together() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    assert not images.choose(go.capture(model, (example(8, 3, 8, 8),)), ISA, threads=1).alone


def test_transformers_are_taken_apart() -> None:
    shape = Shape(layers=1, hidden=24, heads=4, intermediate=48, vocabulary=50, positions=16)
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.ones_like(ids))
    for bounds in (None, (1, 4)):
        program = go.capture(Bert(shape).eval(), inputs, dynamic_batch=bounds)
        one = images.one_image(program)
        with torch.no_grad():
            parts = [one(*(tensor[i : i + 1] for tensor in inputs)) for i in range(3)]
            torch.testing.assert_close(torch.cat(parts), program(*inputs), rtol=1e-5, atol=1e-6)
