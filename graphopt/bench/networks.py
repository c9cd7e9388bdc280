"""The networks that benchmarks measure, with random weights where only the shapes matter for speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from graphopt.bench.bert import Bert, Shape
from graphopt.torchvision_import import torchvision_models

_TOKENS = 128

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Network:
    """A model of float weights in eval mode, and inputs for a batch size; both seeded, the same at every call."""

    title: str
    build: Callable[[], nn.Module]
    example: Callable[[int], Inputs]
    is_transformer: bool = False

    def model(self) -> nn.Module:
        """The model; raises InputError where a package that it comes from is missing."""
        torch.manual_seed(0)
        return self.build().eval()

    def inputs(self, batch: int = 1) -> Inputs:
        """Its inputs."""
        return self.example(batch)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _image(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 224, 224, generator=_generator()),)


def _tokens(batch: int) -> Inputs:
    ids = torch.randint(0, Shape().vocabulary, (batch, _TOKENS), generator=_generator())
    return ids, torch.ones_like(ids)


def _torchvision(title: str, name: str) -> Network:
    def build() -> nn.Module:
        made: nn.Module = torchvision_models().get_model(name, weights=None)
        return made

    return Network(title, build, _image)


def _efficientnet() -> nn.Module:
    from graphopt.demo import network

    return network.load()


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "resnet18": _torchvision("ResNet-18", "resnet18"),
        "resnet50": _torchvision("ResNet-50", "resnet50"),
        "mobilenet_v2": _torchvision("MobileNetV2", "mobilenet_v2"),
        "squeezenet1_1": _torchvision("SqueezeNet 1.1", "squeezenet1_1"),
        "vgg16": _torchvision("VGG-16", "vgg16"),
        "efficientnet_lite0": Network("EfficientNet-Lite0", _efficientnet, _image),
        "minilm_l6": Network("MiniLM-L6, 128 tokens", Bert, _tokens, is_transformer=True),
    }
)
