"""Random networks of every way in which channels couple: any seed gives a model in evaluation mode and an input, in float64.

Grown like ``tests.random_graphs``, with more kinds of steps; ``KINDS`` names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_graphs import RandomModel, Step, _Grower

KINDS = (
    "conv", "conv", "batch_norm", "activation", "residual", "residual", "concat", "pool", "gate", "shuffle", "slice",
    "pad", "dropout", "balanced", "norm", "prelu", "shared", "parts", "pixels", "native_shuffle", "transposed",
    "non_local", "heads", "tokens", "constant", "affine", "pad_channels", "glu", "masked", "reduced", "unknown",
    "scalars", "stacked", "gram", "mixed", "squeezed",
)  # fmt: skip
_MOST = 24


class MaskedConv(nn.Module):
    """A pruned convolution: ``conv(x, W * M)``."""

    weight_mask: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.register_buffer("weight_mask", torch.ones(outputs, inputs, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.weight_mask, None, padding=1)


class Affine(nn.Module):
    """``x * s + t``, one of each a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels, 1, 1))
        self.shift = nn.Parameter(torch.empty(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Heads(nn.Module):
    """Self-attention over pixels, heads in one projection; by torch's operator or by products."""

    def __init__(self, channels: int, heads: int, fused: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(channels, 3 * heads * 3, bias=bias)
        self.out = nn.Linear(heads * 3, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (
            self.qkv(x.flatten(2).transpose(1, 2))
            .reshape(n, h * w, 3, self.heads, 3)
            .permute(2, 0, 3, 1, 4)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q * 0.5 @ k.transpose(-2, -1), -1) @ v
        y = self.out(y.transpose(1, 2).reshape(n, h * w, self.heads * 3))
        result: Tensor = y.transpose(1, 2).reshape(n, c, h, w)
        # torch 2.13's batch norm in evaluation takes a wrong slope where its input is channels last, and that of its
        # output is not
        return result.contiguous()


class NonLocal(nn.Module):
    """Attention with one head, its features made by convolutions."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, features, 1), nn.Conv2d(channels, features, 1)
        self.value, self.out = nn.Conv2d(channels, features, 1), nn.Conv2d(features, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(torch.einsum("ncp,ncq->npq", q, k), -1)
        result: Tensor = x + self.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
        return result


class Tokens(nn.Module):
    """Layers on the last axis: a mixer of channels with a norm before it."""

    def __init__(self, channels: int, hidden: int, normed: bool, gated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if normed else nn.Identity()
        self.up = nn.Linear(channels, 2 * hidden if gated else hidden)
        self.down = nn.Linear(hidden, channels)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x.permute(0, 2, 3, 1)))
        y = F.glu(y) if self.gated else F.gelu(y)
        result: Tensor = x + self.down(y).permute(0, 3, 1, 2)
        return result


class Mixed(nn.Module):
    """Layers on pixels, whose hidden axis stands beside that of a norm's channels."""

    def __init__(self, channels: int, pixels: int, normed: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(pixels, 5, bias=normed), nn.Linear(5, pixels)
        self.norm = nn.BatchNorm1d(channels) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(x.flatten(2)))
        result: Tensor = x + self.down(F.relu(y)).unflatten(2, x.shape[2:])
        return result


class Gram(nn.Module):
    """Products of channels with channels, both axes of which are channels."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Conv2d(channels, features, 1),
            nn.Conv2d(channels, features + 1, 1),
        )
        self.out = nn.Linear(features + 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        gram = self.left(x).flatten(2) @ self.right(x).flatten(2).transpose(1, 2)
        result: Tensor = x * self.out(F.relu(gram)).sum((1, 2), keepdim=True).unsqueeze(-1)
        return result


class Grower(_Grower):
    def initialize(self, module: nn.Module) -> None:
        super().initialize(module)
        done = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
        with torch.no_grad():
            for part in module.modules():
                if not isinstance(part, done):
                    for parameter in part.parameters(recurse=False):
                        draw = torch.rand(parameter.shape, generator=self.generator)
                        parameter.copy_(draw * 0.6 - 0.1)
                if isinstance(part, MaskedConv):
                    part.weight_mask.copy_(
                        torch.rand(part.weight.shape, generator=self.generator) > 0.5
                    )

    def channels(self) -> int:
        return self.shape()[1]

    def layer(self, kind: str, module: nn.Module) -> None:
        self.step(kind, [self.latest], module)

    def call(self, kind: str, function: Callable[..., Tensor]) -> None:
        self.step(kind, [self.latest], function)

    def divisors(self, number: int) -> list[int]:
        return [g for g in range(2, number) if number % g == 0]

    def to_channels(self, channels: int) -> None:
        self.layer("conv", nn.Conv2d(self.channels(), channels, 1, bias=self.flip()))

    def _balanced(self) -> None:
        """Groups of several inputs and several outputs."""
        groups = self.choose((2, 3, 4))
        if self.flip(0.4):
            groups = 2
            self.side_by_side(self.choose((2, 4)), 4)
        else:
            self.to_channels(groups * self.choose((2, 3, 4)))
        outputs = groups * self.choose((2, 3, 4))
        self.layer(
            "conv",
            nn.Conv2d(self.channels(), outputs, 3, padding=1, groups=groups, bias=self.flip()),
        )
        if self.flip():
            self._batch_norm()
        if self.flip():
            self._shuffle()

    def side_by_side(self, number: int, channels: int) -> None:
        """Several convolutions of one value, joined."""
        here, made = self.latest, []
        for _ in range(number):
            self.step("conv", [here], nn.Conv2d(self.values[here].shape[1], channels, 1))
            made.append(self.latest)
        self.step("concat", made, lambda *xs: torch.cat(xs, 1))

    def _norm(self) -> None:
        channels = self.channels()
        if self.shape()[2] * self.shape()[3] == 1:
            return
        if self.flip(0.4):
            affine, tracked = self.flip(), self.flip(0.3)
            norm = nn.InstanceNorm2d(channels, affine=affine, track_running_stats=tracked)
            self.layer("instance_norm", norm)
        else:
            groups = self.choose([*self.divisors(channels), channels])
            self.layer("group_norm", nn.GroupNorm(groups, channels, affine=self.flip(0.8)))

    def _prelu(self) -> None:
        self.layer("prelu", nn.PReLU(self.choose((1, self.channels()))))

    def _shared(self) -> None:
        """One convolution applied twice, with what stands between."""
        channels = self.channels()
        groups = self.choose([1, 1, channels])
        self.layer("conv", nn.Conv2d(channels, channels, 3, padding=1, groups=groups))
        name = self.model.steps[-1].layer
        assert name is not None
        if self.flip():
            self._activation()
        self.model.steps.append(Step("shared", (self.latest,), name))
        with torch.no_grad():
            self.values.append(self.model.layers[name](self.values[self.latest]))
        self.latest = len(self.values) - 1

    def _parts(self) -> None:
        """Channels split, parts treated differently and joined again."""
        channels = self.channels()
        if channels < 4:
            return
        here = self.latest
        sizes = [channels // 4, channels - 2 * (channels // 4), channels // 4]
        if self.flip():
            sizes = [channels // 2, channels - channels // 2]
        picks: list[int] = []
        for index in range(len(sizes)):
            self.step("part", [here], lambda x, i=index: x.split(sizes, 1)[i])
            if self.flip():
                self._activation()
            if self.flip():
                self._conv(stride_one=True)
            picks.append(self.latest)
        spatial = {self.values[p].shape[2:] for p in picks}
        if len(spatial) == 1 and sum(self.values[p].shape[1] for p in picks) <= 2 * _MOST:
            self.step("concat", picks, lambda *xs: torch.cat(xs, 1))

    def _pixels(self) -> None:
        _, channels, height, width = self.shape()
        if self.flip() and height <= 8 and width <= 8:
            self.to_channels(4 * self.choose((2, 3)))
            self.call("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2))
        elif channels <= 12:
            if height % 2 or width % 2:
                self.call("pool", lambda x: F.adaptive_max_pool2d(x, 4))
            self.call("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2))

    def _native_shuffle(self) -> None:
        groups = self.divisors(self.channels())
        if groups:
            self.layer("channel_shuffle", nn.ChannelShuffle(self.choose(groups)))

    def _transposed(self) -> None:
        _, channels, height, width = self.shape()
        if max(height, width) <= 8:
            style = self.choose((1, 1, 2))
            if style == 2:
                self.layer("conv", nn.ConvTranspose2d(channels, channels, 2, 2, groups=channels))
            else:
                self.layer(
                    "conv",
                    nn.ConvTranspose2d(channels, self.choose((3, 4, 6)), 2, 2, bias=self.flip()),
                )

    def _non_local(self) -> None:
        self.layer("non_local", NonLocal(self.channels(), self.choose((3, 4, 6))))

    def _heads(self) -> None:
        if self.shape()[2] * self.shape()[3] <= 64:
            self.layer(
                "heads", Heads(self.channels(), self.choose((2, 4)), self.flip(), self.flip())
            )

    def _tokens(self) -> None:
        self.layer("tokens", Tokens(self.channels(), self.choose((4, 6)), self.flip(), self.flip()))

    def _constant(self) -> None:
        """A function that is not zero at zero before a layer that reads it, padded or not."""
        functions = (
            torch.sigmoid,
            F.softplus,
            torch.cos,
            lambda x: x.clamp(0.25, 1.0),
            lambda x: torch.exp(-x.abs()),
        )
        self.to_channels(self.choose((4, 6)))
        self.call("constant", functions[self.choose(range(5))])
        if self.flip():
            self.call("pool", lambda x: F.adaptive_avg_pool2d(x, 1))
        kernel = self.choose((1, 1, 3))
        outputs = self.choose((3, 4, 5))
        self.layer(
            "conv",
            nn.Conv2d(self.channels(), outputs, kernel, padding=kernel // 2, bias=self.flip()),
        )

    def _affine(self) -> None:
        self.layer("affine", Affine(self.channels()))

    def _pad_channels(self) -> None:
        """The parameterless shortcut of the first residual networks."""
        if self.channels() <= 12:
            here, channels = self.latest, self.channels()
            self.layer("conv", nn.Conv2d(channels, channels + 3, 3, padding=1))
            self.step("add", [self.latest, here], lambda x, y: x + F.pad(y, (0, 0, 0, 0, 1, 2)))

    def _glu(self) -> None:
        if self.channels() % 2 == 0:
            self.call("glu", lambda x: F.glu(x, 1))

    def _masked(self) -> None:
        self.layer("masked", MaskedConv(self.channels(), self.choose((4, 6, 8))))

    def _reduced(self) -> None:
        """Statistics over pixels (channels pass) or over channels (which stay whole, or are summed)."""
        functions: Sequence[Callable[[Tensor], Tensor]] = (
            lambda x: x - x.mean((2, 3), keepdim=True),
            lambda x: x * x.sum(1, keepdim=True).tanh(),
            lambda x: x * x.mean(1, keepdim=True),
            lambda x: (
                x / (1 + x.square().mean((2, 3), keepdim=True))
            ),  # a maximum's slope hangs on ties
            lambda x: x / x.norm(dim=1, keepdim=True).clamp_min(1e-3),
        )
        self.call("reduced", functions[self.choose(range(len(functions)))])

    def _unknown(self) -> None:
        """Operators through which no channel may be removed."""
        functions: Sequence[Callable[[Tensor], Tensor]] = (
            lambda x: torch.softmax(x, 1),
            lambda x: x.cumsum(1),
            lambda x: x.sort(dim=1).values,
            lambda x: x.roll(1, 1),
            lambda x: x[:, ::2],
            lambda x: x[:, :1] + x,
        )
        self.call("unknown", functions[self.choose(range(len(functions)))])

    def _scalars(self) -> None:
        functions: Sequence[Callable[[Tensor], Tensor]] = (
            lambda x: x * F.relu6(x + 3) / 6,
            lambda x: 2 - x,
            lambda x: x.flip(1),
            lambda x: x + x.square(),
            lambda x: torch.where(x > 0, x, 0.1 * x),
            lambda x: torch.maximum(x, -x) ** 2,
        )
        self.call("scalars", functions[self.choose(range(len(functions)))])

    def _stacked(self) -> None:
        """Two branches on a new axis, reduced again."""
        here = self.latest
        self._conv(stride_one=True, out_channels=self.channels())
        if self.values[self.latest].shape == self.values[here].shape:
            self.step("stacked", [here, self.latest], lambda x, y: torch.stack([x, y], 1).amax(1))

    def _mixed(self) -> None:
        if self.shape()[2] * self.shape()[3] <= 36:
            pixels = self.shape()[2] * self.shape()[3]
            self.layer("mixed", Mixed(self.channels(), pixels, self.flip()))

    def _squeezed(self) -> None:
        """A pooled map loses axes of one index and gets them back."""
        self.call("pool", lambda x: F.adaptive_max_pool2d(x, 1))
        if self.flip():
            self.call("squeezed", lambda x: x.squeeze(3).squeeze(2).unsqueeze(-1).unsqueeze(-1))
        else:
            self.call("squeezed", lambda x: x.squeeze().reshape(x.shape))

    def _gram(self) -> None:
        self.layer("gram", Gram(self.channels(), self.choose((3, 4))))


def random_network(seed: int, kinds: Sequence[str] = KINDS) -> tuple[RandomModel, Tensor]:
    """A model in evaluation mode and one input ``[batch, channels, height, width]``, both in float64."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = [
        int(rng.integers(1, 3)),
        int(rng.choice([1, 3, 4])),
        *(int(v) for v in rng.integers(2, 9, 2)),
    ]
    x = torch.randn(shape, generator=generator)
    grower = Grower(rng, RandomModel(), [x], kinds, generator=generator)
    grower.to_channels(int(rng.choice([4, 6, 8, 12])))
    for _ in range(int(rng.integers(3, 9))):
        if grower.channels() > _MOST or grower.values[grower.latest].numel() > 4096:
            grower.to_channels(8)
            grower.call("pool", lambda x: F.adaptive_avg_pool2d(x, 4))
        grower.grow(str(rng.choice(np.asarray(kinds))))
    if grower.flip(0.7):
        grower.to_channels(6)
    grower.head()
    return grower.model.double().eval(), x.double()
