"""A model by name: ``package.module:factory``, a ``.pt2``, or a ``.safetensors`` with a factory.

``.pt2`` and pickles run code when they are read, so they are refused unless the caller trusts them. A program saved
here keeps its history and batch range beside the graph, and ``read_program`` brings both back.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError, InputError
from graphopt.files import atomic_write
from graphopt.frontend import capture
from graphopt.program import LayerChange, Program, Record
from graphopt.torchvision_import import torchvision_models

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
_NOTES = "graphopt.json"
_WITH_TORCHVISION = ("torchvision", "timm", "pytorchcv")


@dataclass(frozen=True)
class InputSpec:
    """One input's shape and dtype, written ``1x3x224x224`` or ``1x128:int64``."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Raises InputError for anything but positive sizes and a dtype that torch has."""
        sizes, _, name = text.partition(":")
        dtype = getattr(torch, name or "float32", None)
        try:
            shape = tuple(int(size) for size in sizes.lower().split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
            raise InputError(
                f"input shape {text!r} must look like 1x3x224x224 or, with a dtype, 1x128:int64"
            )
        return cls(shape, dtype)

    def example(self, generator: torch.Generator) -> torch.Tensor:
        """Standard normal values; ones for integers and booleans, so that every index is valid."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        return torch.ones(self.shape, dtype=self.dtype)


def example_inputs(specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """A tensor for each spec; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    return tuple(spec.example(generator) for spec in specs)


def factory(reference: str) -> Callable[..., Any]:
    """The callable that ``package.module:factory`` names; the current folder is looked in first.

    Raises InputError where the module or the name is missing; an error inside the module is named with it.
    """
    module_name, colon, attribute = reference.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"{reference!r} must look like package.module:factory")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if module_name.partition(".")[0] in _WITH_TORCHVISION:
            with contextlib.suppress(ImportError):
                torchvision_models()
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{reference!r}: no module named {error.name!r} in {folder} or installed"
        ) from error
    except Exception as error:
        raise InputError(
            f"{reference!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise InputError(f"{reference!r}: {module_name} has no {attribute!r}")
        value = getattr(value, part)
    if not callable(value):
        raise InputError(f"{reference!r} is no function or class, but {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def load_model(
    reference: str, *, weights: str | None = None, trust: bool = False
) -> torch.nn.Module | ExportedProgram:
    """The module (in eval mode) or ExportedProgram that ``reference`` names.

    ``reference`` is ``package.module:factory``, a ``.pt2``, or a pickled module (``.pt``, ``.pth``); ``weights`` is a
    ``.safetensors`` (or, with ``trust``, a pickled state dict) for the factory's module. Raises InputError where a
    file or name is missing, does not fit, or would run code and ``trust`` is False.
    """
    if reference.endswith(".safetensors"):
        raise InputError(
            f"{reference} holds weights alone; name the model as package.module:factory and give the file as weights"
        )
    if ":" not in reference and _suffix(reference) not in (".pt2", *_PICKLES):
        raise InputError(
            f"model {reference!r} must be package.module:factory, a .pt2 or a pickled module (.pt, .pth)"
        )
    if _suffix(reference) == ".pt2":
        _refuse_weights(reference, weights)
        return _read_exported(Path(reference), trust)[0]
    if _suffix(reference) in _PICKLES:
        _refuse_weights(reference, weights)
        return _as_module(reference, _unpickle(Path(reference), trust))
    try:
        made = factory(reference)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{reference!r} failed: {type(error).__name__}: {error}") from error
    model = _as_module(reference, made)
    if weights is not None:
        _fill(model, reference, Path(weights), trust)
    return model


def read_program(
    reference: str,
    specs: Sequence[InputSpec] = (),
    *,
    weights: str | None = None,
    dynamic_batch: tuple[int, int] | None = None,
    trust: bool = False,
) -> Program:
    """``load_model``, captured on ``specs``; a ``.pt2`` brings its own inputs and what ``save_program`` noted.

    Raises InputError as ``load_model``, and where a module is given no specs; CaptureError as ``capture``.
    """
    if _suffix(reference) == ".pt2":
        return _read_saved(reference, specs, weights, dynamic_batch, trust)
    model = load_model(reference, weights=weights, trust=trust)
    if not specs:
        raise InputError(
            f"model {reference!r} needs the shape of each input, as in --input-shape 1x3x224x224"
        )
    return capture(model, example_inputs(specs), dynamic_batch)


def save_program(program: Program, path: str | Path) -> None:
    """Write the program as an ExportedProgram (``.pt2``) that plain PyTorch loads, whole or not at all.

    Raises CaptureError where torch.export cannot take the compressed graph, and OSError as writing does.
    """
    shapes: Any = None
    if program.dynamic_batch is not None:
        low, high = program.dynamic_batch
        batch = Dim("batch", min=low, max=high)
        shapes = pytree.tree_map_only(torch.Tensor, lambda _: {0: batch}, program.example_inputs)
    notes = {
        "dynamic_batch": program.dynamic_batch,
        "history": [{**record.to_json(), "seconds": record.seconds} for record in program.history],
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                program.graph_module, program.example_inputs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CaptureError(f"the program cannot be exported to {path}: {reason[0]}") from error
    with atomic_write(Path(path)) as file:
        torch.export.save(exported, file, extra_files={_NOTES: json.dumps(notes)})


def _suffix(reference: str) -> str:
    return "" if ":" in reference else Path(reference).suffix.lower()


def _refuse_weights(reference: str, weights: str | None) -> None:
    if weights is not None:
        raise InputError(f"{reference} holds its own weights; give weights with a factory only")


def _checked_file(path: Path, trust: bool) -> Path:
    if not path.is_file():
        raise InputError(f"model file {path} does not exist")
    if not trust:
        raise InputError(
            f"{path} can run code when it is read; add --trust (trust=True) if you know where it comes from"
        )
    return path


def _read_exported(path: Path, trust: bool) -> tuple[ExportedProgram, dict[str, Any]]:
    _checked_file(path, trust)
    extra = {_NOTES: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(path, extra_files=extra)
        notes = json.loads(extra[_NOTES]) if extra[_NOTES] else {}
    except Exception as error:
        raise InputError(
            f"{path} is no ExportedProgram that this torch reads: {type(error).__name__}"
        ) from error
    return exported, notes


def _read_saved(
    reference: str,
    specs: Sequence[InputSpec],
    weights: str | None,
    dynamic_batch: tuple[int, int] | None,
    trust: bool,
) -> Program:
    _refuse_weights(reference, weights)
    if specs or dynamic_batch:
        raise InputError(
            f"{reference} holds its input shapes and batch range; leave out --input-shape and --dynamic-batch"
        )
    exported, notes = _read_exported(Path(reference), trust)
    bounds = notes.get("dynamic_batch")
    program = capture(exported, dynamic_batch=tuple(bounds) if bounds else None)
    for record in notes.get("history", ()):
        program = program.with_record(_record(record))
    return program


def _record(entry: dict[str, Any]) -> Record:
    return Record(
        name=entry["pass"],
        options=entry["options"],
        contract=entry["contract"],
        rewrites=entry["rewrites"],
        declines=tuple((item["node"], item["reason"]) for item in entry["declines"]),
        parameters=tuple(entry["parameters"]),
        macs=tuple(entry["macs"]),
        error=entry["error"],
        seconds=entry["seconds"],
        notes=tuple(entry["notes"]),
        layers=tuple(_layer_change(item) for item in entry.get("layers", ())),
    )


def _layer_change(entry: dict[str, Any]) -> LayerChange:
    return LayerChange(
        **{**entry, "parameters": tuple(entry["parameters"]), "macs": tuple(entry["macs"])}
    )


def _unpickle(path: Path, trust: bool) -> Any:
    _checked_file(path, trust)
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _as_module(reference: str, value: Any) -> torch.nn.Module:
    if not isinstance(value, torch.nn.Module):
        raise InputError(f"{reference!r} gives {type(value).__name__}, not a torch.nn.Module")
    return value.eval()


def _fill(model: torch.nn.Module, reference: str, path: Path, trust: bool) -> None:
    """Load every tensor of ``path`` into ``model``; names and shapes must agree."""
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            state: Any = safetensors.torch.load_file(path)
        except Exception as error:
            raise InputError(f"{path} is no valid safetensors file: {error}") from error
    else:
        state = _unpickle(path, trust)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit the model of {reference!r}: {reason}") from error
