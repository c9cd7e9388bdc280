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
_FEW = 8  # batches that scores, least squares and calibration look at


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

    def options(self, key: str, rate: float, times: int) -> dict[str, Any]:
        """How a compressed network trains: SGD with a cosine, resumed after an interruption."""
        epochs = times * self.epochs
        return {
            "epochs": epochs,
            "optimizer": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=2e-4),
            "scheduler": lambda optimizer: schedule(optimizer, epochs),
            "clip_norm": 5.0,
            "checkpoint": self.folder / f"{key}.checkpoint",
        }


Make = Callable[[Bench], go.Program]
Recover = Callable[[Bench, str, go.Program], go.Program]


def fine_tune(rate: float = 0.03, times: int = 1) -> Recover:
    """Learn from the labels, ``times`` the usual epochs."""
    return lambda bench, key, program: go.fine_tune(
        program, bench.learning, **bench.options(key, rate, times)
    )


def distill(rate: float = 0.1, times: int = 4) -> Recover:
    """Learn from the labels and from what the whole network says."""
    return lambda bench, key, program: go.distill(
        program, bench.network, bench.learning, 0.3, 4.0, **bench.options(key, rate, times)
    )


def _gradually(prune: passes.Prune) -> Recover:
    def recover(bench: Bench, key: str, program: go.Program) -> go.Program:
        pruner = passes.GradualPruner(prune)
        return go.fine_tune(program, bench.learning, pruner=pruner, **bench.options(key, 0.05, 2))

    return recover


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
    """Blocks of four pruned and recovered, then int8, which the row's distillation trains."""
    pruned = _pruned(passes.Block(), 0.8)(bench)
    return _integer(bench, distill()(bench, "chain-pruned", pruned))


def _squeeze(bench: Bench) -> go.Pass:
    """Fire modules in place of all 3 x 3 layers but the first."""
    return passes.SqueezeSubstitute(exclude=("0",), calibration=bench.calibration)


def _fire(bench: Bench) -> go.Program:
    """Fire modules, and half a linear layer: of what they leave, it holds six parts of seven."""
    return passes.LowRankLinear(rank={"parameters": 0.5})(_squeeze(bench)(bench.network))


_GRADUAL = passes.Prune(schedule=passes.Gradual(0.9, updates=28, every=50))
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
        "prune: elements, 90 %",
        _pruned(passes.Element(), 0.9),
        distill(),
        Goal(0.5, parameters=0.1),
    ),
    "prune-block": Row(
        "prune: 1x4 blocks, 80 %",
        _pruned(passes.Block(), 0.8),
        distill(),
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
    "prune-gradual": Row(
        "prune: elements, 90 %, gradually",
        lambda bench: _GRADUAL(bench.network),
        _gradually(_GRADUAL),
    ),
    "chain": Row(
        "1x4 blocks 80 %, int8, distilled", _chain, distill(0.005, 1), Goal(0.7, parameters=0.2)
    ),
}
