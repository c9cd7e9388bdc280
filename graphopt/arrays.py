"""Tensors as NumPy's arrays, wherever they lie: a program's parameters may be on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


def to_numpy(tensor: Tensor) -> Array:
    """The values; the tensor's own memory where that is the CPU's."""
    array: Array = tensor.detach().cpu().numpy()
    return array
