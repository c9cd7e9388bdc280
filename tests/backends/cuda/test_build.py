"""Every kind of kernel becomes machine code of every architecture, and holds the instructions that it is written for."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import relax

from graphopt.backends.cpu.workload import Concat, Conv2d, Convert, Layout, Pool2d, Requantize
from graphopt.backends.cuda.arch import ARCHS, Arch
from graphopt.backends.cuda.build import build_library
from graphopt.backends.cuda.conv import conv
from graphopt.backends.cuda.conv_plan import TILES, plan_conv, possible
from graphopt.backends.cuda.conv_sums import finish_sums
from graphopt.backends.cuda.depthwise import depthwise
from graphopt.backends.cuda.dot import dot_conv
from graphopt.backends.cuda.float_conv import float_conv
from graphopt.backends.cuda.pipeline import HALVES
from graphopt.backends.cuda.pointwise import concat, convert
from graphopt.backends.cuda.pool import pool
from graphopt.backends.cuda.sparse_conv import sparse_conv
from graphopt.backends.cuda.sparse_plan import TILES as SPARSE_TILES
from graphopt.backends.cuda.sparse_plan import plan_sparse
from graphopt.backends.cuda.toolkit import compile_source, find_nvcc, image_in_text
from tests.backends.cuda.harness import conv_workload, image
from tests.backends.cuda.test_float_product import float_workload

TRIPLE = "x86_64-unknown-linux-gnu"
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")


def _kernels(arch: Arch) -> dict[str, Any]:
    """One kernel of each kind by its name; convolutions of the largest tile with a residual, and of the smallest."""
    large = conv_workload((64, 128), size=(14, 14), batch=None, residual=True)
    small = conv_workload((3, 8), floats=True)
    grouped, signed = (
        conv_workload((12, 12), groups=4, size=(9, 9), dtype=dtype) for dtype in ("uint8", "int8")
    )
    half = float_workload("float16", (64, 64), residual=True)
    deep = replace(plan_conv(conv_workload((512, 64), batch=1), arch, TILES[-1]), splits=4)
    few = conv_workload((64, 10), batch=1, size=(1, 1), kernel=(1, 1), padding=(0, 0))
    x, y = image(2, (8, 8), 12), image(2, (4, 4), 12)
    rounding = Requantize(3, 0, 255)
    floats = Layout(2, 8, 8, 12, "float32")
    largest = next(tile for tile in TILES if possible(tile, arch, 16))
    functions = [
        conv(plan_conv(large, arch, largest), arch),
        conv(plan_conv(small, arch, TILES[-1]), arch),
        conv(plan_conv(half, arch, TILES[-1]), arch),
        conv(deep, arch),
        finish_sums(deep),
        dot_conv(grouped),
        dot_conv(signed),
        dot_conv(few),
        depthwise(conv_workload((12, 12), groups=12)),
        float_conv(Conv2d(floats, replace(floats, channels=8, channel_stride=8), (1, 1))),
        pool(Pool2d("max", x, y, (2, 2), (2, 2))),
        pool(Pool2d("average", x, y, (2, 2), (2, 2), requantize=rounding)),
        concat(Concat((y, y), image(2, (4, 4), 24), (None, None))),
        convert(Convert(floats, x, "nchw", "nhwc", 10.0, requantize=rounding)),
    ]
    if arch.sparse:
        cut = ((large, SPARSE_TILES[0]), (small, SPARSE_TILES[-1]))
        functions += [sparse_conv(plan_sparse(one, arch, tile), arch) for one, tile in cut]
        half = float_workload("float16", (64, 256), size=(14, 14), batch=None)
        functions += [sparse_conv(plan_sparse(half, arch, SPARSE_TILES[0]), arch)]
    return {str(function.attrs["global_symbol"]): function for function in functions}


def _nothing() -> tvm.IRModule:
    """A Relax module that returns what it is given."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    return builder.get()


@functools.cache
def _source(name: str) -> str:
    """The CUDA source of the kernels and of what TVM makes beside them; no compiler is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.backends.cuda.build.find_nvcc", lambda: None)
        library = build_library(_nothing(), _kernels(ARCHS[name]), ARCHS[name], TRIPLE)
    assert library.code == "source"
    return library.source


@pytest.mark.parametrize(
    "name",
    [n if n in ("sm_75", "sm_80") else pytest.param(n, marks=pytest.mark.slow) for n in ARCHS],
)
@needs_nvcc
def test_machine_code(name: str, tmp_path: Path) -> None:
    cubin = compile_source(_source(name), name)
    assert cubin.startswith(b"\x7fELF")
    assert all(kernel.encode() in cubin for kernel in _kernels(ARCHS[name]))
    disassembler = _disassembler()
    if disassembler is None:
        pytest.skip("needs nvdisasm to look for IMMA and IDP")
    (tmp_path / "kernels.cubin").write_bytes(cubin)
    text = subprocess.run(
        [disassembler, str(tmp_path / "kernels.cubin")], capture_output=True, text=True, check=True
    ).stdout
    shape, halves = {"m8n8k16": ("8816", "1688"), "m16n8k32": ("16832", "16816")}[
        ARCHS[name].mma_shape
    ]
    assert re.search(rf"IMMA\.{shape}\.U8\.S8", text)
    assert re.search(rf"HMMA\.{halves}\.F32 ", text)
    for sparse in (r"IMMA\.SP\.16864\.S8\.U8", r"HMMA\.SP\.16832\.F32 "):
        assert bool(re.search(sparse, text)) == ARCHS[name].sparse
    assert re.search(r"IDP\.4A\.U8\.S8", text)
    assert re.search(r"IDP\.4A\.S8\.S8", text)
    assert re.search(r"LDSM", text)
    assert bool(re.search(r"LDGSTS", text)) == ARCHS[name].async_copy
    assert not re.search(r"\b(STL|LDL)\b", text)  # nothing spills to local memory


def _disassembler() -> str | None:
    """``nvdisasm`` of the path, or of the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or () if spec is not None else ()
    packaged = (shutil.which("nvdisasm", path=f"{root}/cu13/bin") for root in roots)
    return shutil.which("nvdisasm") or next(filter(None, packaged), None)


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "product", "copies"),
    [
        ("sm_75", "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32", False),
        ("sm_80", "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", True),
    ],
)
def test_ptx(name: str, product: str, copies: bool) -> None:
    ptx = compile_source(_source(name), name, "ptx").decode()
    assert product in ptx
    assert "dp4a.u32.s32" in ptx
    assert "dp4a.s32.s32" in ptx
    sparse = "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32"
    assert (sparse in ptx) == ARCHS[name].sparse
    assert ("cp.async.cg.shared.global" in ptx) == copies
    assert "fma.rn.f32" not in ptx.split("cuda_conv_")[1]


def test_registers_behind_a_pointer_are_not_cut_off() -> None:
    """TVM's compaction of buffers would leave 13 of 16 words of x in registers: only every fourth is indexed."""
    source = _source("sm_80")
    large = next(name for name in _kernels(ARCHS["sm_80"]) if "14x14x64x128" in name)
    body = source[source.index(f"{large}_kernel") :]
    body = body[body.index("{") : body.index("graphopt_mma")]
    words = [int(count) for count in re.findall(r"uint _ptr\w*\[(\d+)\]", body)]
    plan = plan_conv(conv_workload((64, 128)), ARCHS["sm_80"], TILES[0])
    rows, columns = plan.tile.warp_rows // 16, plan.tile.warp_columns // 8
    assert sorted(words) == sorted([HALVES * rows * 4, HALVES * columns * 2])


@needs_nvcc
def test_the_library_holds_the_cubin_in_the_place_of_source() -> None:
    arch = ARCHS["sm_80"]
    functions = {k: v for k, v in _kernels(arch).items() if k.startswith("cuda_pool_max")}
    library = build_library(_nothing(), functions, arch, TRIPLE)
    assert library.code == "cubin"
    assert "__global__" in library.source
    assert b"// cubin in base64" in library.data
    assert b"__global__" not in library.data


def test_text_is_no_image() -> None:
    assert image_in_text("#include <cstdint>\n") is None
