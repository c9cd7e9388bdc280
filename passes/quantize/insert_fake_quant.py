"""Insert fake quantization: ``x -> (clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``.

Around every convolution and linear layer, and through the poolings, residual adds, concats and shape operators between
them (``regions``). A clamp after a layer shares its node; a concat shares one scale with its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import networkx as nx
from torch import fx

from graphopt import ops
from graphopt.contract import Contract, lossy
from graphopt.edit import Edit
from graphopt.passes.quantize.calibrate import observe
from graphopt.passes.quantize.observers import ObserverOptions
from graphopt.passes.quantize.qparams import QParams, activation_qparams
from graphopt.passes.quantize.regions import Regions, is_fake_quantize
from graphopt.passes.quantize.spec import ActivationSpec, QuantizationSpec
from graphopt.passes.quantize.weights import check_weights, quantize_weights
from graphopt.passing import Pass
from graphopt.registry import register


@register
@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """``conv(x, w) -> conv(fq(x), fq(w))``, with scales from calibration data (Jacob et al. 2018).

    Values are observed in the float program, in one run over ``calibration``; ``observer`` is minmax, moving-average,
    percentile, mse or entropy. Weight scales are kept large enough for the bias to fit int32 at ``s_x * s_w``.
    Declines layers that are excluded, already fake-quantized, or whose weight is no constant, and leaves in float what
    stands between float operators and everything after the last layer, but for an average over the whole map.

    Raises CalibrationError without calibration data and for NaN or infinity in an observed value, and QuantizeError for
    them in the weights.
    """

    name: ClassVar[str] = "insert-fake-quant"
    contract: ClassVar[Contract] = lossy
    runs_after: ClassVar[tuple[str, ...]] = ("fold-batch-norm",)

    spec: QuantizationSpec = field(default_factory=QuantizationSpec)
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.1

    def __post_init__(self) -> None:
        self.observer_options()

    def observer_options(self) -> ObserverOptions:
        return ObserverOptions(self.observer, self.percentile, self.momentum)

    def apply(self, edit: Edit) -> None:
        regions = Regions(edit.nodes(), self.spec)
        for node, reason in regions.declined.items():
            edit.decline(node, reason)
        _decline_idle(edit, regions)
        if not regions.seeds:
            edit.note("no layer to quantize")
            return
        for node in regions.seeds:
            check_weights(edit, node)
        groups = list(_groups(regions))
        observers = {v: self.observer_options().make() for members, _ in groups for v in members}
        observe(edit, observers, self.calibration)
        qparams: dict[fx.Node, QParams] = {}
        for members, spec in groups:
            ranges = [observers[value].range(spec) for value in members]
            low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
            qparams.update(dict.fromkeys(members, activation_qparams(low, high, spec)))
        # Weights first: their scales' floors read the inputs' scales by the values that are still in place.
        quantize_weights(edit, regions, qparams)
        for value, parameters in qparams.items():
            _quantize_value(edit, regions, value, parameters)


def _groups(regions: Regions) -> Iterator[tuple[list[fx.Node], ActivationSpec]]:
    """The values that get a fake-quant node, in sets that share their parameters, each with its finest spec."""
    edges: nx.Graph[fx.Node] = nx.Graph()
    values: dict[fx.Node, None] = {}
    for node in regions.active:
        inputs = [v for v in regions.inputs(node) if not is_fake_quantize(v)]
        edges.add_nodes_from(inputs)
        values.update((v, None) for v in inputs if not (v in regions.active and regions.moves(v)))
        if regions.shares(node):
            edges.add_edges_from((value, regions.output(node)) for value in inputs)
    for component in nx.connected_components(edges):
        members = [value for value in values if value in component]
        specs = [regions.spec.activations_of(regions.maker(value)) for value in members]
        if members:
            yield members, max(specs, key=lambda spec: (spec.bits, not spec.symmetric))


def _decline_idle(edit: Edit, regions: Regions) -> None:
    for node in edit.nodes("batch_norm"):
        maker = ops.bind(node)["input"]
        if maker in regions.seeds:
            edit.decline(node, f"stays in float after {maker.name}: fold batch norm first")
    for node in edit.nodes(*regions.spec.ops):
        idle = node not in regions.active and node not in regions.fused
        if idle and node not in regions.declined:
            edit.decline(node, "stands between float operators")


def _quantize_value(edit: Edit, regions: Regions, value: fx.Node, qparams: QParams) -> None:
    """Put one fake-quant after ``value``; float readers of a float value keep reading it unquantized."""
    kept = [user for user in value.users if user not in regions.active]
    if regions.is_integer(value):
        kept = []
    anchor = _after(value)
    new = edit.build(anchor, [value]).fake_quantize(
        value, qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax
    )
    edit.replace(value, new)
    for user in kept:
        user.replace_input_with(new, value)


def _after(value: fx.Node) -> fx.Node:
    anchor = value.next
    while anchor.op in ("placeholder", "get_attr"):
        anchor = anchor.next
    return anchor
