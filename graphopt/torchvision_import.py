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
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


@functools.cache
def torchvision_models() -> ModuleType:
    """``torchvision.models``, imported so that a CPU build of torch will do."""
    for name in _ASKED_FOR:
        if not hasattr(torch.ops.torchvision, name):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    return importlib.import_module("torchvision.models")
