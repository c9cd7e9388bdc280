"""Device functions that TIR calls by name: tensor-core products, copies into shared memory, fragments, rounding.

Each is a line or two of CUDA around one instruction; its meaning is in the docstring of the method that calls it.
Pointers are ``T.address_of`` an element.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu.emit import Expr, bind
from graphopt.backends.cuda.arch import Arch
from graphopt.backends.cuda.products import Product

Kernel = PrimFunc

_SHIFT, _SHIFT_BITS = 1.5 * 2.0**23, 0x4B400000  # a float32 and its bits
_COPY_TYPES = {2: "ushort", 4: "uint", 8: "uint2", 16: "uint4"}


def _function(signature: str, body: str) -> str:
    return f"__device__ __forceinline__ {signature} {{\n{body}}}\n"


def _shared_address(pointer: str) -> str:
    return f"(unsigned)__cvta_generic_to_shared({pointer})"


def _cache(size: int) -> str:
    """.cg: past L1, which only whole 16 bytes can."""
    return "cg" if size == 16 else "ca"


def _repeated(size: int, byte: int) -> str:
    """``size`` times a byte, as CUDA's initializer of the type that is copied."""
    words = [hex(byte * 0x01010101) + "u"] * (size // 4)
    return f"{{{', '.join(words or [hex(byte * 0x0101)])}}}"


class Device:
    """The functions of one architecture; call them inside an open builder."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch

    def _call(
        self, name: str, signature: str, body: str, *arguments: Expr, before: str = ""
    ) -> None:
        source = before + _function(signature, body)
        T.evaluate(T.cuda.func_call(name, *arguments, source_code=source))

    def multiply(self, product: Product, c: Expr, a: Expr, b: Expr) -> None:
        """``c[16, 8] += a[16, k] * b[k, 8]`` over a warp, k of 32 bytes; registers as ``mma.m16n8`` has them."""
        name = f"graphopt_mma_{product.name}"
        sums = "int" if product.is_integer else "float"
        signature = f"void {name}({sums}* c, const unsigned* a, const unsigned* b)"
        self._call(name, signature, self.arch.products[product.name], c, a, b)

    def round_tf32(self, registers: Expr) -> None:
        """Four float32 to tf32, to nearest, ties away from zero: the low 13 bits become 0 (``cvt.rna.tf32.f32``)."""
        body = "".join(
            f'  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d[{i}]) : "f"(__uint_as_float(d[{i}])));\n'
            for i in range(4)
        )
        self._call("graphopt_round_tf32", "void graphopt_round_tf32(unsigned* d)", body, registers)

    def load_matrices(self, registers: Expr, row: Expr) -> None:
        """Four 8 x 16-byte matrices from shared memory: ``row`` is lane ``8 i + r``'s pointer to row r of matrix i.

        Register i of lane l gets bytes ``4 (l % 4) ..`` of row ``l / 4`` of matrix i.
        """
        body = f"""\
  unsigned address = {_shared_address("row")};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
"""
        signature = "void graphopt_load_matrices(unsigned* d, const uchar* row)"
        self._call("graphopt_load_matrices", signature, body, registers, row)

    def copy(self, target: Expr, source: Expr, size: int) -> None:
        """``size`` bytes from global to shared memory, there once ``wait`` has seen their group."""
        name = f"graphopt_copy_{size}"
        if self._is_async(size):
            body = f"""\
  asm volatile("cp.async.{_cache(size)}.shared.global [%0], [%1], {size};"
               :: "r"({_shared_address("to")}), "l"(from) : "memory");
"""
        else:
            kind = _COPY_TYPES[size]
            body = f"  *({kind}*)to = *(const {kind}*)from;\n"
        signature = f"void {name}(uchar* to, const void* from)"
        self._call(name, signature, body, target, source)

    def copy_where(self, target: Expr, source: Expr, size: int, inside: Expr) -> None:
        """As ``copy`` where ``inside``, and zeros elsewhere."""
        name, kind = f"graphopt_copy_where_{size}", _COPY_TYPES[size]
        if self._is_async(size):
            body = self._partial_copy(size, f"inside ? {size} : 0")
        else:
            body = f"""\
  {kind} value = {_repeated(size, 0)};
  if (inside) value = *(const {kind}*)from;
  *({kind}*)to = value;
"""
        signature = f"void {name}(uchar* to, const void* from, bool inside)"
        self._call(name, signature, body, target, source, inside)

    def copy_part(self, target: Expr, source: Expr, size: int, valid: Expr) -> None:
        """As ``copy``, only the first ``valid`` bytes (an even number, or all, or 0) read and zeros behind them."""
        name = f"graphopt_copy_part_{size}"
        if self._is_async(size):
            body = self._partial_copy(size, "valid")
        else:
            kind = _COPY_TYPES[size]
            body = f"""\
  {kind} value;
  ushort* parts = (ushort*)&value;
#pragma unroll
  for (int i = 0; i < {size // 2}; ++i)
    parts[i] = 2 * i < valid ? ((const ushort*)from)[i] : (ushort)0;
  if (valid == {size}) value = *(const {kind}*)from;
  *({kind}*)to = value;
"""
        signature = f"void {name}(uchar* to, const void* from, int valid)"
        self._call(name, signature, body, target, source, valid)

    def _partial_copy(self, size: int, valid: str) -> str:
        return f"""\
  asm volatile("cp.async.{_cache(size)}.shared.global [%0], [%1], {size}, %2;"
               :: "r"({_shared_address("to")}), "l"(from), "r"({valid}) : "memory");
"""

    def _is_async(self, size: int) -> bool:
        return self.arch.async_copy and size >= 4  # cp.async copies no less

    def copy_or(self, target: Expr, source: Expr, size: int, inside: Expr, byte: int) -> None:
        """As ``copy`` where ``inside``, and ``size`` times a byte elsewhere.

        Those are copied too, from a constant: a store beside the copies would be a second way through the loop.
        """
        name, kind = f"graphopt_copy_or_{byte}_{size}", _COPY_TYPES[size]
        line = f"graphopt_bytes_{byte}_{size}"
        before = f"static __device__ const {kind} {line} = {_repeated(size, byte)};\n"
        body = f"  const void* chosen = inside ? from : (const void*)&{line};\n"
        if self._is_async(size):
            body += f"""\
  asm volatile("cp.async.{_cache(size)}.shared.global [%0], [%1], {size};"
               :: "r"({_shared_address("to")}), "l"(chosen) : "memory");
"""
        else:
            body += f"  *({kind}*)to = *(const {kind}*)chosen;\n"
        signature = f"void {name}(uchar* to, const void* from, bool inside)"
        self._call(name, signature, body, target, source, inside, before=before)

    def commit(self) -> None:
        """The copies since the last commit are a group."""
        body = '  asm volatile("cp.async.commit_group;" ::: "memory");\n'
        self._call(
            "graphopt_commit", "void graphopt_commit()", body if self.arch.async_copy else ""
        )

    def wait(self, groups: int) -> None:
        """Until at most the last ``groups`` groups of this thread's copies are on their way."""
        body = f'  asm volatile("cp.async.wait_group {groups};" ::: "memory");\n'
        name = f"graphopt_wait_{groups}"
        self._call(name, f"void {name}()", body if self.arch.async_copy else "")


def synchronize() -> None:
    """Every thread of the block has come here, and sees what the others wrote to shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))


def dot(x: Expr, weights: Expr, accumulator: Expr, dtype: str) -> Expr:
    """``accumulator + sum over 4 bytes of x * weight``: bytes of ``dtype`` in a uint32 by int8 in an int32 (``dp4a``)."""
    kind = {"uint8": "u", "int8": "s"}[dtype]
    name = f"graphopt_dot_{kind}8"
    body = f"""\
  int sum;
  asm("dp4a.{kind}32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(w), "r"(c));
  return sum;
"""
    source = _function(f"int {name}(unsigned x, int w, int c)", body)
    call = T.cuda.func_call(name, x, weights, accumulator, source_code=source, return_type="int32")
    return bind(call)


def round_to_int(value: Expr) -> Expr:
    """Half to even, as int32; the value's magnitude must be below 2**22.

    A sum with 1.5 * 2**23 has no bits behind the point, and the integer in its low bits: an addition runs at full rate, a
    conversion does not.
    """
    shifted = T.reinterpret("int32", value + tirx.const(_SHIFT, "float32"))
    return shifted - tirx.const(_SHIFT_BITS, "int32")


def multiply_float(a: Expr, b: Expr) -> Expr:
    """A float32 product that no compiler makes part of an fma."""
    return T.call_pure_extern("float32", "__fmul_rn", a, b)
