"""torchvision beside a CPU build of torch.

torchvision's wheel brings an extension that wants CUDA; without it, importing torchvision fails with "operator
torchvision::nms does not exist". Declaring the operators it asks for lets its models be built; detection models, which
call them, still fail.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_ASKED_FOR = ("nms", "qnms")
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


@functools.cache
def torchvision_models() -> ModuleType:
    """``torchvision.models``, imported so that a CPU build of torch will do."""
    for name in _ASKED_FOR:
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")
