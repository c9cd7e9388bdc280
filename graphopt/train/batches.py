"""Batches: what one holds, and the way through the data that a resumed run takes again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import InputError, TrainError
from graphopt.program import Program
from graphopt.train import rng


def split(batch: Any, where: str) -> tuple[tuple[Any, ...], Any]:
    """``(inputs, labels)``; inputs are the program's arguments, labels None where there are none.

    A batch is ``(inputs, labels)``, inputs a tensor or a tuple of them, or the inputs alone (a tensor, a tuple of one).
    """
    if isinstance(batch, Tensor):
        return (batch,), None
    if (
        isinstance(batch, Mapping)
        or not isinstance(batch, tuple | list)
        or not 1 <= len(batch) <= 2
    ):
        what = f"{len(batch)} things" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TrainError(f"{where} is {what}; give (inputs, labels), inputs a tensor or a tuple")
    inputs, labels = batch if len(batch) == 2 else (batch[0], None)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), labels


def to_device(values: Any, device: torch.device) -> Any:
    """Every tensor of a batch where the program is."""
    return pytree.tree_map_only(Tensor, lambda value: value.to(device), values)


def check(program: Program, inputs: tuple[Any, ...], where: str) -> None:
    """Raise TrainError where the inputs do not fit the program."""
    try:
        program.check_inputs(*inputs)
    except InputError as error:
        advice = ""
        if "dimension 0" in str(error) or "a batch of" in str(error):
            advice = (
                "; capture with dynamic_batch=(low, high), or leave the last, smaller batch out"
            )
        raise TrainError(f"{where}: {error}{advice}") from error


def size(inputs: tuple[Any, ...]) -> int:
    """How many samples a batch holds."""
    first = next((leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    return int(first.shape[0]) if first is not None and first.dim() else 1


def length(data: Any) -> int | None:
    """How many batches an epoch has, where the data says so."""
    try:
        return len(data)
    except TypeError:  # a DataLoader of an iterable dataset has the method and no answer
        return None


class Epoch:
    """One way through the data, from its start or from where a checkpoint was written.

    Torch's, Python's and NumPy's generators are seeded for the epoch, so that a shuffling loader takes the same order
    again; generators of the loader's own get back the states that they had. What was seen is read and passed over.
    """

    def __init__(self, data: Any, seed: int, epoch: int, resumed: Mapping[str, Any] | None) -> None:
        self._data = data
        self._seed = seed
        self._epoch = epoch
        self._resumed = resumed
        self._generators = _generators(data)
        if resumed is not None:
            for generator, state in zip(self._generators, resumed["generators"], strict=False):
                generator.set_state(state)
        self.started_from = self.generators()

    def generators(self) -> list[Tensor]:
        """The states of the loader's own generators, now."""
        return [generator.get_state() for generator in self._generators]

    def __iter__(self) -> Iterator[Any]:
        set_epoch = getattr(getattr(self._data, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)
        rng.seed_epoch(self._seed, self._epoch)
        left = iter(self._data)
        passed_over = 0 if self._resumed is None else self._resumed["position"]
        for position in range(passed_over):
            if next(left, left) is left:
                raise TrainError(
                    f"the data holds {position} batch(es) and the checkpoint was written after "
                    f"{passed_over}; resume with the same data"
                )
        if self._resumed is not None and passed_over:
            rng.restore(self._resumed["rng"])
        yield from left


def _generators(data: Any) -> list[torch.Generator]:
    """Those of a DataLoader and its sampler, each once."""
    owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
