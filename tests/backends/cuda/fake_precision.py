"""Networks in float16 and tf32 on the fake driver, each against the program that was compiled; see ``fake_gpu``.

Run as a program of its own. Prints a line of JSON a network: how far the outputs are from the program's, the forms of its kernels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

import graphopt as go
from graphopt.backends.cuda import build
from graphopt.backends.integerize import integerize
from graphopt.preparation import simplified
from tests.backends.cuda.fake_gpu import Driver, check_faults
from tests.models import TransformerBlock
from tests.random_graphs import random_model


class Residual(nn.Module):
    """Strided, residual, depthwise, grouped layers, a concatenation, both pools, linear; odd channels on the way."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.point = nn.Conv2d(10, 10, 3, 1, 1, groups=10), nn.Conv2d(10, 10, 1)
        self.grouped = nn.Conv2d(10, 12, 3, 1, 1, groups=2)
        self.left, self.right = nn.Conv2d(12, 7, 1), nn.Conv2d(12, 8, 3, 1, 1)
        self.scale = nn.Conv2d(15, 15, 1)
        self.head = nn.Linear(15, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.point(nn.functional.relu6(self.depthwise(x)))).relu()
        x = nn.functional.max_pool2d(x, 3, 1, 1)
        x = nn.functional.silu(self.grouped(x))
        x = torch.cat([self.left(x), self.right(x).sigmoid()], 1)
        x = x * self.scale(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Batch norms that nothing folds, a padding, an average, a sum of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm, self.second = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(nn.functional.pad(x, (1, 1, 2, 0)))
        y = self.second(self.norm(x).relu())
        y = nn.functional.avg_pool2d(torch.cat([x, y], 1), 2)
        return (y[:, :8] + y[:, 8:]).flatten(1)


class Deep(nn.Module):
    """Few outputs of great depth, whose sums several blocks share; a residual on top."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 320, 1), nn.Conv2d(320, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        return nn.functional.max_pool2d((self.second(self.first(x)) + x).relu(), 2)


class Mixed(nn.Module):
    """For an integer network: two quantized layers around one in float, a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 9, 3, 2), nn.Conv2d(9, 9, 3, padding=1)
        self.last = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = x * self.middle(x).sigmoid()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


class Causal(nn.Module):
    """Attention to what came before, and RMS norm spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        heads = self.inner(normed).unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return x + self.outer(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block behind an embedding: attention, layer norms, GELU, softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 24)
        self.block = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(24, 6)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.words(words))).softmax(-1)  # type: ignore[no-any-return]


def _network(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    if name.isdecimal():
        model, x = random_model(int(name))
        return model, (x,)
    return _networks()[name]()


def _networks() -> dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]]:
    return {
        "three channels": lambda: (Residual(3), (torch.randn(3, 3, 7, 7),)),
        "one channel": lambda: (Residual(1), (torch.randn(1, 1, 9, 6),)),
        "block": lambda: (Block(), (torch.randint(0, 11, (2, 7)),)),
        "tokens": lambda: (TransformerBlock(), (torch.randn(2, 5, 16),)),
        "causal": lambda: (Causal(), (torch.randn(2, 5, 16),)),
        "deep": lambda: (Deep(), (torch.randn(1, 8, 4, 5),)),
        "mixed": lambda: (Mixed(), (torch.randn(2, 3, 9, 8),)),
        "dense": lambda: (Dense(), (torch.randn(2, 3, 7, 5),)),
    }


def _run(name: str, precision: str, dynamic: bool = False) -> None:
    torch.manual_seed(7)
    model, inputs = _network(name)
    batches = (1, 4) if dynamic else None
    program = go.capture(model.eval(), inputs, dynamic_batch=batches)
    if name == "mixed":
        program = go.passes.Quantize(calibration=[inputs])(program)
        program = integerize(simplified(program), ["conv2d_1"])
    artifact = go.compile(program, "sm_80", precision=precision)
    if dynamic:
        inputs = tuple(x[:1] for x in inputs)
    given = artifact.session()(*(x.numpy() for x in inputs))
    check_faults()
    with torch.no_grad():
        want = artifact.program(*inputs).numpy()
        exact = program(*inputs).numpy()
    distance = float(np.abs(given - want).max() / np.abs(want).max())
    error = float(np.abs(given - exact).max() / np.abs(exact).max())
    forms = sorted({kernel.form for kernel in artifact.manifest.kernels if kernel.form})
    found = {"network": name, "distance": distance, "error": error, "forms": forms}
    print(json.dumps(found), flush=True)


def main(names: list[str]) -> None:
    """Every ``precision:network``, with ``:dynamic`` for a range of batches. A number is a random network's seed."""
    Driver()
    # the interpreter needs no machine code, and the driver only looks how it begins
    with (
        mock.patch.object(build, "find_nvcc", return_value=Path("nvcc")),
        mock.patch.object(build, "compile_source", return_value=b"\x7fELF"),
    ):
        for name in names:
            precision, network, *rest = name.split(":")
            _run(network, precision, bool(rest))


if __name__ == "__main__":
    main(sys.argv[1:])
