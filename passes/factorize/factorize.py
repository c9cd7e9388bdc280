"""What all factorizations share: which layers, at which ranks, into which nodes, with which error."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from graphopt import ops
from graphopt.contract import Contract, lossy
from graphopt.edit import Build, Edit
from graphopt.errors import PassError
from graphopt.passes import layer as layers_of
from graphopt.passes.factorize.decomposition import Decomposition, Stage, compose, relative
from graphopt.passes.factorize.ranks import Array, Cost, Rank, Ranks, RankSpec, rank_text
from graphopt.passes.factorize.weighting import Activations
from graphopt.passes.patches import each, sample_patches
from graphopt.passing import Pass

FACTOR = "_factor_"  # in the name of a parameter that a factorization made


@dataclass
class Layer:
    """A layer that may be factored: its node, its weight in float64, and its inputs on data where there are any."""

    node: fx.Node
    weight: Tensor
    activations: Activations | None = None

    @property
    def before(self) -> Cost:
        return Cost(self.weight.numel(), ops.macs(self.node))

    def macs(self, stages: list[Stage]) -> int:
        """Of a chain: each stage runs at the output's size along the axes that have been walked, else at the input's."""
        given, made = (
            [ops._hint(size) for size in node.meta["val"].shape]
            for node in (ops.bind(self.node)["input"], self.node)
        )
        if ops.is_op(self.node, "linear"):
            return math.prod(made[:-1]) * sum(math.prod(stage.shape) for stage in stages)
        total, sizes = 0, given[2:]
        for stage in stages:
            sizes = [made[2 + a] if a in stage.axes else size for a, size in enumerate(sizes)]
            total += made[0] * math.prod(sizes) * math.prod(stage.shape)
        return total


class Candidate:
    """A layer and its decomposition, as the choice of ranks sees them."""

    def __init__(self, layer: Layer, decomposition: Decomposition) -> None:
        self.layer = layer
        self.decomposition = decomposition
        self.before = layer.before

    @property
    def full(self) -> Ranks:
        return self.decomposition.full

    def cost(self, ranks: Ranks) -> Cost:
        stages = self.decomposition.stages(ranks)
        return Cost(sum(math.prod(s.shape) for s in stages), self.layer.macs(stages))

    def errors(self, ranks: Sequence[Ranks]) -> Array:
        return self.decomposition.errors(ranks)

    def signal_ranks(self) -> Ranks:
        return self.decomposition.signal_ranks()


@dataclass(frozen=True)
class Factorize(Pass):
    """A layer becomes a chain of cheaper ones. Subclasses say of which operators, and how a weight is decomposed.

    ``rank`` is a number, "vbmf", {"energy": 0.9}, {"macs": 0.5} or {"parameters": 0.5}, as in ``ranks.Rank``; ``layers``
    and ``exclude`` name layers (operators, globs of node names or module paths). With ``calibration``, an iterable of input batches, the error is that of each layer's output on the data: the
    decomposition sees weights whitened by the inputs' covariance, the last factor is fitted to the outputs, and the bias
    takes up the mean error. ``rows`` positions of each layer are kept for that.
    """

    contract: ClassVar[Contract] = lossy
    operators: ClassVar[tuple[str, ...]] = ("conv2d", "conv2d_same")

    rank: RankSpec = field(default_factory=lambda: {"energy": 0.9})
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    rows: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            Rank.of(self.rank)
        except PassError as error:
            raise PassError(f"{self.name}: {error}") from error
        if self.rows < 1:
            raise PassError(f"{self.name}: rows must be at least 1, not {self.rows}")

    def unfit(self, layer: Layer) -> str | None:
        """Why this factorization does not apply to a layer, or None."""
        groups = ops.bind(layer.node).get("groups", 1)
        return f"its {groups} groups are matrices of their own" if groups != 1 else None

    @abstractmethod
    def decomposed(self, weight: Tensor) -> Decomposition:
        """A weight [out, in, taps...] at every rank."""

    def decompose(self, layer: Layer) -> Decomposition:
        """The layer's weight at every rank; with data, for inputs of uncorrelated channels."""
        data = layer.activations
        return self.decomposed(layer.weight if data is None else data.whiten(layer.weight))

    def fit(self, data: Activations, stages: list[Stage], factors: list[Tensor]) -> list[Tensor]:
        """What ``decompose`` found, made the layer's own and fitted to its outputs."""
        first, *others = factors
        return data.fit_last(stages, [data.unwhiten(first), *others])

    def apply(self, edit: Edit) -> None:
        chosen = list(self._layers(edit))
        if not chosen:
            edit.note("no layer to factor")
            return
        if self.calibration is not None:
            nodes = [layer.node for layer in chosen]
            rows = sample_patches(edit, nodes, self.calibration, self.rows, self.seed)
            for layer in chosen:
                layer.activations = Activations(rows.pop(layer.node), layer.weight)
        candidates = [
            Candidate(layer, self.decompose(layer))
            for layer in edit.progress(chosen, "decomposing", len(chosen))
        ]
        stats = edit.program.stats()
        choices = Rank.of(self.rank).choose(candidates, Cost(stats.parameters, stats.macs))
        work = list(zip(candidates, choices, strict=True))
        for candidate, choice in edit.progress(work, "factoring", len(work)):
            if isinstance(choice, str):
                edit.decline(candidate.layer.node, choice)
            else:
                self._factor(edit, candidate, choice)

    def _layers(self, edit: Edit) -> Iterable[Layer]:
        for node in edit.nodes(*self.operators):
            if not layers_of.chosen(node, self.layers, self.exclude):
                continue
            weight = layers_of.constant_weight(edit, node)
            if isinstance(weight, str):
                edit.decline(node, weight)
            elif FACTOR in str(ops.bind(node)["weight"].target):
                edit.decline(node, "it is a factor already")
            elif not bool(weight.isfinite().all()):
                edit.decline(node, "its weight holds NaN or infinity")
            else:
                layer = Layer(node, weight.double())
                reason = self.unfit(layer)
                if reason is None:
                    yield layer
                else:
                    edit.decline(node, reason)

    def _factor(self, edit: Edit, candidate: Candidate, ranks: Ranks) -> None:
        layer, node = candidate.layer, candidate.layer.node
        stages = candidate.decomposition.stages(ranks)
        factors = candidate.decomposition.factors(ranks)
        data = layer.activations
        if data is None:
            whole = compose(stages, factors)
            error = relative(layer.weight - whole, float(layer.weight.square().sum()) or 1.0)
        else:
            factors = self.fit(data, stages, factors)
            whole = compose(stages, factors)
            error = data.error(whole)
        build = edit.build(node, [node])
        bias = ops.bind(node)["bias"]
        if data is not None:
            bias = _shifted_bias(edit, build, node, data.shift(whole))
        new = _chain(build, node, stages, factors, bias)
        cost = candidate.cost(ranks)
        counts = (candidate.before.parameters, cost.parameters), (candidate.before.macs, cost.macs)
        edit.layer_changed(node, *counts, error, f"rank {rank_text(ranks)}")
        edit.replace(node, new)


def _shifted_bias(edit: Edit, build: Build, node: fx.Node, shift: Tensor) -> fx.Node:
    """The bias that takes up the mean error, as a parameter of its own: another reader of the old one keeps it."""
    bias, weight = ops.bind(node)["bias"], ops.bind(node)["weight"]
    shift = shift.to(weight.meta["val"].dtype)
    if bias is None:
        return build.parameter(f"{weight.target}{FACTOR}bias", shift)
    if bias.op != "get_attr":
        return build.add(bias, build.parameter(f"{weight.target}{FACTOR}bias", shift))
    return build.parameter(str(bias.target), edit.program.tensor(bias).detach() + shift)


def _chain(
    build: Build, node: fx.Node, stages: list[Stage], factors: list[Tensor], bias: fx.Node | None
) -> fx.Node:
    """The nodes of a chain; the last one carries the bias."""
    arguments = ops.bind(node)
    weight = arguments["weight"]
    value: fx.Node = arguments["input"]
    for index, (stage, factor) in enumerate(zip(stages, factors, strict=True)):
        tensor = factor.to(weight.meta["val"].dtype).contiguous()
        parameter = build.parameter(f"{weight.target}{FACTOR}{stage.name}", tensor)
        last = bias if index == len(stages) - 1 else None
        if ops.is_op(node, "linear"):
            value = build.linear(value, parameter, last)
            continue
        spatial = len(stage.shape) - 2
        geometry = [
            arguments[name]
            if isinstance(arguments[name], str)
            else [
                size if axis in stage.axes else neutral
                for axis, size in enumerate(each(arguments[name], spatial))
            ]
            for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1))
        ]
        value = build.call(node.target, value, parameter, last, *geometry, stage.groups)
    return value
