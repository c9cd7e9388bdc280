"""A run that kills itself: ``python -m tests.train.resume_child folder step`` (step -1: it is left to finish)."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import graphopt as go
from tests.train.tasks import Mask, capture, net, task


class _Images(Dataset[Any]):
    """Single images, with augmentation by torch's and by Python's random numbers."""

    def __init__(self) -> None:
        batches = task(5, 16)
        self.images = torch.cat([images for images, _ in batches])
        self.labels = torch.cat([labels for _, labels in batches])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.randn(self.images[index].shape) * 0.1
        return self.images[index] * random.uniform(0.9, 1.1) + noise, int(self.labels[index])


class _Killer:
    """Prunes a little more at each step, and ends the process without a goodbye before step ``at``."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, program: go.Program, step: int) -> float:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        weight = program.graph_module.get_parameter("second.weight").detach().abs()
        share = 0.02 * step
        mask = program.graph_module.get_buffer("second.weight_mask")
        if step < 12:
            mask.copy_(weight >= weight.flatten().quantile(share))
        return share


def main(folder: Path, at: int) -> None:
    torch.set_num_threads(1)
    own = torch.Generator().manual_seed(4)
    loader = DataLoader(_Images(), batch_size=16, shuffle=True, generator=own)
    program = Mask()(capture(net()))
    trained = go.fine_tune(
        program,
        loader,
        epochs=4,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=20),
        scheduler_every="step",
        pruner=_Killer(at),
        validation=task(2, seed=9),
        patience=3,
        checkpoint=folder / "run.checkpoint",
        checkpoint_every=2,
        log=folder / "run.jsonl",
        seed=7,
    )
    torch.save(dict(trained.graph_module.state_dict()), folder / "trained.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
