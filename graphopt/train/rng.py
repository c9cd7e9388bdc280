"""The random numbers of a run: its own, from its seed, saved with it; the caller's generators are given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_EPOCHS_APART = 1_000_003  # so that runs of neighbouring seeds share no epoch's numbers


def seed_epoch(seed: int, epoch: int) -> None:
    """Start an epoch's numbers: shuffling, augmentation and dropout. ``torch.manual_seed(seed)`` for the first."""
    number = seed + _EPOCHS_APART * epoch
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def snapshot() -> dict[str, Any]:
    """The state of the generators of torch, Python and NumPy, as a checkpoint holds it."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy = (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": numpy,
    }


def restore(state: dict[str, Any]) -> None:
    """Go on from a ``snapshot``."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([values.cpu() for values in state["cuda"]])
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))


@contextmanager
def preserved() -> Iterator[None]:
    """Give the caller's generators back as they were."""
    before = snapshot()
    try:
        yield
    finally:
        restore(before)
