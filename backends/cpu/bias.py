"""The bias that a kernel starts its sums with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu.workload import Conv2d

Array = npt.NDArray[np.generic]


def folded_bias(workload: Conv2d, weight: Array, bias: Array | None) -> Array:
    """``bias - x_zero_point * sum(weight)`` for each output channel (weights OIHW), in wrapping int32; floats as they are.

    ``sum((x - z) * w) + b = sum(x * w) + (b - z * sum(w))``, where the margins of x hold z.
    """
    if workload.x.dtype == "float32":
        values = np.zeros(weight.shape[0]) if bias is None else bias
        return values.astype(np.float32, copy=False)
    start = np.zeros(weight.shape[0], np.int64) if bias is None else bias.astype(np.int64)
    total: npt.NDArray[np.int64] = weight.astype(np.int64).sum(axis=(1, 2, 3))
    return (start - workload.x_zero_point * total).astype(np.int32)
