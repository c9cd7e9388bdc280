"""Interpolation as weighted sums of selected rows: ``y = sum_k w[k] * x[index[k]]`` along each resized dimension.

Every ``upsample`` operator is linear and separable, so PyTorch itself, run on the unit vectors of one dimension, gives
the indices and weights of all modes (TVM's own forms err for sizes that are no multiples, ignore ``scale_factor`` and
antialiasing, and divide by zero for one output pixel).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphopt import ops

aten = torch.ops.aten
_MODES = {
    aten.upsample_nearest1d.vec: "nearest",
    aten.upsample_nearest2d.vec: "nearest",
    aten.upsample_nearest3d.vec: "nearest",
    aten._upsample_nearest_exact1d.vec: "nearest-exact",
    aten._upsample_nearest_exact2d.vec: "nearest-exact",
    aten._upsample_nearest_exact3d.vec: "nearest-exact",
    aten.upsample_linear1d.vec: "bilinear",
    aten.upsample_bilinear2d.vec: "bilinear",
    aten.upsample_trilinear3d.vec: "bilinear",
    aten.upsample_bicubic2d.vec: "bicubic",
    aten._upsample_bilinear2d_aa.vec: "bilinear",
    aten._upsample_bicubic2d_aa.vec: "bicubic",
}
_ANTIALIASED = (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec)


def is_resize(node: fx.Node) -> bool:
    """True for the ``upsample`` operators whose sizes, but for the batch, are known."""
    if node.target not in _MODES:
        return False
    value = ops.bind(node)["input"].meta["val"]
    return not any(
        isinstance(s, torch.SymInt) for v in (value, node.meta["val"]) for s in v.shape[2:]
    )


def taps(node: fx.Node) -> list[tuple[Tensor, Tensor]]:
    """``(index [K, out], weight [K, out])`` for every spatial dimension of a resize."""
    a = ops.bind(node)
    mode = _MODES[node.target]  # type: ignore[index]
    value, result = a["input"].meta["val"], node.meta["val"]
    factors = a.get("scale_factors") or [None] * (value.dim() - 2)
    return [
        _axis(
            int(size),
            int(wanted),
            mode,
            a.get("align_corners"),
            factor,
            node.target in _ANTIALIASED,
        )
        for size, wanted, factor in zip(value.shape[2:], result.shape[2:], factors, strict=True)
    ]


def _axis(
    size: int, wanted: int, mode: str, align: bool | None, factor: float | None, antialias: bool
) -> tuple[Tensor, Tensor]:
    nearest = mode.startswith("nearest")
    # rows are resized, columns kept: a map of one column is resized wrongly by torch 2.13 (antialias)
    unit = torch.eye(size, dtype=torch.float32 if nearest else torch.float64)
    extent: dict[str, Any] = {"size": (wanted, size)}
    if factor is not None:
        extent = {"scale_factor": (factor, 1.0)}
    response = functional.interpolate(
        unit[None, None],
        mode=mode,
        align_corners=None if nearest else align,
        antialias=antialias,
        **extent,
    )[0, 0].T
    count = max(1, int((response != 0).sum(0).max()))
    order = (response != 0).to(torch.int8).argsort(dim=0, descending=True, stable=True)
    index = order[:count]
    return index, response.gather(0, index).to(torch.float32)


def weighted_rows(x: Tensor, indices: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """The resize itself, traced into the emitted graph; a weight of None is 1 (nearest)."""
    for offset, (index, weight) in enumerate(zip(indices, weights, strict=True)):
        dim = 2 + offset
        rows = [x.index_select(dim, row) for row in index.unbind(0)]
        if weight is not None:
            shape = [1] * (x.dim() - dim - 1)
            columns = [column.reshape(-1, *shape) for column in weight.unbind(0)]
            rows = [row * column for row, column in zip(rows, columns, strict=True)]
        x = rows[0]
        for row in rows[1:]:
            x = x + row
    return x
