"""The rows of the compression benchmark: a rewrite of the network, how it learns again, and what it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fashion import Batches, Images, schedule, trained

import graphopt as go
from graphopt import passes

EPOCHS = 2  # of training after a rewrite; rows with a goal take four times as many
_UPDATES = 40  # of masks that move while a network learns
_FEW = 8  # batches that scores, least squares and calibration look at


class Compiled(torch.nn.Module):
    """A compiled file as a module: as a teacher it takes two thirds of the time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = go.load(path)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session(images.numpy()))


@dataclass
class Bench:
    """The network, its data, and where results are kept."""

    folder: Path
    epochs: int = EPOCHS

    @cached_property
    def network(self) -> go.Program:
        return trained(self.folder)

    @cached_property
    def learning(self) -> Batches:
        return Batches(Images.read("train"), augment=True)

    @cached_property
    def few(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Some batches of inputs and labels."""
        images = Images.read("train")
        count = _FEW * 128
        return list(Batches(Images(images.pixels[:count], images.labels[:count])))

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        return [inputs for inputs, _ in self.few]

    @cached_property
    def test(self) -> Images:
        return Images.read("t10k")

    @cached_property
    def teacher(self) -> Compiled:
        """The whole network as its row left it."""
        return Compiled(self.folder / "float.gopt")

    def options(self, key: str, rate: float, times: int) -> dict[str, Any]:
        """How a compressed network trains: SGD with a cosine, resumed after an interruption."""
        epochs = times * self.epochs
        steps = epochs * len(self.learning)
        return {
            "epochs": epochs,
            "optimizer": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=2e-4),
            "scheduler": lambda optimizer: schedule(optimizer, steps),
            "scheduler_every": "step",
            "clip_norm": 5.0,
            "checkpoint": self.folder / f"{key}.checkpoint",
        }


Make = Callable[[Bench], go.Program]
Recover = Callable[[Bench, str, go.Program], go.Program]
MakePrune = Callable[[Bench], passes.Prune]


def fine_tune(rate: float = 0.03, times: int = 1) -> Recover:
    """Learn from the labels, ``times`` the usual epochs."""

    def recover(bench: Bench, key: str, program: go.Program) -> go.Program:
        return go.fine_tune(_undropped(program), bench.learning, **bench.options(key, rate, times))

    return recover


def distill(rate: float = 0.05, times: int = 4, prune: MakePrune | None = None) -> Recover:
    """Learn from the labels and from what the whole network says, while ``prune`` moves its masks."""

    def recover(bench: Bench, key: str, program: go.Program) -> go.Program:
        options = bench.options(key, rate, times)
        if prune is not None:
            options["pruner"] = passes.GradualPruner(prune(bench))
        return go.distill(_undropped(program), bench.teacher, bench.learning, 0.3, 4.0, **options)

    return recover


def _undropped(program: go.Program) -> go.Program:
    """Without dropout, which a network with a third of the weights does not need."""
    return passes.RemoveIdentities()(program)


def gradually(granularity: Any, sparsity: float, times: int = 4) -> MakePrune:
    """Masks that move in the first half of so long a training."""

    def make(bench: Bench) -> passes.Prune:
        half = times * bench.epochs * len(bench.learning) // 2
        updates = min(_UPDATES, half)
        schedule = passes.Gradual(sparsity, updates=updates, every=half // updates)
        return passes.Prune(schedule=schedule, granularity=granularity)

    return make


@dataclass(frozen=True)
class Goal:
    """At most ``drop`` points of accuracy lost, and at most these shares of the network's left."""

    drop: float
    parameters: float = 1.0
    macs: float = 1.0

    def __str__(self) -> str:
        shares = [("parameters", self.parameters), ("MACs", self.macs)]
        texts = [f"{1 / share:.3g}x fewer {name}" for name, share in shares if share < 1]
        return ", ".join([f"-{self.drop:g}", *texts])


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    make: Make
    recover: Recover | None = field(default_factory=fine_tune)
    goal: Goal | None = None

    def recovered(self, bench: Bench, key: str, program: go.Program) -> go.Program:
        return program if self.recover is None else self.recover(bench, key, program)


def _pass(make: Callable[[Bench], go.Pass]) -> Make:
    return lambda bench: make(bench)(bench.network)


def _pruned(granularity: Any, sparsity: float, **options: Any) -> Make:
    schedule = options.pop("schedule", None) or passes.Global(sparsity)
    return _pass(
        lambda bench: passes.Prune(
            schedule=schedule,
            granularity=granularity,
            calibration=bench.calibration,
            data=bench.few,
            **options,
        )
    )


def _integer(bench: Bench, program: go.Program) -> go.Program:
    """Masks stay: what is pruned is 0 in int8 too."""
    folded = go.passes.FoldBatchNorm()(program)
    return passes.Quantize(calibration=bench.calibration)(folded)


def _chain(bench: Bench) -> go.Program:
    """What the row of blocks left in int8, which the row's own distillation trains."""
    blocks = ROWS["prune-block"]
    return _integer(bench, blocks.recovered(bench, "prune-block", blocks.make(bench)))


def _squeeze(bench: Bench) -> go.Pass:
    """Fire modules in place of all 3 x 3 layers but the first."""
    return passes.SqueezeSubstitute(squeeze=0.375, exclude=("0",), calibration=bench.calibration)


def _fire(bench: Bench) -> go.Program:
    """Fire modules, and half a linear layer: of what they leave, it holds six parts of seven."""
    return passes.LowRankLinear(rank={"parameters": 0.5})(_squeeze(bench)(bench.network))


_ELEMENTS = gradually(passes.Element(), 0.9)
_BLOCKS = gradually(passes.Block(), 0.8)
_THIRD = {"macs": 1 / 3}

ROWS: Mapping[str, Row] = {
    "float": Row("whole network", lambda bench: bench.network, None),
    "int8": Row("quantize", lambda bench: _integer(bench, bench.network), None),
    "low-rank-linear": Row(
        "low-rank-linear", _pass(lambda b: passes.LowRankLinear(rank={"parameters": 0.6}))
    ),
    "spatial-svd": Row(
        "spatial-svd",
        _pass(lambda b: passes.SpatialSvd(rank=_THIRD, calibration=b.calibration)),
        distill(),
        Goal(0.7, macs=1 / 3),
    ),
    "tucker-conv": Row(
        "tucker-conv",
        _pass(lambda b: passes.TuckerConv(rank=_THIRD)),
        distill(),
        Goal(0.7, macs=1 / 3),
    ),
    "cp-conv": Row("cp-conv", _pass(lambda b: passes.CpConv(rank=_THIRD))),
    "flattened-conv": Row(
        "flattened-conv", _pass(lambda b: passes.FlattenedConv(rank={"macs": 0.5}))
    ),
    "depthwise-separable": Row(
        "depthwise-separable",
        _pass(lambda b: passes.DepthwiseSeparable(rank=1, calibration=b.calibration)),
    ),
    "squeeze-substitute": Row("squeeze-substitute", _pass(_squeeze)),
    "fire-low-rank": Row(
        "squeeze-substitute, low-rank-linear", _fire, distill(), Goal(1.0, parameters=1 / 3)
    ),
    "one-by-one-substitute": Row(
        "one-by-one-substitute",
        _pass(lambda b: passes.OneByOneSubstitute(share=0.5, calibration=b.calibration)),
    ),
    "inception-factorize": Row(
        "inception-factorize",
        _pass(lambda b: passes.InceptionFactorize(calibration=b.calibration)),
    ),
    "prune-element": Row(
        "prune: elements, 90 %, gradually",
        _pass(_ELEMENTS),
        distill(prune=_ELEMENTS),
        Goal(0.5, parameters=0.1),
    ),
    "prune-block": Row(
        "prune: 1x4 blocks, 80 %, gradually",
        _pass(_BLOCKS),
        distill(prune=_BLOCKS),
        Goal(0.5, parameters=0.2),
    ),
    "prune-2-4": Row("prune: 2:4", _pruned(passes.NM(), 0.5, schedule=passes.PerLayer())),
    "prune-filter": Row(
        "prune: filters, 30 %, by batch norm",
        _pruned(passes.Filter(), 0.3, score=passes.BatchNormScale()),
    ),
    "prune-channel": Row(
        "prune: channels, by Taylor",
        _pruned(passes.Channel(multiple=4), 0.5, score=passes.Taylor()),
        distill(),
        Goal(0.5, macs=0.5),
    ),
    "prune-obd": Row(
        "prune: elements, 90 %, OBD", _pruned(passes.Element(), 0.9, score=passes.Obd())
    ),
    "prune-activation": Row(
        "prune: channels, by activation",
        _pruned(passes.Channel(multiple=4), 0.5, score=passes.Activation()),
    ),
    "prune-sensitivity": Row(
        "prune: elements, 90 %, by sensitivity",
        _pruned(passes.Element(), 0.9, schedule=passes.Sensitivity(0.9)),
    ),
    "prune-once": Row("prune: elements, 90 %, at once", _pruned(passes.Element(), 0.9)),
    "chain": Row(
        "1x4 blocks 80 %, int8, distilled", _chain, distill(0.005, 1), Goal(0.7, parameters=0.2)
    ),
}
