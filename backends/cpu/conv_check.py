"""What the generator of dense convolutions refuses."""

from __future__ import annotations

from graphopt.backends.cpu.workload import Conv2d
from graphopt.errors import CompileError


def check_conv2d(workload: Conv2d) -> None:
    """Refuse what the generator cannot compute, naming the fault."""
    x, y, groups = workload.x, workload.y, workload.groups
    integer = x.dtype == "uint8"
    if x.dtype not in ("uint8", "float32"):
        raise CompileError(
            f"conv2d takes uint8 or float32 activations, not {x.dtype}; insert a Convert"
        )
    if x.channels % groups or y.channels % groups:
        raise CompileError(
            f"conv2d cannot split {x.channels} -> {y.channels} channels into {groups} groups; correct `groups`"
        )
    out = "uint8" if workload.epilogue.requantize is not None else "float32"
    if (y.dtype == "uint8") != (out == "uint8") or (out == "uint8" and not integer):
        raise CompileError(
            f"conv2d {x.dtype} -> {y.dtype} does not fit its epilogue, which makes {out}; correct y.dtype"
        )
    takes = workload.epilogue.residual_add is not None or workload.epilogue.float_residual
    if takes != (workload.residual is not None):
        raise CompileError(
            "conv2d has a residual layout without a residual epilogue, or one without the other"
        )
    (kh, kw), (sh, sw), (dh, dw) = workload.kernel, workload.stride, workload.dilation
    top, left = workload.padding
    last_row = (y.height - 1) * sh - top + (kh - 1) * dh
    last_column = (y.width - 1) * sw - left + (kw - 1) * dw
    if (
        x.top < top
        or x.left < left
        or last_row >= x.height + x.bottom
        or last_column >= x.width + x.right
    ):
        raise CompileError(
            f"conv2d {kh}x{kw} reads outside its input's margins; give x margins of at least "
            f"top {top}, left {left}, bottom {max(0, last_row + 1 - x.height)}, right {max(0, last_column + 1 - x.width)}"
        )
