"""The emitted graph becomes a Relax module, and that a shared library.

Relax sees our kernels as external functions with their results passed in: it plans their memory, and its passes, which
expect scheduled blocks, never look inside. Everything else is imported as TVM imports ATen, legalized and fused. The network's inputs are the leading parameters of
``main``, its weights the trailing ones: the shapes of what ``num_input`` does not count are not checked at every call
(0.7 us a weight: 0.1 ms for MobileNetV2).
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from graphopt.backends.lower.emit import Lowered
from graphopt.errors import CompileError

log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]


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
        decomposed: ExportedProgram = exported.run_decompositions()
        return decomposed


def import_module(exported: ExportedProgram) -> tuple[tvm.IRModule, dict[str, Array]]:
    """The Relax module and its weights, in the order of ``main``'s trailing parameters.

    Raises CompileError naming an operator that neither graphopt nor TVM can lower, and the layer it is in.
    """
    _check_supported(exported)
    try:
        module = ExportedProgramImporter().from_exported_program(
            exported, True, False, False, {"call_kernel.default": _convert_kernel_call}
        )
    except Exception as error:
        raise CompileError(
            f"TVM cannot import the network: {type(error).__name__}: {error}"
        ) from error
    return _weights_last(module, exported)


def _convert_kernel_call(node: fx.Node, importer: Any) -> Any:
    """``graphopt::call_kernel`` as a call of an external function with the result passed in."""
    tensors, name, shape, dtype = importer.retrieve_args(node)
    batch = tensors[0].ty.shape[0]
    result = relax.TensorType((batch, *shape), str(dtype).removeprefix("torch."))
    return importer.block_builder.emit(relax.call_dps_packed(name, tensors, result))


def _check_supported(exported: ExportedProgram) -> None:
    known = set(ExportedProgramImporter().create_convert_map()) | {"call_kernel.default"}
    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target.__name__ not in known:
            raise CompileError(
                f"operator {node.target} of node {_origin(node)!r} cannot be lowered: neither graphopt nor TVM "
                "has a form of it; replace it in the model by supported operators"
            )


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
    weights = {str(targets[p.name]): tensors[targets[p.name]].detach().numpy() for p in parameters}
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


def _pipeline(target: tvm.target.Target, functions: Mapping[str, Any]) -> Any:
    """TVM's CPU pipeline, after which the kernels join the module."""
    default = relax.get_default_pipeline(target)

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def run(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        module = default(module)
        for name, function in functions.items():
            module[name] = function
        return module

    return run


def build_library(
    module: tvm.IRModule, functions: Mapping[str, Any], target: tvm.target.Target
) -> bytes:
    """Compile the Relax module and the kernels it calls to a shared library and return its bytes."""
    try:
        with tvm.transform.PassContext(opt_level=3):
            executable = tvm.compile(module, target, relax_pipeline=_pipeline(target, functions))
    except Exception as error:
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        chip = target.attrs.get("mcpu", target)
        raise CompileError(f"TVM cannot compile the network for {chip}: {last}") from error
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.so"
        try:
            # -s: TVM's debug sections are half of the library (764 kB, 383 kB for EfficientNet-Lite0)
            executable.export_library(str(path), options=["-s"])
        except RuntimeError as error:
            raise CompileError(
                "the compiled network could not be linked: install a C++ compiler (g++ or clang++) and try again"
            ) from error
        return path.read_bytes()
