"""The emitted graph becomes a Relax module, and that a shared library.

Relax sees our kernels as external functions with their results passed in: it plans their memory, and its passes, which
expect scheduled blocks, never look inside. Everything else is imported as TVM imports ATen, legalized and fused. The
network's inputs are the leading parameters of ``main``, its weights the trailing ones: the shapes of what ``num_input``
does not count are not checked at every call (0.7 us a weight: 0.1 ms for MobileNetV2).
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as stages
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from graphopt.arrays import to_numpy
from graphopt.backends.link import linker
from graphopt.backends.lower import decompositions
from graphopt.backends.lower.converters import CONVERTERS
from graphopt.backends.lower.emit import Lowered
from graphopt.backends.lower.lift_constants import LiftConstants
from graphopt.backends.lower.pipeline import relax_pipeline
from graphopt.backends.lower.straight_line import Recorder
from graphopt.elf import without_debug
from graphopt.errors import CompileError
from graphopt.straight_line import StraightLine

log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]

_OBJECT = "lib0.o"  # what TVM calls the object file of the kernels that it links


def export(
    lowered: Lowered, inputs: tuple[torch.Tensor, ...], dynamic_batch: tuple[int, int] | None
) -> ExportedProgram:
    """Trace the emitted graph once more, and decompose what is not a kernel to core ATen."""
    shapes: Any = None
    if dynamic_batch is not None:
        batch = Dim("batch", min=dynamic_batch[0], max=dynamic_batch[1])
        shapes = tuple({0: batch} for _ in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(lowered.module, inputs, dynamic_shapes=shapes, strict=False)
        decomposed: ExportedProgram = exported.run_decompositions(decompositions.table())
        return decomposed


def import_module(exported: ExportedProgram) -> tuple[tvm.IRModule, dict[str, Array]]:
    """The Relax module and its weights, in the order of ``main``'s trailing parameters.

    Raises CompileError naming an operator that neither graphopt nor TVM can lower, and the layer it is in.
    """
    importer = _Importer()
    _check_supported(exported, importer)
    custom = {"call_kernel.default": _convert_kernel_call, **CONVERTERS}
    try:
        module = importer.from_exported_program(exported, True, False, False, custom)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(
            f"TVM cannot import the network: {type(error).__name__}: {_last_line(error)}"
        ) from error
    return _weights_last(module, exported)


class _Importer(ExportedProgramImporter):  # type: ignore[misc]  # TVM has no types
    """TVM's importer, which names the operator it fails at, and whose every result has the shape PyTorch says."""

    def create_convert_map(self) -> dict[str, Any]:
        converters = super().create_convert_map()
        return {name: self._checked(convert) for name, convert in converters.items()}

    def update_convert_map(self, custom: dict[str, Any]) -> None:
        super().update_convert_map(
            {name: self._checked(convert) for name, convert in custom.items()}
        )

    def _checked(self, convert: Any) -> Any:
        def run(node: fx.Node, *rest: Any) -> Any:
            try:
                result = convert(node, *rest)
            except Exception as error:
                raise _unsupported(node, f"TVM cannot import it ({_last_line(error)})") from error
            difference = _difference(node.meta.get("val"), result)
            if difference:
                raise _unsupported(node, f"TVM gives {difference}")
            return result

        return run


def _difference(value: Any, result: Any) -> str | None:
    """What the type of a Relax value has that PyTorch's has not."""
    if not isinstance(value, torch.Tensor) or not isinstance(result, relax.Expr):
        return None
    have, want = result.ty, str(value.dtype).removeprefix("torch.")
    if not isinstance(have, relax.TensorType):
        return None
    if str(have.dtype).replace("T.", "") != want:
        return f"{have.dtype} for {want}"
    if have.shape is None:
        return None
    pairs = list(zip(have.shape, value.shape, strict=False))
    static = [(int(a), b) for a, b in pairs if isinstance(b, int) and hasattr(a, "value")]
    if len(have.shape) != value.dim() or any(a != b for a, b in static):
        return f"the shape {list(have.shape)} for {list(value.shape)}"
    return None


def _unsupported(node: fx.Node, reason: str) -> CompileError:
    return CompileError(
        f"operator {node.target} of node {_origin(node)!r} cannot be lowered: {reason}; "
        "replace it in the model by supported operators"
    )


def _last_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _convert_kernel_call(node: fx.Node, importer: Any) -> Any:
    """``graphopt::call_kernel`` as a call of an external function with the result passed in."""
    tensors, name, shape, dtype = importer.retrieve_args(node)
    batch = tensors[0].ty.shape[0]
    result = relax.TensorType((batch, *shape), str(dtype).removeprefix("torch."))
    return importer.block_builder.emit(relax.call_dps_packed(name, tensors, result))


def _check_supported(exported: ExportedProgram, importer: _Importer) -> None:
    known = {*importer.create_convert_map(), *CONVERTERS, "call_kernel.default"}
    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target.__name__ not in known:
            raise _unsupported(node, "neither graphopt nor TVM has a form of it")


def _origin(node: fx.Node) -> str:
    sources = node.meta.get("from_node") or []
    return str(sources[-1].name) if sources else str(node.name)


def _weights_last(
    module: tvm.IRModule, exported: ExportedProgram
) -> tuple[tvm.IRModule, dict[str, Array]]:
    """``main`` as ``main(inputs..., parameters...)``, of which only the inputs are checked at a call."""
    main = module["main"]
    targets = {
        spec.arg.name: spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    tensors = dict(exported.named_parameters())
    parameters = [p for p in main.params if p.name in targets]
    inputs = [p for p in main.params if p.name not in targets]
    weights = {str(targets[p.name]): to_numpy(tensors[targets[p.name]]) for p in parameters}
    attributes: dict[str, Any] = {"global_symbol": "main", "num_input": len(inputs)}
    for key in ("tir_var_lower_bound", "tir_var_upper_bound"):
        if main.attrs and key in main.attrs:
            attributes[key] = main.attrs[key]
    ordered = relax.Function(
        [*inputs, *parameters],
        main.body,
        main.ret_ty,
        main.is_pure,
        tvm.ir.make_node("ir.DictAttrs", **attributes),
    )
    module["main"] = ordered
    return module, weights


@dataclass(frozen=True)
class Built:
    """``library`` is the shared library of a session, ``kernels`` the object file of its kernels, which ``line`` calls;
    ``constants`` are weights behind those of the module."""

    library: bytes
    kernels: bytes
    line: StraightLine
    constants: Mapping[str, Array]


def build_library(
    module: tvm.IRModule,
    functions: Mapping[str, Any],
    target: tvm.target.Target,
    weights: Collection[str],
) -> Built:
    """Compile the Relax module, whose weights are called ``weights``, and the kernels it calls to a shared library."""
    constants, recorder = LiftConstants(weights), Recorder()
    around = (constants.apply,), (recorder.record,)
    pipeline = relax_pipeline(stages, target, functions, *around)
    try:
        with tvm.transform.PassContext(opt_level=3, instruments=[recorder.workspaces]):
            executable = tvm.compile(module, target, relax_pipeline=pipeline)
    except Exception as error:
        last = _last_line(error)
        chip = target.attrs.get("mcpu", target)
        raise CompileError(f"TVM cannot compile the network for {chip}: {last}") from error
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.so"
        try:
            # -s: TVM's debug sections are half of the library (764 kB, 383 kB for EfficientNet-Lite0)
            link = linker(str(target.attrs["mtriple"]))
            executable.export_library(
                str(path), fcompile=link, workspace_dir=folder, options=["-s"]
            )
        except RuntimeError as error:
            raise CompileError(
                "the compiled network could not be linked: install a C++ compiler (g++ or clang++) and try again"
            ) from error
        kernels = without_debug((Path(folder) / _OBJECT).read_bytes())
        return Built(path.read_bytes(), kernels, recorder.line(), constants.lifted)
