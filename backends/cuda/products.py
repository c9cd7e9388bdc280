"""Tensor-core products as rows of data: what lies in memory, what is summed, and how it is written for a chip.

A fragment is 16 rows (left) or 8 columns (right) of 32 bytes of k, in four and two registers, for every element type: of
``mma.m16n8k32`` for bytes, ``m16n8k16`` for float16, ``m16n8k8`` for tf32, chunks of 16 bytes lie where ``ldmatrix`` puts them.
So one kernel serves all of them. A chip that has only smaller products (Turing) makes the same of several.

Source: the PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
"""

from __future__ import annotations

from dataclasses import dataclass

FRAGMENT_BYTES = 32  # of k in one product

_ITEM_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4}


def item_bytes(dtype: str) -> int:
    """The size of an element in memory."""
    return _ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Product:
    """``sums[16, 8] += x[16, k] * weight[k, 8]``: types as the PTX ISA names them (``name`` is x's), and those in memory.

    ``rounds``: elements of x are rounded to the product's type in registers; those of the weight are packed so.
    """

    name: str
    x: str
    weight: str
    sums: str
    rounds: bool = False

    @property
    def item_bytes(self) -> int:
        return item_bytes(self.x)

    @property
    def is_integer(self) -> bool:
        return self.sums == "int32"


PRODUCTS = {
    row.name: row
    for row in (
        Product("u8", "uint8", "int8", "int32"),
        Product("s8", "int8", "int8", "int32"),
        Product("f16", "float16", "float16", "float32"),
        Product("tf32", "float32", "float32", "float32", rounds=True),
    )
}
_OF_DTYPE = {row.x: row for row in PRODUCTS.values() if not row.rounds}


def product_of(dtype: str) -> Product | None:
    """The exact product of an activation's type: float32 has none (tf32 drops 13 bits and must be asked for)."""
    return _OF_DTYPE.get(dtype)


def mma(shape: str, types: str, registers: tuple[str, str, str]) -> str:
    """CUDA for one instruction: ``registers`` are the digits of the registers of ``c``, ``a`` and ``b`` that it takes."""
    kind = "f" if types.startswith("f32") else "r"
    operands, constraints = [], []
    number = 0
    for array, digits in zip("cab", registers, strict=True):
        operands.append(f"{{{', '.join(f'%{number + i}' for i in range(len(digits)))}}}")
        constraint = f"+{kind}" if array == "c" else "r"
        constraints.append(", ".join(f'"{constraint}"({array}[{digit}])' for digit in digits))
        number += len(digits)
    c, a, b = operands
    return f"""\
  asm volatile("mma.sync.aligned.{shape}.row.col.{types} {c}, {a}, {b}, {c};"
               : {constraints[0]} : {constraints[1]}, {constraints[2]});
"""


_WHOLE = ("0123", "0123", "01")
# The same product of bytes by four 8 x 8 x 16 ones, of float16 by two 16 x 8 x 8: their registers hold the same elements.
_QUARTERS = (("01", "0", "0"), ("23", "1", "0"), ("01", "2", "1"), ("23", "3", "1"))
_HALVES = (("0123", "01", "0"), ("0123", "23", "1"))

TURING = {
    "u8": "".join(mma("m8n8k16", "s32.u8.s8.s32", part) for part in _QUARTERS),
    "s8": "".join(mma("m8n8k16", "s32.s8.s8.s32", part) for part in _QUARTERS),
    "f16": "".join(mma("m16n8k8", "f32.f16.f16.f32", part) for part in _HALVES),
}
AMPERE = {
    "u8": mma("m16n8k32", "s32.u8.s8.s32", _WHOLE),
    "s8": mma("m16n8k32", "s32.s8.s8.s32", _WHOLE),
    "f16": mma("m16n8k16", "f32.f16.f16.f32", _WHOLE),
    "tf32": mma("m16n8k8", "f32.tf32.tf32.f32", _WHOLE),
}
