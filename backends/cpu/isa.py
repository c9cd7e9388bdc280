"""One row of data an instruction set: what the micro-kernel generator reads instead of asking which CPU it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import tvm

INT8_STEP = 4  # input channels an int8 step takes: one 32-bit broadcast of activations
# channels that one sum of products takes
_FORMS = {"dot": 4, "pairs": 2, "long": 4, "matrix": 8}
# Vectors of a tile on ARM: two are one load, so that odd numbers pair those of two steps, and spill; so do six.
PAIRED = (1, 2, 4)
# Registers of weights a vector, which LLVM loads early; with fewer tiles spill. "long": two halves of two steps.
_EARLY_WEIGHTS = {"long": 4, "matrix": 2}


@dataclass(frozen=True)
class Isa:
    """Vector width, registers, dot product and LLVM names of an instruction set.

    An int8 step multiplies a broadcast of 4 uint8 activations by int8 weights of ``lanes`` output channels. ``form`` says how:
    "dot": one instruction of groups of 4 (``dot_accumulates``: it adds to its first operand).
    "pairs": both sides are widened to int16 and two multiply-adds of pairs do it: u8 * s8 + u8 * s8 stays below 2**17.
    "long": a vector is two halves of ``[lane][2]`` bytes, channels 0 and 1 of every lane and then 2 and 3; the second half's
    int16 products are taken from the first one's, and pairs of the differences added to int32.
    "matrix": one instruction of 2 pixels by 8 channels and 2 output channels; a step takes 8. Dense kernels alone know it: a row
    that names ``matrix_intrinsic`` multiplies by it where the cost model says so (``dense``).
    Nothing saturates in any of them.

    Where the instruction takes no uint8, ``flips`` are what the channels of a step are combined with by exclusive or:
    ``x - flip`` is multiplied in place of x, and the bias takes that back. ``x ^ 0x80`` is ``x - 128`` as int8; in "long",
    which subtracts the second half, ``x ^ 0x7F`` is ``127 - x``: int16 holds every difference of two products of int8, and not
    every sum (``-128 * -128 * 2``).
    """

    name: str
    mtriple: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]  # flags of /proc/cpuinfo that this row's code needs
    lanes: int  # 32-bit lanes of a vector
    registers: int
    dot_intrinsic: str
    pair_intrinsic: str  # of int16 pairs; adds to its first operand where dot_intrinsic does. Empty: widening multiplies
    dot_accumulates: bool
    fma: bool
    pack_words: str  # two vectors of int32 to int16, saturating, by 128-bit parts
    pack_bytes: str  # two vectors of int16 to uint8, likewise
    form: str = "dot"
    flips: tuple[int, int, int, int] = (0, 0, 0, 0)
    matrix_intrinsic: str = ""  # 2 x 8 uint8 by 8 x 2 int8, added to 2 x 2 int32
    by_element: bool = False  # multiply-adds take a lane of a vector as it is: a load serves ``lanes`` steps of a pixel
    packs_two: bool = True  # pack_words and pack_bytes take two vectors, or one
    lookup: str = ""  # picks elements of a vector of 16 float32 by the low bits of int32; empty where no one instruction does
    round_intrinsic: str = "llvm.lrint"  # float32 to int32, half to even
    pipes: int = 2  # vector multiplies a cycle
    latency: float = 5.0  # cycles from an accumulator to itself
    loads_a_cycle: float = 2.0
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 512 * 1024
    l2_bytes_a_cycle: float = 32.0

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ValueError(
                f"row {self.name!r} says form {self.form!r}; the forms are {', '.join(_FORMS)}"
            )

    @property
    def dot_group(self) -> int:
        """Channels that one sum of products takes."""
        return _FORMS[self.form]

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector register."""
        return 4 * self.lanes

    @property
    def step(self) -> int:
        """Input channels that an int8 step takes."""
        return max(INT8_STEP, self.dot_group)

    @property
    def halves(self) -> int:
        """Dot-product instructions that an int8 step takes."""
        return self.step // self.dot_group

    @property
    def sum_pixels(self) -> int:
        """Pixels whose sums share a register, for as many times fewer channels."""
        return 2 if self.form == "matrix" else 1

    @property
    def half_channels(self) -> tuple[tuple[int, ...], ...]:
        """The channels of a step that each half of its weights holds: a mask and a shift split pairs, halves of bytes lie apart."""
        whole = (tuple(range(self.step)),)
        return {"pairs": ((0, 2), (1, 3)), "long": ((0, 1), (2, 3))}.get(self.form, whole)

    @property
    def steps_a_load(self) -> int:
        """Steps whose activations one load of a pixel brings."""
        return self.vector_bytes // self.step if self.by_element else 1

    @property
    def dot_instructions(self) -> int:
        """Instructions of one ``emit.dot`` of a half."""
        if self.form == "long":
            return 3
        return 1 if self.dot_accumulates else 2

    @property
    def products(self) -> int:
        """Instructions that multiply and add a step of one vector of sums."""
        return self.halves * self.dot_instructions

    @property
    def pair_instructions(self) -> int:
        """Instructions of one ``emit.dot_pairs``."""
        return 1 if self.dot_accumulates and self.pair_intrinsic else 2

    @property
    def pair_registers(self) -> int:
        """Registers of its weights: widening multiplies take the even and the odd ones apart."""
        return 1 if self.pair_intrinsic else 2

    @property
    def can_overlap(self) -> bool:
        """True where epilogues hide beside another tile's steps: one load a step and pixel leaves registers for both."""
        return self.dot_accumulates and not self.by_element

    @cached_property
    def _matrix(self) -> Isa:
        return replace(
            self, form="matrix", dot_intrinsic=self.matrix_intrinsic, matrix_intrinsic=""
        )

    def dense(self, dtype: str) -> tuple[Isa, ...]:
        """The rows that a dense kernel chooses from: this one, and the one that multiplies matrices."""
        return (self, self._matrix) if dtype == "uint8" and self.matrix_intrinsic else (self,)

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

        One register more than there are and the accumulators spill: 7 x 4 zmm run at 0.75 of 7 x 2. Where a load serves several
        steps, its pixels stay in registers too.
        """
        integer = dtype != "float32"
        weights = self.halves if integer else 1
        accumulates = self.dot_accumulates if integer else self.fma
        free = self.registers - (not accumulates)
        held = 1 if self.by_element else 0  # registers a pixel
        if not self.by_element:
            free -= weights
        elif integer:
            free -= any(self.flips) + (self.form in ("long", "matrix"))
            weights = _EARLY_WEIGHTS.get(self.form, 1)
        paired, both = self.by_element and self.sum_pixels == 1, self.sum_pixels
        return tuple(
            (pixels, vectors)
            for vectors in (PAIRED if paired else range(1, 9))
            for pixels in range(1, free // vectors)
            if -(-pixels // both) * both * (vectors + held) + weights * vectors <= free
        )
