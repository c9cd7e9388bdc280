"""Tiny models compiled with TVM directly, as artifacts: what sessions and benchmarks are tested on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.artifact import Artifact
from graphopt.backends.targets import resolve
from graphopt.manifest import Dim, Kernel, Manifest, TensorSpec

BATCH = Dim("batch", 1, 8)
FEATURES, OUTPUTS = 64, 32


def weights(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Small integers, so that float32 products and sums are exact in any order."""
    generator = np.random.default_rng(seed)
    return {
        "fc.weight": generator.integers(-8, 9, (FEATURES, OUTPUTS)).astype(np.float32),
        "fc.bias": generator.integers(-8, 9, OUTPUTS).astype(np.float32),
    }


def inputs(batch: int = 3, seed: int = 1) -> np.ndarray[Any, Any]:
    """An input of the model, exact like its weights."""
    generator = np.random.default_rng(seed)
    return generator.integers(-8, 9, (batch, FEATURES)).astype(np.float32)


def expected(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``relu(x W + b)`` and ``x W``."""
    weight, bias = weights().values()
    product = x @ weight
    return np.maximum(product + bias, 0), product


@functools.cache
def library(negated: bool = False) -> bytes:
    """``main(x, W, b) -> (relu(x W + b), x W, x, b)`` of any batch, for the baseline CPU; or of -x."""
    import tvm
    from tvm import relax, topi

    batch = tvm.tirx.Var("batch", "int64")
    weight = relax.Var("w", relax.TensorType((FEATURES, OUTPUTS), "float32"))
    bias = relax.Var("b", relax.TensorType((OUTPUTS,), "float32"))
    x = relax.Var("x", relax.TensorType((batch, FEATURES), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, weight, bias], attrs={"num_input": 1}):
        with builder.dataflow():
            factor = builder.emit_te(topi.negative, x) if negated else x
            product = builder.emit_te(topi.matmul, factor, weight)
            total = builder.emit_te(topi.add, product, bias)
            positive = builder.emit_te(topi.nn.relu, total)
            result = builder.emit_output(relax.Tuple([positive, product, x, bias]))
        builder.emit_func_output(result)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    executable = tvm.compile(builder.get(), target=target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.so"
        executable.export_library(str(path))
        return path.read_bytes()


def manifest(structure: Any = None, batch: int | Dim = BATCH, **changes: Any) -> Manifest:
    """The manifest of ``library()``."""
    target = resolve("x86-64")
    floats = functools.partial(TensorSpec, dtype="float32")
    return Manifest(
        **{
            "target": target.name,
            "triple": target.triple,
            "features": tuple(sorted(target.features)),
            "inputs": (floats("x", shape=(batch, FEATURES)),),
            "outputs": (
                floats("positive", shape=(batch, OUTPUTS)),
                floats("product", shape=(batch, OUTPUTS)),
                floats("same", shape=(batch, FEATURES)),
                floats("bias", shape=(OUTPUTS,)),
            ),
            "output_structure": {"tuple": [0, 1, 2, 3]} if structure is None else structure,
            "weights": tuple(weights()),
            "kernels": (
                Kernel("matmul", "fc", "linear", "float32", FEATURES * OUTPUTS),
                Kernel("add", "fc", "add", "float32"),
                Kernel("relu", "act", "relu", "float32"),
            ),
            **changes,
        }
    )


def artifact(structure: Any = None, **changes: Any) -> Artifact:
    """An artifact of ``library()``."""
    return Artifact(manifest(structure, **changes), library(), weights())


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Tell whether two sequences of arrays are equal bit for bit."""
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
