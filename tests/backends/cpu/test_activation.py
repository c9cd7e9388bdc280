"""Activations in the epilogue: every polynomial against torch in float64, over the whole range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.cpu.workload import ACTIVATIONS, Activation, Epilogue
from tests.backends.cpu.conv_harness import (
    Data,
    conv_workload,
    random_data,
    reference,
    run_kernel,
)
from tests.backends.cpu.stream_harness import ROWS, pack

FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: torch.clamp(x, -1.5, 2.5),
    "leaky_relu": lambda x: F.leaky_relu(x, -1.5),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
FLOORS = {"gelu": 1e-6}  # absolute error of its negative tail


def activated(name: str, x: np.ndarray) -> np.ndarray:
    result: torch.Tensor = FUNCTIONS[name](torch.from_numpy(x.astype(np.float64)))
    return result.numpy()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_identity_weights_over_the_range(name: str, row) -> None:
    """1e-6 relative: ten times what the polynomials lose in exact arithmetic, for their float32 Horner steps.

    The tail of silu multiplies the rounding of an exponent of up to 80: 2e-5 there, and 1e-30 absolute below. gelu's
    negative tail is a difference, to 1e-6 absolute.
    """
    epilogue = Epilogue(activation=Activation(name, low=-1.5, high=2.5))
    workload = conv_workload((3, 3), (50, 41), (1, 1), padding=(0, 0), dtype="float32", epilogue=epilogue)  # fmt: skip
    data = random_data(workload)
    tiny = np.geomspace(1e-30, 1, 50 * 41)
    x = np.stack([np.linspace(-12, 12, 50 * 41), tiny, np.linspace(-120, 120, 50 * 41)])
    x = x.reshape(1, 3, 50, 41).astype(np.float32)
    identity = Data(
        x,
        np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1),
        np.zeros(3, np.float32),
        data.multiplier,
        data.residual,
    )
    floor = FLOORS.get(name, 1e-30)
    expected = pack(workload.y, activated(name, x))
    actual = run_kernel(workload, row, identity, expected.astype(np.float32))
    np.testing.assert_allclose(actual[..., :2], expected[..., :2], rtol=2e-5, atol=floor)
    near = np.abs(pack(workload.x, x)) < 5
    np.testing.assert_allclose(actual[near], expected[near], rtol=1e-6, atol=max(floor, 1e-7))
    np.testing.assert_allclose(actual[..., 2], expected[..., 2], rtol=2e-5, atol=floor)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_after_an_integer_convolution(name: str) -> None:
    epilogue = Epilogue(activation=Activation(name, low=-1.5, high=2.5))
    workload = conv_workload((8, 21), (5, 5), epilogue=epilogue)
    data = random_data(workload)
    data = Data(data.x, data.weight, data.bias, data.multiplier / 40, data.residual)
    expected = pack(workload.y, activated(name, reference(workload, data)))
    actual = run_kernel(workload, ROWS[0], data, expected.astype(np.float32))
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=FLOORS.get(name, 2e-7))
