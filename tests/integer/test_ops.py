"""Every ``graphopt::`` operator goes through torch.export, with an open batch, and keeps its result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

from graphopt.integer import ops

graphopt = torch.ops.graphopt
WEIGHT = torch.arange(-13, 14, dtype=torch.int8).reshape(3, 3, 3, 1).repeat(1, 1, 1, 3)
BIAS = torch.tensor([3, -70, 100], dtype=torch.int32)
MULTIPLIER = torch.tensor([0.01, 0.02, 0.005])
SQUARE = WEIGHT[:, :, 0, 0].contiguous()
CONV = (WEIGHT, BIAS, MULTIPLIER, [1, 1], [1, 1, 1, 1], [1, 1], 1, 128)
Q = tuple[torch.Tensor]

CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda q: graphopt.add(q, q, 2**20, 2**19, 20, 128, 128, 100, 0, 255),
    "avg_pool2d": lambda q: graphopt.avg_pool2d(
        q, [2, 2], [2, 2], [0, 0], True, True, 0, 1.5, 128, 100, 0, 255
    ),
    "conv2d": lambda q: graphopt.conv2d(q, *CONV, 100, 0, 255),
    "conv2d_dequantize": lambda q: graphopt.conv2d_dequantize(q, *CONV),
    "dequantize": lambda q: graphopt.dequantize(q, 0.1, 128),
    "global_avg_pool": lambda q: graphopt.global_avg_pool(q, 1.5, 128, 100, 0, 255, True),
    "global_avg_pool_dequantize": lambda q: graphopt.global_avg_pool_dequantize(q, 1.5, 128, False),
    "linear": lambda q: graphopt.linear(
        q.permute(0, 2, 3, 1), SQUARE, BIAS, MULTIPLIER, 128, 100, 0, 255
    ),
    "linear_dequantize": lambda q: graphopt.linear_dequantize(
        q.permute(0, 2, 3, 1), SQUARE, BIAS, MULTIPLIER, 128
    ),
    "max_pool2d": lambda q: graphopt.max_pool2d(q, [3, 3], [2, 2], [1, 1], [1, 1], False),
    "quantize": lambda q: graphopt.quantize(q.to(torch.float32), 1.5, 20, 0, 255),
    "requantize": lambda q: graphopt.requantize(q, 0.5, 128, 100, 100, 255),
}


def test_every_operator_is_listed_here() -> None:
    assert sorted(CALLS) == sorted(ops.__all__)


@pytest.mark.parametrize("name", ops.__all__)
def test_exports_with_an_open_batch(name: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return CALLS[name](q)

    model = Model()
    q = torch.randint(0, 256, (3, 3, 6, 5), generator=torch.Generator().manual_seed(4))
    q = q.to(torch.uint8)
    shapes = ({0: Dim("batch", min=1, max=16)},)
    exported = torch.export.export(model, (q,), dynamic_shapes=shapes)
    targets = {node.target for node in exported.graph.nodes}
    assert getattr(graphopt, name).default in targets
    run = exported.module()
    for batch in (1, 3):
        result, expected = run(q[:batch]), model(q[:batch])
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ops.__all__)
def test_torchs_own_checks_of_schema_and_shape_function(name: str) -> None:
    q = torch.randint(0, 256, (2, 3, 6, 5), generator=torch.Generator().manual_seed(5))
    calls: list[tuple[object, tuple[object, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "graphopt":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        CALLS[name](q.to(torch.uint8))
    ((overload, arguments),) = calls
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload, arguments, test_utils=tests)  # type: ignore[arg-type]
