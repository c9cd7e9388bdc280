"""Architectures from torchvision, timm and pytorchcv at small resolutions, with random weights (nothing is downloaded)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from graphopt.torchvision_import import torchvision_models
from tests.models import example, randomize

Built = tuple[nn.Module, tuple[Tensor, ...]]

# name -> input side, as small as the network's strides allow.
TORCHVISION = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 64,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64,
    "swin_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 32,
}
TIMM = {
    "tf_efficientnet_lite0": 32,
    "ghostnet_100": 32,
    "hrnet_w18_small": 64,
    "mixer_s32_224": 224,
    "mobilenetv4_conv_small": 32,
    "repvgg_a0": 32,
    "res2net50_26w_4s": 32,
    "convmixer_768_32": 28,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "levit_128s": 224,
    "lcnet_050": 32,
}
PYTORCHCV = {  # these end in a 7 x 7 average pool
    "preresnet10": 224,
    "shufflenet_g3_wd4": 224,
    "menet108_8x1_g3": 224,
    "sqnxt23_w1": 224,
    "resnet10": 224,
    "fdmobilenet_wd4": 224,
}


def build(library: str, name: str) -> Built:
    """An architecture in evaluation mode with seeded weights, and an input for it."""
    side = {"torchvision": TORCHVISION, "timm": TIMM, "pytorchcv": PYTORCHCV}[library][name]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = _MAKERS[library](name, side)
    return randomize(model), (example(1, 3, side, side),)


def _torchvision(name: str, side: int) -> nn.Module:
    options: dict[str, object] = {"weights": None}
    if name == "vit_b_32":
        options["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    model: nn.Module = torchvision_models().get_model(name, **options)
    return model


def _timm(name: str, side: int) -> nn.Module:
    torchvision_models()  # timm imports torchvision
    model: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
    return model


def _pytorchcv(name: str, side: int) -> nn.Module:
    torchvision_models()  # pytorchcv imports torchvision
    provider = importlib.import_module("pytorchcv.model_provider")
    model: nn.Module = provider.get_model(name, pretrained=False)
    return model


_MAKERS: dict[str, Callable[[str, int], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
}


def names() -> Iterator[tuple[str, str]]:
    """Every ``(library, name)``."""
    for library, table in (("torchvision", TORCHVISION), ("timm", TIMM), ("pytorchcv", PYTORCHCV)):
        yield from ((library, name) for name in table)
