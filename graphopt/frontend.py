"""``capture``: an ``nn.Module`` or ``ExportedProgram`` becomes a ``Program`` of functional ATen ops."""

from __future__ import annotations

import inspect
import linecache
import logging
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.canonicalize import canonicalize
from graphopt.edit import graph_mode, propagate
from graphopt.errors import CaptureError
from graphopt.functionalize import functionalize
from graphopt.modes import is_training
from graphopt.program import Program

log = logging.getLogger(__name__)
_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
_TORCH = Path(torch.__file__).parent
# torch.export writes these after a cast; the verifier checks every dtype itself.
_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)
_KEPT_META = ("val", "nn_module_stack", "stack_trace")


def capture(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    dynamic_batch: tuple[int, int] | None = None,
) -> Program:
    """Trace ``model`` on ``example_inputs`` and return it as a ``Program``.

    The model is captured in the mode that it is in (``model.eval()`` first for inference); ``program.train()`` and
    ``program.eval()`` switch it. Attention forgets its dropout rate in evaluation: to train with it, capture in training
    mode. ``dynamic_batch=(low, high)`` leaves dimension 0 of every input open within that inclusive range, as training on
    batches needs. An ``ExportedProgram`` brings its own inputs.

    Raises CaptureError, naming the line of the model at which tracing stopped and what to change.
    """
    if isinstance(model, ExportedProgram):
        exported, inputs = model, _inputs_of(model, example_inputs)
    else:
        inputs = _as_tuple(example_inputs)
        exported, inputs = _export(model, inputs, dynamic_batch)
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module = functionalize(exported, module)
    canonicalize(module)
    for node in module.graph.nodes:
        kept = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        node.meta = {**kept, "provenance": (node.name,)}
        if "val" not in kept and node.op == "call_function":
            node.meta["val"] = propagate(node, graph_mode(module.graph))
    _remove_dead(module)
    module.training = is_training(module.graph) or getattr(model, "training", False)
    program = Program(module, inputs, dynamic_batch).clone()
    for node in program.inputs:
        if not isinstance(node.meta["val"], torch.Tensor):
            raise CaptureError(
                f"input {node.name!r} must be a torch.Tensor; bind other values in the model"
            )
        if not node.meta["val"].numel():
            raise CaptureError(f"input {node.name!r} has no elements; give an example that has")
    return program


def _as_tuple(example_inputs: Sequence[Any] | torch.Tensor | None) -> tuple[Any, ...]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if not example_inputs:
        raise CaptureError(
            "capture needs example_inputs: a tuple of the model's positional arguments"
        )
    return tuple(example_inputs)


def _inputs_of(
    exported: ExportedProgram, given: Sequence[Any] | torch.Tensor | None
) -> tuple[Any, ...]:
    if given is not None:
        return _as_tuple(given)
    if exported.example_inputs is None:
        raise CaptureError("the ExportedProgram holds no example inputs; pass example_inputs")
    return tuple(exported.example_inputs[0])


def _export(
    model: torch.nn.Module, inputs: tuple[Any, ...], dynamic_batch: tuple[int, int] | None
) -> tuple[ExportedProgram, tuple[Any, ...]]:
    shapes: Any = None
    if dynamic_batch is not None:
        low, high = dynamic_batch
        if not 1 <= low < high:
            raise CaptureError(
                f"dynamic_batch must be (low, high) with 1 <= low < high, not {dynamic_batch}"
            )
        # torch specialises a dimension whose example size is 1: trace with two images.
        inputs = pytree.tree_map_only(torch.Tensor, lambda t: _at_least_two(t, high), inputs)
        batch = Dim("batch", min=low, max=high)
        try:
            named = inspect.signature(model.forward).bind(*inputs).arguments
        except TypeError as error:
            raise _explained(model, inputs, error) from None
        shapes = pytree.tree_map_only(torch.Tensor, lambda _: {0: batch}, dict(named))
    try:
        return _traced(model, inputs, shapes), inputs
    except Exception as error:
        with suppress(Exception), torch.no_grad():
            # Autograd forbids some writes (to a chunk, through out=) that inference allows.
            return _traced(model, inputs, shapes), inputs
        log.debug("torch.export failed", exc_info=error)
        # its own trace is hundreds of lines of torch
        raise _explained(model, inputs, error) from None


def _traced(model: torch.nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """``torch.export`` without its log, which says at length what CaptureError says in a line."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _at_least_two(tensor: torch.Tensor, high: int) -> torch.Tensor:
    if tensor.dim() == 0:
        raise CaptureError(
            "dynamic_batch needs inputs with a batch dimension; a scalar tensor was given"
        )
    if tensor.shape[0] >= 2 and tensor.shape[0] <= high:
        return tensor
    return tensor[:1].expand(2, *tensor.shape[1:]).contiguous()


def _explained(model: torch.nn.Module, inputs: tuple[Any, ...], error: Exception) -> CaptureError:
    """The error of torch.export, with the line of the user's model at which it arose."""
    name = type(model).__name__
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    advice = _advice(model, inputs, error)
    if not frames:
        return CaptureError(f"{name} cannot be captured: {reason}; {advice}")
    frame = frames[-1]
    source = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return CaptureError(
        f"{name} cannot be captured at {frame.filename}:{frame.lineno}, in {frame.name}, `{source}`: {reason}; {advice}"
    )


def _is_users(filename: str) -> bool:
    path = Path(filename)
    return (
        _TORCH not in path.parents and path != Path(__file__) and not filename.startswith("<frozen")
    )


def _advice(model: torch.nn.Module, inputs: tuple[Any, ...], error: Exception) -> str:
    """What to change, by the kind of failure."""
    try:
        with torch.no_grad():
            model(*pytree.tree_map_only(torch.Tensor, torch.clone, inputs))
    except Exception:
        return "the model itself fails on example_inputs: check their number, shapes and dtypes"
    text = f"{type(error).__name__}: {error}"
    if "DataDependent" in text or "data-dependent" in text or "unbacked" in text.lower():
        return "the branch or size depends on tensor values: use torch.where or a fixed size"
    if "Constraints violated" in text or "specialized" in text or "marked batch as dynamic" in text:
        return "the model fixes the batch size: drop dynamic_batch or write the line for any batch"
    return "rewrite the line with traceable tensor operations"


def _remove_dead(module: fx.GraphModule) -> None:
    """Drop calls and parameters that nothing reads (``num_batches_tracked``, unused results)."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and (node.target in _ASSERTIONS or not ops.has_effect(node)):
            module.graph.erase_node(node)
    module.recompile()
