"""Random small convolutional networks: any seed gives a valid model in evaluation mode and an input for it.

``random_model(seed)`` draws a graph of 2 to 12 layers over feature maps of 1 to 17 pixels a side, batches of 1 to 3 and
odd channel counts, then a head. Weights are scaled so that activations stay near 1. The same seed gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHANNELS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
_MOST_CHANNELS = 48
_POINTWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
}


@dataclass
class Step:
    """``values[target] = kind(values[sources...])``: ``layer`` where the kind has weights, else ``call``."""

    kind: str
    sources: tuple[int, ...]
    layer: str | None = None
    call: Callable[..., Tensor] | None = None


class RandomModel(nn.Module):
    """Runs its steps in order; the last value is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[Step] = []

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            inputs = [values[source] for source in step.sources]
            function = self.layers[step.layer] if step.layer is not None else step.call
            assert function is not None
            values.append(function(*inputs))
        return values[-1]

    def describe(self) -> list[str]:
        """One line a step, for failure messages."""
        lines = []
        for index, step in enumerate(self.steps, start=1):
            detail = str(self.layers[step.layer]) if step.layer is not None else step.kind
            lines.append(f"v{index} = {detail} of {', '.join(f'v{s}' for s in step.sources)}")
        return lines


@dataclass
class _Grower:
    """Grows a model step by step, running each step at once so that every shape is known and valid."""

    rng: np.random.Generator
    model: RandomModel
    values: list[Tensor]
    kinds: Sequence[str]
    latest: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def choose(self, options: Sequence[int]) -> int:
        return int(self.rng.choice(np.asarray(options)))

    def flip(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def step(
        self, kind: str, sources: Sequence[int], function: nn.Module | Callable[..., Tensor]
    ) -> None:
        layer = None
        if isinstance(function, nn.Module):
            layer = f"{kind}{len(self.model.steps)}"
            self.initialize(function)
            self.model.layers[layer] = function.eval()
        call = None if layer is not None else function
        self.model.steps.append(Step(kind, tuple(sources), layer, call))
        with torch.no_grad():
            self.values.append(function(*(self.values[s] for s in sources)))
        self.latest = len(self.values) - 1

    def initialize(self, module: nn.Module) -> None:
        def normal(like: Tensor, deviation: float) -> Tensor:
            return torch.randn(like.shape, generator=self.generator) * deviation

        def uniform(like: Tensor, low: float, high: float) -> Tensor:
            return torch.rand(like.shape, generator=self.generator) * (high - low) + low

        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                    fan_in = max(1, part.weight[0].numel())
                    part.weight.copy_(normal(part.weight, fan_in**-0.5))
                    if part.bias is not None:
                        part.bias.copy_(normal(part.bias, 0.2))
                elif isinstance(part, nn.BatchNorm2d):
                    assert part.running_mean is not None
                    assert part.running_var is not None
                    part.running_mean.copy_(normal(part.running_mean, 0.3))
                    part.running_var.copy_(uniform(part.running_var, 0.4, 1.6))
                    if part.affine:
                        part.weight.copy_(uniform(part.weight, -1.2, 1.5))
                        part.bias.copy_(normal(part.bias, 0.2))

    def shape(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.values[self.latest].shape
        return batch, channels, height, width

    def grow(self, kind: str) -> None:
        """Append one step of that kind to the latest value; nothing where it would not fit."""
        getattr(self, f"_{kind}")()

    def _conv(self, stride_one: bool = False, out_channels: int | None = None) -> None:
        _, channels, height, width = self.shape()
        out = out_channels or self.choose(_CHANNELS)
        style = self.choose(range(4))
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        if style == 0 and out_channels is None:  # depthwise, sometimes with a multiplier
            groups, out = channels, channels * self.choose((1, 1, 2))
            if out > _MOST_CHANNELS:
                out = channels
        elif style == 1:  # grouped
            groups = self.choose([g for g in divisors if out % g == 0])
        else:
            groups = 1
        dilation = self.choose((1, 1, 1, 2))
        size, padding = [], []
        for extent in (height, width):
            kernel = self.choose((1, 2, 3, 3, 5) if not stride_one else (1, 3))
            reach = (kernel - 1) * dilation
            if stride_one:
                pad = reach // 2
            else:
                pad = self.choose(range(min(kernel - 1, 2) + 1)) * dilation
            if extent + 2 * pad < reach + 1:
                kernel, pad = 1, 0
            size.append(kernel)
            padding.append(pad)
        stride = (1, 1) if stride_one else (self.choose((1, 1, 2, 3)), self.choose((1, 1, 2)))
        conv = nn.Conv2d(
            channels,
            out,
            (size[0], size[1]),
            stride,
            (padding[0], padding[1]),
            dilation,
            groups,
            bias=self.flip(),
        )
        self.step("conv", [self.latest], conv)

    def _batch_norm(self) -> None:
        norm = nn.BatchNorm2d(
            self.shape()[1], eps=10.0 ** -self.choose((3, 5)), affine=self.flip(0.8)
        )
        self.step("batch_norm", [self.latest], norm)

    def _activation(self) -> None:
        name = list(_POINTWISE)[self.choose([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])]
        self.step(name, [self.latest], _POINTWISE[name])

    def _residual(self) -> None:
        """``f(x) + x``, or an add of two values of one shape."""
        here = self.latest
        partners = [
            i
            for i, value in enumerate(self.values[:-1])
            if value.shape == self.values[here].shape and i != here
        ]
        if partners and self.flip():
            self.step("add", [here, self.choose(partners)], torch.add)
            return
        self._conv(stride_one=True, out_channels=self.shape()[1])
        if self.values[self.latest].shape == self.values[here].shape:
            self.step("add", [self.latest, here], torch.add)

    def _concat(self) -> None:
        """Two or three branches with one spatial size side by side."""
        here = self.latest
        size = self.values[here].shape[2:]
        partners = [
            i
            for i, v in enumerate(self.values)
            if v.dim() == 4 and v.shape[2:] == size and v.shape[1] <= _MOST_CHANNELS // 3
        ]
        branches = [here]
        if self.flip() and partners:
            branches.append(self.choose(partners))
        else:
            self._conv(stride_one=True)
            if self.values[self.latest].shape[2:] != size:
                return
            branches.append(self.latest)
        if partners and self.flip(0.3):
            branches.append(self.choose(partners))
        if sum(self.values[b].shape[1] for b in branches) > _MOST_CHANNELS:
            return
        self.step("concat", branches, lambda *xs: torch.cat(xs, 1))

    def _pool(self) -> None:
        _, _, height, width = self.shape()
        kernel = [min(self.choose((1, 2, 3)), extent) for extent in (height, width)]
        padding = [self.choose(range(k // 2 + 1)) for k in kernel]
        stride = [self.choose((1, 2)), self.choose((1, 2))]
        ceil_mode = self.flip(0.3)
        if self.flip():
            self.step(
                "max_pool",
                [self.latest],
                lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode),
            )
            return
        counted = self.flip()
        self.step(
            "avg_pool",
            [self.latest],
            lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil_mode, counted),
        )

    def _gate(self) -> None:
        """Squeeze and excite: channels scaled by a gate of their means."""
        here, channels = self.latest, self.shape()[1]
        self.step("global_pool", [here], lambda x: F.adaptive_avg_pool2d(x, 1))
        self.step("conv", [self.latest], nn.Conv2d(channels, channels, 1))
        self.step("sigmoid", [self.latest], torch.sigmoid)
        self.step("mul", [here, self.latest], torch.mul)

    def _shuffle(self) -> None:
        _, channels, height, width = self.shape()
        groups = self.choose([g for g in range(1, channels + 1) if channels % g == 0])

        def shuffle(x: Tensor) -> Tensor:
            y = x.reshape(x.shape[0], groups, channels // groups, height, width)
            return y.transpose(1, 2).reshape(x.shape[0], channels, height, width)

        self.step("shuffle", [self.latest], shuffle)

    def _slice(self) -> None:
        """Half of the channels, or the rows and columns from 1 on."""
        _, channels, height, width = self.shape()
        if channels >= 2 and self.flip():
            first = self.choose((0, 1))
            self.step("chunk", [self.latest], lambda x: x.chunk(2, 1)[first])
        elif height >= 2 and width >= 2:
            self.step("slice", [self.latest], lambda x: x[:, :, 1:, : width - 1])

    def _pad(self) -> None:
        _, _, height, width = self.shape()
        if max(height, width) <= 15:
            amounts = [self.choose((0, 1, 2)) for _ in range(4)]
            self.step("pad", [self.latest], lambda x: F.pad(x, amounts))

    def _dropout(self) -> None:
        self.step("dropout", [self.latest], nn.Dropout(0.3))

    def head(self) -> None:
        """Nothing, a global pool, or a pool and one or two linear layers."""
        style = self.choose(range(4))
        if style == 0:
            return
        if style == 1:
            self.step("global_pool", [self.latest], lambda x: F.adaptive_avg_pool2d(x, 1))
            return
        _, channels, height, width = self.shape()
        features = channels
        if style == 2:
            self.step("mean", [self.latest], lambda x: x.mean((2, 3)))
        else:
            features = channels * height * width
            self.step("flatten", [self.latest], lambda x: torch.flatten(x, 1))
        if self.flip():
            self.step("linear", [self.latest], nn.Linear(features, 9, bias=self.flip()))
            self.step("relu", [self.latest], F.relu)
            features = 9
        self.step("linear", [self.latest], nn.Linear(features, self.choose((1, 5, 10))))


KINDS = (
    "conv", "conv", "conv", "conv", "batch_norm", "batch_norm", "activation", "activation", "activation",
    "residual", "residual", "concat", "pool", "gate", "shuffle", "slice", "pad", "dropout",
)  # fmt: skip


def random_model(seed: int, kinds: Sequence[str] = KINDS) -> tuple[RandomModel, Tensor]:
    """A model in evaluation mode and one input ``[batch, channels, height, width]`` for it.

    ``kinds`` weighs the layers drawn; the first is always a convolution.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = [int(v) for v in (rng.integers(1, 4), rng.choice([1, 3, 3, 4, 5, 7, 8]))]
    shape += [int(v) for v in rng.integers(1, 18, 2)]
    x = torch.randn(shape, generator=generator)
    grower = _Grower(rng, RandomModel(), [x], kinds, generator=generator)
    grower.grow("conv")
    for _ in range(int(rng.integers(2, 13))):
        grower.grow(str(rng.choice(np.asarray(kinds))))
    grower.head()
    return grower.model.eval(), x
