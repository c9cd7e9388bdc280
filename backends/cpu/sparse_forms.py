"""A layer's two forms: what a dense and a sparse kernel are estimated to take for the zeros that its weights hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.backends.cpu import conv_plan, sparse_plan, winograd_plan
from graphopt.backends.cpu.bias import folded_bias
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.planar import planar
from graphopt.backends.cpu.rivals import is_depthwise, is_winograd
from graphopt.backends.cpu.sparse_pack import density
from graphopt.backends.cpu.workload import Conv2d

Array = npt.NDArray[np.generic]

_WORTH_A_LOOK = 0.7  # of the blocks: above it no sparse kernel was ever faster
_INT32 = 2.0**31 * 0.999


@dataclass(frozen=True)
class Forms:
    """``density`` is the share of blocks with a non-zero; cycles on one thread. ``sparse`` is None where ``reason`` says why."""

    density: float
    dense: float
    sparse: float | None
    reason: str = ""

    @property
    def gain(self) -> float | None:
        """The dense form's time over the sparse one's."""
        return None if self.sparse is None else self.dense / self.sparse


def as_planar(workload: Conv2d) -> Conv2d:
    """The same layer between planar tensors."""
    residual = None if workload.residual is None else planar(workload.residual)
    return dataclasses.replace(
        workload, x=planar(workload.x), y=planar(workload.y), residual=residual
    )


def compare(workload: Conv2d, weight: Array, isa: Isa, threads: int) -> Forms | None:
    """Both forms of an NHWC workload with an OIHW weight; None for a layer whose weights leave nothing out."""
    if is_depthwise(workload):
        return None
    share = density(weight)
    if share == 1.0:
        return None
    dense = dense_cycles(workload, weight, isa, threads)
    if share > _WORTH_A_LOOK:
        return Forms(share, dense, None, "too few blocks are zero")
    other = as_planar(workload)
    reason = sparse_plan.fits(other, isa)
    if reason is not None:
        return Forms(share, dense, None, reason)
    return Forms(share, dense, sparse_plan.estimate(other, isa, share))


def dense_cycles(workload: Conv2d, weight: Array, isa: Isa, threads: int) -> float:
    """Estimated cycles of the dense kernel that would be chosen."""
    if is_winograd(workload, isa, threads, sums_fit=True) and (
        workload.x.dtype == "float32" or winograd_plan.sums_fit(weight)  # type: ignore[arg-type]
    ):
        return winograd_plan.estimate(workload, isa, threads)
    return conv_plan.estimate(workload, isa)


def rounds_in_range(workload: Conv2d, weight: Array, bias: Array | None, scale: Array) -> Conv2d:
    """With ``Requantize.fits`` set where no sum of bytes times these weights, scaled, leaves int32."""
    requantize = workload.epilogue.requantize
    if requantize is None or workload.epilogue.inverse_scale:
        return workload
    start = np.abs(folded_bias(workload, weight, bias).astype(np.float64))
    rows = np.abs(weight.astype(np.float64)).reshape(weight.shape[0], -1)
    largest = float(((255.0 * rows.sum(axis=1) + start) * np.abs(scale)).max(initial=0.0))
    fitting = dataclasses.replace(requantize, fits=largest < _INT32)
    epilogue = dataclasses.replace(workload.epilogue, requantize=fitting)
    return dataclasses.replace(workload, epilogue=epilogue)
