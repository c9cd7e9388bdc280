"""One row of data an instruction set: what the micro-kernel generator reads instead of asking which CPU it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import tvm

INT8_STEP = 4  # input channels an int8 step takes: one 32-bit broadcast of activations


@dataclass(frozen=True)
class Isa:
    """Vector width, registers, dot product and LLVM names of an instruction set.

    An int8 step multiplies a broadcast of 4 uint8 activations by int8 weights of ``lanes`` output channels. With
    ``dot_group`` 4 one instruction does it (``dot_accumulates``: it adds to its first operand). With ``dot_group`` 2 both
    sides are widened to int16 and two multiply-adds of pairs do it: u8 * s8 + u8 * s8 stays below 2**17, nothing saturates.
    """

    name: str
    mtriple: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]  # flags of /proc/cpuinfo that this row's code needs
    lanes: int  # 32-bit lanes of a vector
    registers: int
    dot_intrinsic: str
    pair_intrinsic: str  # of int16 pairs; adds to its first operand where dot_intrinsic does
    dot_group: int
    dot_accumulates: bool
    fma: bool
    pack_words: str  # two vectors of int32 to int16, saturating, by 128-bit parts
    pack_bytes: str  # two vectors of int16 to uint8, likewise
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 512 * 1024

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector register."""
        return 4 * self.lanes

    @property
    def halves(self) -> int:
        """Dot-product instructions that an int8 step takes."""
        return INT8_STEP // self.dot_group

    @cached_property
    def _target(self) -> tvm.target.Target:
        target: dict[str, str | list[str]] = {
            "kind": "llvm",
            "mtriple": self.mtriple,
            "mcpu": self.mcpu,
        }
        if self.mattr:
            target["mattr"] = list(self.mattr)
        return tvm.target.Target(target)

    def target(self) -> tvm.target.Target:
        """The TVM target that compiles this row's kernels."""
        return self._target

    def missing(self, cpu_flags: frozenset[str]) -> tuple[str, ...]:
        """The features that a CPU with these flags lacks, in the row's order."""
        return tuple(feature for feature in self.features if feature not in cpu_flags)

    def tiles(self, dtype: str) -> tuple[tuple[int, int], ...]:
        """Register tiles ``(pixels, channel vectors)`` that fit: accumulators, a step's weights, its spread pixel, a product.

        One register more than there are and the accumulators spill: 7 x 4 zmm run at 0.75 of 7 x 2.
        """
        halves = 1 if dtype == "float32" else self.halves
        accumulates = self.fma if dtype == "float32" else self.dot_accumulates
        free = self.registers - halves - (not accumulates)
        return tuple(
            (pixels, vectors)
            for vectors in range(1, 9)
            for pixels in range(1, free // vectors)
            if pixels * vectors + halves * vectors <= free
        )
