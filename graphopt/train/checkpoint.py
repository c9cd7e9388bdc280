"""Checkpoints: one file, replaced atomically, from which a killed run goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import TrainError
from graphopt.files import atomic_write
from graphopt.program import Program

_VERSION = 1


def tensors(program: Program) -> dict[str, torch.Tensor]:
    """Every parameter and buffer that the program reads, by its path, in the graph's order."""
    nodes = [node for node in program.graph.nodes if node.op == "get_attr"]
    return {str(node.target): program.tensor(node) for node in nodes}


def values(program: Program) -> dict[str, torch.Tensor]:
    """A copy of ``tensors``."""
    return {name: tensor.detach().clone() for name, tensor in tensors(program).items()}


def restore_values(program: Program, saved: Mapping[str, torch.Tensor]) -> None:
    """Write a copy of ``values`` back, in place, so that an optimizer's references hold."""
    with torch.no_grad():
        for name, tensor in tensors(program).items():
            tensor.copy_(saved[name])


def fingerprint(program: Program) -> str:
    """A hash of the graph's code and of every weight."""
    return digest(tensors(program), program.graph_module.code)


def digest(named: Mapping[str, Any], code: str = "") -> str:
    """A hash of tensors by name, and of ``code``; what is no tensor in a module's state is passed over."""
    found = hashlib.blake2b(code.encode(), digest_size=16)
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()


class Checkpoint:
    """``identity`` says which run it is: a file of another one is refused, naming what differs."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)

    def load(self) -> dict[str, Any] | None:
        """What the last ``save`` was given, or None where there is no file. Runs no code of the file's.

        Raises TrainError for a file that is damaged or of another run.
        """
        if not self.path.exists():
            return None
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True)
            version, identity, state = held["version"], held["identity"], held["state"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TrainError(
                f"checkpoint {self.path} cannot be read ({reason}); delete it to start anew"
            ) from error
        if version != _VERSION:
            raise TrainError(
                f"checkpoint {self.path} has version {version}; delete it to start anew"
            )
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise TrainError(
                    f"checkpoint {self.path} is of another run: its {key} is {identity.get(key)!r}, "
                    f"not {value!r}; delete it or give another path"
                )
        return dict(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file. Raises TrainError where that cannot be done."""
        held = {"version": _VERSION, "identity": self.identity, "state": dict(state)}
        try:
            with atomic_write(self.path) as file:
                torch.save(held, file)
        except OSError as error:
            raise TrainError(
                f"checkpoint {self.path} cannot be written: {error.strerror}"
            ) from error
