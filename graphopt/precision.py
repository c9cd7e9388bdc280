"""What the floats of a network are multiplied in: float32 everywhere, on GPUs by choice tf32 or float16."""

from __future__ import annotations

from graphopt.backends.targets import Target
from graphopt.errors import CompileError

FLOAT32, TF32, FLOAT16 = "float32", "tf32", "float16"
PRECISIONS = (FLOAT32, TF32, FLOAT16)
_FIRST_WITH_TF32 = 80  # compute capability, times ten


def check_precision(precision: str, target: Target) -> None:
    """Raise CompileError for an unknown precision, or one that the target has not."""
    if precision not in PRECISIONS:
        raise CompileError(
            f"option precision must be one of {', '.join(PRECISIONS)}, not {precision!r}"
        )
    if precision == FLOAT32:
        return
    if target.kind != "cuda":
        raise CompileError(
            f"option precision: target {target.name} computes floats in float32, not in {precision}; "
            "leave the option out, or compile for a GPU"
        )
    if precision == TF32 and int(target.isa.removeprefix("sm_")) < _FIRST_WITH_TF32:
        raise CompileError(
            f"option precision: target {target.name} has no tf32, which begins with sm_80; use float16 or float32"
        )
