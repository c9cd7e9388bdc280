"""Feature matching: values at named nodes of the student are drawn to those of the teacher (Romero et al. 2015)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphopt.errors import TrainError
from graphopt.program import Program


def find(program: Program, name: str, role: str) -> fx.Node:
    """The node of that name, else the last one inside the module of that path (``"layer2"``: that module's output).

    Raises TrainError, naming what is near.
    """
    calls: list[fx.Node] = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in calls:
        if node.name == name:
            return node
    paths = [{path for path, _ in (n.meta.get("nn_module_stack") or {}).values()} for n in calls]
    inside = [node for node, around in zip(calls, paths, strict=True) if name in around]
    if inside:
        return inside[-1]
    known = sorted({node.name for node in calls} | {path for p in paths for path in p if path})
    near = difflib.get_close_matches(name, known, n=3) or known[:5]
    raise TrainError(
        f"the {role} has no node or module {name!r} to take features from; near it: {', '.join(near)}"
    )


class _Tap(fx.Interpreter):
    """Runs a program and keeps the values of some nodes; the module's tensors are read at each run."""

    def __init__(self, program: Program, nodes: Iterable[fx.Node]) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False
        self._nodes = set(nodes)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self.seen[n.name] = value
        return value


def run(
    program: Program, names: Iterable[str], inputs: tuple[Any, ...]
) -> tuple[Any, list[Tensor]]:
    """The program's output and the values of the named nodes, in their order."""
    names = list(names)
    by_name = {node.name: node for node in program.graph.nodes}
    tap = _Tap(program, [by_name[name] for name in names])
    return tap.run(*inputs), [tap.seen[name] for name in names]


class Adapter(nn.Module):
    """``y[.., o, ..] = sum_i W[o, i] * x[.., i, ..] + b[o]`` along one axis: a 1 x 1 convolution where that is the channels."""

    def __init__(self, inputs: int, outputs: int, axis: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.linear(x.movedim(self.axis, -1))
        return mapped.movedim(-1, self.axis)


class Features(nn.Module):
    """``sum over pairs of mean((adapter(student node) - teacher node)^2)``.

    An adapter stands where the widths differ along one axis; it trains with the student and is left behind.
    Raises TrainError for an unknown node, and for values of different resolution.
    """

    def __init__(
        self, student: Program, teacher: Program, pairs: Iterable[tuple[str, str]]
    ) -> None:
        super().__init__()
        self.student_names: list[str] = []
        self.teacher_names: list[str] = []
        self.adapters = nn.ModuleList()
        for mine, theirs in pairs:
            source, goal = find(student, mine, "student"), find(teacher, theirs, "teacher")
            self.student_names.append(source.name)
            self.teacher_names.append(goal.name)
            self.adapters.append(_adapter(mine, source, theirs, goal))

    def forward(self, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
        losses = [
            F.mse_loss(adapter(value), goal)
            for adapter, value, goal in zip(self.adapters, mine, theirs, strict=True)
        ]
        return torch.stack(losses).sum()


def _adapter(mine: str, source: fx.Node, theirs: str, goal: fx.Node) -> nn.Module:
    values = [node.meta["val"] for node in (source, goal)]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        raise TrainError(f"features {mine!r} and {theirs!r} must both be tensors of floats")
    # axis 0 is the batch, at which the two may have been captured differently
    shapes = [[str(length) for length in value.shape[1:]] for value in values]
    differ = [i for i, (a, b) in enumerate(zip(*shapes, strict=False), 1) if a != b]
    if len(shapes[0]) != len(shapes[1]) or len(differ) > 1:
        raise TrainError(
            f"features {mine!r} of the student are [{', '.join(['N', *shapes[0]])}] and {theirs!r} of the "
            f"teacher [{', '.join(['N', *shapes[1]])}]; choose nodes that differ in their channels only"
        )
    if not differ:
        return nn.Identity()
    axis = differ[0]
    return Adapter(int(values[0].shape[axis]), int(values[1].shape[axis]), axis)
