"""Which layers are sparse kernels: the cheapest labelling of a network's steps as planar or NHWC.

A sparse kernel reads and writes planar tensors, every other one NHWC; a value made in one order and read in the other is
converted once. With a step's estimated cycles in either order, and a conversion's, the least sum is a minimum cut: the steps
on the source's side are planar. Sums of two planar tensors cost the same in either order and follow their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import networkx
from torch import fx

from graphopt.backends.cpu.sparse_forms import Forms, compare
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.lower.convolution import ConvolutionStep
from graphopt.backends.lower.elementwise import AddStep
from graphopt.backends.lower.plan import Plan
from graphopt.backends.lower.step import Context, Step, dense_rows, padded_rows

_PLANAR, _NHWC = "planar", "nhwc"
_CONVERSION_CYCLES = 0.3  # a byte
_CALL_CYCLES = 2000.0
_GAIN = 0.95  # of the dense form's time, above which a layer stays dense


@dataclass
class Orders:
    """``planar`` are the outputs of the steps that read and write planar tensors; ``rows`` those of sparse linear layers on
    plain rows (tokens), which are turned around each; ``forms`` what was compared."""

    planar: set[fx.Node] = field(default_factory=set)
    rows: set[fx.Node] = field(default_factory=set)
    forms: dict[fx.Node, Forms] = field(default_factory=dict)


def choose_orders(plan: Plan, context: Context) -> Orders:
    """Label the plan's steps; all stay NHWC where no layer's weights have zeros to leave out."""
    orders = Orders()
    for step in plan.steps.values():
        found = _forms(plan, step, context)
        if found is not None:
            orders.forms[step.output] = found
    sparse = {}
    for node, forms in orders.forms.items():
        if forms.sparse is None:
            continue
        if not plan.steps[node].is_rows:
            sparse[node] = forms
        elif forms.sparse < _GAIN * forms.dense:
            orders.rows.add(node)
    if any(f.sparse is not None and f.sparse < f.dense for f in sparse.values()):
        orders.planar = _cut(plan, sparse)
    return orders


def _is_physical(step: Step) -> bool:
    return not any(step.plain_inputs) and not step.plain_output


def _forms(plan: Plan, step: Step, context: Context) -> Forms | None:
    if type(step) is not ConvolutionStep:
        return None
    if step.is_rows:
        return _row_forms(step, context)
    if not _is_physical(step):
        return None
    inputs = [plan.layouts[plan.root(value)] for value in step.inputs]
    workload = step.workload(inputs, plan.layouts[step.output])
    weight = step.weight(context, workload)
    return compare(workload, weight, context.isa, context.threads)


def _row_forms(step: ConvolutionStep, context: Context) -> Forms | None:
    """A linear layer on plain rows: its sparse form turns every input and the result."""
    inputs, output = [padded_rows(value) for value in step.inputs], dense_rows(step.output)
    workload = step.workload(inputs, output)
    forms = compare(workload, step.weight(context, workload), context.isa, context.threads)
    if forms is None or forms.sparse is None:
        return forms
    layouts = (*inputs, output)
    if any(layout.channels % layout.group for layout in layouts):
        return replace(forms, sparse=None, reason="its channels are no whole blocks")
    return replace(forms, sparse=forms.sparse + sum(map(_conversion_cycles, layouts)))


def _conversion_cycles(layout: Layout) -> float:
    elements = (layout.batch or 1) * layout.height * layout.width * layout.channels
    return _CALL_CYCLES + _CONVERSION_CYCLES * elements * 4 / layout.group


def _is_neutral(step: Step) -> bool:
    return isinstance(step, AddStep) and _is_physical(step)


def _cut(plan: Plan, sparse: dict[fx.Node, Forms]) -> set[fx.Node]:
    graph: networkx.DiGraph[Any] = networkx.DiGraph()
    graph.add_nodes_from((_PLANAR, _NHWC))
    free = {n for n, step in plan.steps.items() if n in sparse or _is_neutral(step)}
    for node, forms in sparse.items():
        assert forms.sparse is not None
        graph.add_edge(_PLANAR, node, capacity=_GAIN * forms.dense)
        graph.add_edge(node, _NHWC, capacity=forms.sparse)
    for value, readers in _readers(plan).items():
        layout = plan.layouts.get(value)
        if layout is None:
            continue
        maker = value if value in free else _NHWC
        _add_value(graph, value, maker, [r if r in free else _NHWC for r in readers], layout)
    _, (planar, _) = networkx.minimum_cut(graph, _PLANAR, _NHWC)
    return {node for node in free if node in planar}


def _add_value(
    graph: networkx.DiGraph[Any],
    value: fx.Node,
    maker: fx.Node | str,
    readers: list[fx.Node | str],
    layout: Layout,
) -> None:
    """A conversion costs once what its value has of bytes, in each direction that some reader needs."""
    cost = _conversion_cycles(layout)
    leaving, entering = ("leaving", value), ("entering", value)
    graph.add_edge(maker, leaving, capacity=cost)
    graph.add_edge(entering, maker, capacity=cost)
    for reader in readers:  # edges without a capacity cannot be cut
        graph.add_edge(leaving, reader)
        graph.add_edge(reader, entering)


def _readers(plan: Plan) -> dict[fx.Node, list[fx.Node | str]]:
    """Of every value, the steps that read it, and ``_NHWC`` where something else does."""
    readers: dict[fx.Node, list[fx.Node | str]] = {}
    for node, step in plan.steps.items():
        for value in step.inputs:
            readers.setdefault(plan.root(value), []).append(node)
    for node in plan.program.graph.nodes:
        if plan.is_physical(node) and any(_is_plain(plan, user) for user in node.users):
            readers.setdefault(plan.root(node), []).append(_NHWC)
    return readers


def _is_plain(plan: Plan, user: fx.Node) -> bool:
    """True for what Relax computes, and the outputs."""
    if user.op == "output":
        return True
    return user in plan.live and user not in plan.inside and user not in plan.same
