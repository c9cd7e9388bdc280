"""The plan of a network: which nodes become kernels, and which values are physical.

Kernels of ours read and write physical values (NHWC by a ``Layout``); what Relax computes is plain. Convolutions, pools
and concatenations are always physical. An element-wise step follows its neighbours, so that no change of layout stands
between two kernels; among plain values it is left to Relax, unless its operator is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import ops
from graphopt.backends.cpu.workload import Layout
from graphopt.backends.lower import attention, convolution, elementwise, quantizing
from graphopt.backends.lower.elementwise import AddStep, ConvertStep, MulStep
from graphopt.backends.lower.slices import concatenations, place_in_slices
from graphopt.backends.lower.step import (
    DTYPES,
    Margins,
    Step,
    is_integer_op,
    physical_layout,
    rank,
    value_of,
)
from graphopt.program import Program

Selector = Callable[[fx.Node], Step | None]
SELECTORS: tuple[Selector, ...] = (
    quantizing.select_integer,
    convolution.select_float,
    elementwise.select_integer,
    elementwise.select_concat,
    elementwise.select_float,
    attention.select,
)
_SAME_MEMORY = ("contiguous", "clone", "alias", "detach", "dropout")
_RESHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten")


@dataclass
class Plan:
    """``steps[node]`` makes node's value; ``inside`` are nodes swallowed by a step; ``same[node]`` is the physical
    value that node merely renames; ``live`` what the outputs need; ``layouts`` the physical values' layouts;
    ``in_place`` are the concatenations whose inputs are made where they belong."""

    program: Program
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    inside: set[fx.Node] = field(default_factory=set)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    live: set[fx.Node] = field(default_factory=set)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    in_place: set[fx.Node] = field(default_factory=set)

    def root(self, node: fx.Node) -> fx.Node:
        """The value whose memory ``node`` is."""
        while node in self.same:
            node = self.same[node]
        return node

    def is_physical(self, node: fx.Node) -> bool:
        """True where a step makes the value in a layout of ours."""
        step = self.steps.get(self.root(node))
        return step is not None and not step.plain_output


def make_plan(
    program: Program, selectors: Sequence[Selector] = SELECTORS, margins: bool = True
) -> Plan:
    """Choose steps, then forms, then layouts: with ``margins`` for the padding that kernels read, where they do not test."""
    program = attention.spell_masks(program)
    plan = Plan(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in plan.inside:
            _select(plan, node, selectors)
    _find_live(plan)
    wanted = _wanted(plan)
    for node in list(program.graph.nodes):
        step = plan.steps.get(node)
        if step is not None:
            _settle(plan, step, node in wanted)
        elif _renames(plan, node):
            plan.same[node] = node.all_input_nodes[0]
    _find_live(plan, settled=True)
    _assign_layouts(plan, margins)
    parts = {
        node: [plan.root(value) for value in plan.steps[node].inputs]
        for node in concatenations(plan.program.graph.nodes, plan.steps)
    }
    plan.in_place = place_in_slices(plan.layouts, plan.steps, parts)
    return plan


def _select(plan: Plan, node: fx.Node, selectors: Sequence[Selector]) -> None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return
    for select in selectors:
        step = select(node)
        if step is not None:
            plan.steps[step.output] = step
            plan.inside.update(step.nodes)
            return


def _find_live(plan: Plan, settled: bool = False) -> None:
    """A padding that became margins, say, is read by nobody. Once ``settled``, no step can be left to Relax any more."""
    plan.live = {plan.program.output}
    for node in reversed(plan.program.graph.nodes):
        if node not in plan.live:
            continue
        step = plan.steps.get(node)
        if step is None or (_is_flexible(step) and not settled):
            plan.live.update(node.all_input_nodes)
        if step is not None:
            plan.live.update(step.inputs)
    for node in [node for node in plan.steps if node not in plan.live]:
        del plan.steps[node]


def _is_flexible(step: Step) -> bool:
    """True for steps that can also be left to Relax, or run on plain values."""
    if isinstance(step, ConvertStep):
        return True
    return isinstance(step, AddStep | MulStep) and value_of(step.output).is_floating_point()


def _wanted(plan: Plan) -> set[fx.Node]:
    """The values that some reader takes in a physical layout."""
    wanted: set[fx.Node] = set()
    readers: dict[fx.Node, list[Step]] = {}
    for step in plan.steps.values():
        for value in step.inputs:
            readers.setdefault(value, []).append(step)
    for node in reversed(plan.program.graph.nodes):
        taken = any(_takes_physical(step, wanted) for step in readers.get(node, ()))
        if taken or any(user in wanted and _may_rename(user) for user in node.users):
            wanted.add(node)
    return wanted


def _takes_physical(step: Step, wanted: set[fx.Node]) -> bool:
    if rank(step.output) not in (2, 4):
        return False
    return step.output in wanted if _is_flexible(step) else not step.plain_inputs[0]


def _settle(plan: Plan, step: Step, wanted: bool) -> None:
    """Fix the forms of a step's inputs and output, or leave its nodes to Relax."""
    ranks = {rank(value) for value in (*step.inputs, step.output)}
    physical = [plan.is_physical(value) for value in step.inputs]
    if not ranks <= {2, 4}:
        step.plain_inputs = [True] * len(step.inputs)
        step.plain_output = True
        return
    if not _is_flexible(step):
        return
    if isinstance(step, ConvertStep):
        step.plain_inputs = [not physical[0]]
        step.plain_output = not wanted
        if step.plain_output and "activation" in step.parameters:
            _leave_activation(plan, step)
        elif step.is_rows and not step.parameters:  # a cast
            _leave_to_relax(plan, step)
    elif not wanted and not any(physical):
        _leave_to_relax(plan, step)


def _leave_activation(plan: Plan, step: ConvertStep) -> None:
    """An activation whose result is plain is Relax's; what the step computes before it stays."""
    _leave_to_relax(plan, step)
    if not is_integer_op(step.nodes[0]):
        return
    step.nodes.pop()
    step.output = step.nodes[-1]
    del step.parameters["activation"]
    plan.steps[step.output] = step
    plan.inside.update(step.nodes)


def _leave_to_relax(plan: Plan, step: Step) -> None:
    plan.inside.difference_update(step.nodes)
    del plan.steps[step.output]


def _may_rename(node: fx.Node) -> bool:
    """True for calls that keep the memory of a map as it is: copies, and reshapes of a map of one pixel."""
    if ops.is_op(node, "dropout") and ops.bind(node)["train"]:
        return False
    if ops.is_op(node, *_SAME_MEMORY):
        return True
    if not ops.is_op(node, *_RESHAPES) or not isinstance(node.args[0], fx.Node):
        return False
    shapes = [[str(s) for s in value.meta["val"].shape] for value in (node.args[0], node)]
    one_pixel = [shape[:2] for shape in shapes if len(shape) in (2, 4) and set(shape[2:]) <= {"1"}]
    return len(one_pixel) == 2 and one_pixel[0] == one_pixel[1]


def _renames(plan: Plan, node: fx.Node) -> bool:
    if node in plan.inside or not _may_rename(node):
        return False
    source = node.all_input_nodes[0]
    return source.meta["val"].dtype in DTYPES and plan.is_physical(source)


def _assign_layouts(plan: Plan, with_margins: bool) -> None:
    """Every physical value gets the margins that its readers need together."""
    margins: dict[fx.Node, Margins] = {}
    fills: dict[fx.Node, int] = {}
    for step in plan.steps.values():
        for index, value in enumerate(step.inputs):
            if step.plain_inputs[index]:
                continue
            root, needed = plan.root(value), step.margins(index) if with_margins else Margins()
            margins[root] = margins.get(root, Margins()).union(needed)
            if needed != Margins():
                fills[root] = step.fill(index)
    roots = {node for node, step in plan.steps.items() if not step.plain_output} | set(margins)
    for node in plan.program.graph.nodes:
        if node in roots:
            plan.layouts[node] = physical_layout(
                node, margins.get(node, Margins()), fills.get(node, 0)
            )
