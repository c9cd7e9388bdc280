"""Fake forms of torch's fake quantization: its shapes without its values, which torch 2.13 lacks.

Without them a quantized program of an open batch can neither be exported nor get the shapes of new nodes, and one of a
fixed batch gets them by running the real kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPERATORS = (
    "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)
_LIBRARY = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]


def _values_and_mask(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


for _name in _OPERATORS:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        _LIBRARY.impl(_name, _values_and_mask)  # type: ignore[no-untyped-call]
