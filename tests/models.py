"""Small networks of the usual building blocks: evaluation mode, seeded weights, batch norms with real statistics.

``MODELS`` maps a name to a builder of ``(model, example_inputs)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Tensor, ...]]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluation mode, with batch norm scales, shifts and statistics as a trained network has them (seeded)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
            if module.affine:
                module.weight.data.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.data.copy_(uniform(module.bias, -0.3, 0.3))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.detach().any():
            parameter.data.copy_(
                uniform(parameter, -0.1, 0.1)
            )  # a head that starts at zero tells nothing
    return model.eval()


def example(*shape: int, seed: int = 0) -> Tensor:
    """A seeded normal tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv_bn(in_channels: int, out_channels: int, kernel: int = 3, **options: int) -> nn.Sequential:
    """A padded convolution without bias and its batch norm."""
    options.setdefault("padding", kernel // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResNetBlock(nn.Module):
    """Two 3 x 3 convolutions and a residual add; a strided one projects its shortcut."""

    def __init__(self, in_channels: int = 8, channels: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.downsample = (
            nn.Identity() if same else conv_bn(in_channels, channels, 1, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return result


class MobileNetBlock(nn.Module):
    """Inverted residual: expand 1 x 1, depthwise 3 x 3, project 1 x 1 (linear), ReLU6."""

    def __init__(self, channels: int = 8, expansion: int = 3, stride: int = 1) -> None:
        super().__init__()
        hidden = channels * expansion
        self.stride = stride
        self.conv = nn.Sequential(
            *conv_bn(channels, hidden, 1),
            nn.ReLU6(inplace=True),
            *conv_bn(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.ReLU6(inplace=True),
            *conv_bn(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.stride == 1 else y


class Fire(nn.Module):
    """SqueezeNet: squeeze 1 x 1, expand 1 x 1 and 3 x 3 side by side, concatenated."""

    def __init__(self, channels: int = 8, squeeze: int = 4, expand: int = 6) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: split the channels, transform one half, concatenate, shuffle."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *conv_bn(half, half, 1),
            nn.ReLU(inplace=True),
            *conv_bn(half, half, 3, groups=half),
            *conv_bn(half, half, 1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, self.branch(right)], 1)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return y.reshape(batch, channels, height, width)


class DenseLayer(nn.Module):
    """DenseNet: batch norm and ReLU *before* each convolution, the input concatenated to the result."""

    def __init__(self, channels: int = 8, growth: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class SqueezeExcite(nn.Module):
    """A hard-swish convolution whose channels are scaled by a gate computed from their means (MobileNetV3)."""

    def __init__(self, channels: int = 8, squeeze: int = 4) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels)
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.expand = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(gate))))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a GELU feed-forward network, each with a residual add."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


class Classifier(nn.Module):
    """A stem, the given body, global pooling, dropout and a linear layer: logits of ``classes``."""

    def __init__(self, body: nn.Module, channels: int, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, width, 3, stride=2), nn.ReLU(inplace=True))
        self.body = body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.body(self.stem(x)))
        result: Tensor = self.fc(self.dropout(torch.flatten(y, 1)))
        return result


def _build(make: Callable[[], nn.Module], *shape: int, seed: int = 0) -> Built:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = make()
    return randomize(model, seed), (example(*shape, seed=seed),)


def resnet() -> Built:
    """A residual network of two blocks, the second strided with a projection: (2, 3, 16, 16) -> (2, 10)."""
    return _build(
        lambda: Classifier(nn.Sequential(ResNetBlock(8, 8), ResNetBlock(8, 16, 2)), 16),
        2,
        3,
        16,
        16,
    )


def mobilenet() -> Built:
    """Two inverted residual blocks, the second strided: (2, 3, 16, 16) -> (2, 10)."""
    return _build(
        lambda: Classifier(nn.Sequential(MobileNetBlock(8), MobileNetBlock(8, stride=2)), 8),
        2,
        3,
        16,
        16,
    )


def squeezenet() -> Built:
    """A fire module and a max pool: (2, 3, 16, 16) -> (2, 10)."""
    return _build(
        lambda: Classifier(nn.Sequential(Fire(8), nn.MaxPool2d(3, 2, ceil_mode=True)), 12),
        2,
        3,
        16,
        16,
    )


def shufflenet() -> Built:
    """Two shuffle units: (2, 3, 16, 16) -> (2, 10)."""
    return _build(
        lambda: Classifier(nn.Sequential(ShuffleUnit(8), ShuffleUnit(8)), 8), 2, 3, 16, 16
    )


def densenet() -> Built:
    """Two dense layers and an average pool: (2, 3, 16, 16) -> (2, 10)."""
    return _build(
        lambda: Classifier(nn.Sequential(DenseLayer(8), DenseLayer(12), nn.AvgPool2d(2)), 16),
        2,
        3,
        16,
        16,
    )


def squeeze_excite() -> Built:
    """A squeeze-and-excite block with hard-swish: (2, 3, 16, 16) -> (2, 10)."""
    return _build(lambda: Classifier(SqueezeExcite(8), 8), 2, 3, 16, 16)


def transformer() -> Built:
    """Two transformer blocks: (2, 5, 16) -> (2, 5, 16)."""
    return _build(lambda: nn.Sequential(TransformerBlock(), TransformerBlock()), 2, 5, 16)


def mlp() -> Built:
    """Linear, batch norm, ReLU, linear: (4, 12) -> (4, 10)."""
    return _build(
        lambda: nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 10)
        ),
        4,
        12,
    )


MODELS: dict[str, Callable[[], Built]] = {
    build.__name__: build
    for build in (
        resnet, mobilenet, squeezenet, shufflenet, densenet, squeeze_excite, transformer, mlp,
    )
}  # fmt: skip
