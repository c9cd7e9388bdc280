"""A network that treats every image of a batch alone is lowered for one image, and a session runs it image by image.

The tensors between two layers then stay in the cache: 8 images of 56 x 56 x 144 floats do not, and a depthwise layer on them
takes 5 times as long. Memory between the layers is that of one image, and a dynamic batch leaves no symbolic size in the code.
A batch stays whole where an operator mixes images, where its tensors fit the L2 cache as they are, and where layers wait for
their weights, which 8 images would read 8 times (VGG's linear layers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.lower.batch_axis import Axis, Call, depends_on_batch, sizes_of
from graphopt.backends.lower.batch_proof import batch_axes, batch_of, declined
from graphopt.edit import propagate
from graphopt.errors import Decline
from graphopt.program import Program

_L3_BYTES = 16 * 2**20  # of one core, of the 32 MiB that it shares
_L3_BYTES_A_CYCLE = 24.0  # measured: 101 GB/s at 4.2 GHz
_MEMORY_BYTES_A_CYCLE = 9.0  # and 38 GB/s
_WAITING = 0.5  # of the time that tensors take to come; the rest passes beside arithmetic
_RUN_CYCLES = 40_000.0  # what a session does for a run of the code: 10 us
_JOIN_CYCLES = 12_000.0  # 3 us a layer that two threads share


@dataclass(frozen=True)
class Images:
    """What is lowered: ``program``, for one image where they are run ``alone``; and why."""

    program: Program
    alone: bool
    reason: str


def choose(program: Program, isa: Isa, threads: int) -> Images:
    """Whether to run the images of a batch one by one."""
    most = _largest_batch(program)
    if most == 1:
        return Images(program, False, "together: the batch is of one image")
    try:
        one = one_image(program)
    except Decline as reason:
        return Images(program, False, f"together: {reason}")
    together, alone = _cycles(one, isa, most, threads)
    numbers = f"{together / 1e3:.0f} thousand cycles an image for {most} together, {alone / 1e3:.0f} thousand for each alone"
    if alone < together:
        return Images(one, True, f"one by one: waiting is estimated at {numbers}")
    return Images(program, False, f"together: waiting is estimated at {numbers}")


def _largest_batch(program: Program) -> int:
    return (
        ops._hint(batch_of(program)) if program.dynamic_batch is None else program.dynamic_batch[1]
    )


def one_image(program: Program) -> Program:
    """The same network for a batch of one: what it computes of each image of a larger batch.

    Raises Decline, naming the node, where it is not known to treat every image alone.
    """
    axes, calls = batch_axes(program)
    copy, mode = program.clone(), FakeTensorMode()
    copies = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
    for node, new in copies.items():
        if node in calls:
            _write(new, calls[node], copies)
        if node.op != "output":
            _set_value(node, new, mode)
            _check_value(node, new, axes.get(node))
    for new in reversed(list(copy.graph.nodes)):
        if new.op == "call_function" and not new.users and not ops.has_effect(new):
            copy.graph.erase_node(new)
    copy.graph_module.recompile()
    inputs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[:1], program.example_inputs)
    return replace(copy, example_inputs=inputs, dynamic_batch=None)


def _write(new: fx.Node, call: Call, copies: Mapping[fx.Node, fx.Node]) -> None:
    """The call for a batch of one."""
    positional, named = call.written()
    new.target = call.target
    new.args = fx.map_arg(positional, copies.__getitem__)
    new.kwargs = fx.map_arg(named, copies.__getitem__)


def _set_value(node: fx.Node, new: fx.Node, mode: FakeTensorMode) -> None:
    """The value for one image, with sizes as numbers."""
    if node.op == "placeholder":
        value = node.meta["val"]
        with mode:
            new.meta["val"] = torch.empty((1, *value.shape[1:]), dtype=value.dtype)
        return

    def number(source: fx.Node) -> Any:
        value = source.meta["val"]
        return value if isinstance(value, int | float) else source

    if node.op == "call_function":
        new.args, new.kwargs = fx.map_arg(new.args, number), fx.map_arg(new.kwargs, number)
    try:
        new.meta["val"] = propagate(new, mode)
    except Exception as error:
        raise declined(node, "it does not accept a batch of one") from error


def _check_value(node: fx.Node, new: fx.Node, axis: Axis) -> None:
    """Raise Decline unless the value is the old one with one image where the batch was: the proof, checked."""
    old, made = (pytree.tree_leaves(n.meta["val"]) for n in (node, new))
    for before, after in zip(old, made, strict=True):
        if not isinstance(before, torch.Tensor):
            if depends_on_batch(after):
                raise declined(node, "its size depends on values of tensors")
            continue
        want: list[Any] = list(before.shape)
        if axis is not None:
            want[axis.index] = axis.rows
        if list(after.shape) != want or after.dtype != before.dtype:
            raise declined(node, f"it becomes {list(after.shape)}, not {want}, for a batch of one")


def _cycles(one: Program, isa: Isa, images: int, threads: int) -> tuple[float, float]:
    """Estimated cycles of an image that ``images`` together spend on waiting for tensors, and that each alone spends on
    waiting for weights, on its run, and on threads that wait for each other at the end of a layer."""
    together, alone = 0.0, _RUN_CYCLES
    weights = sum(_bytes(node) for node in one.graph.nodes if node.op == "get_attr")
    rate = _MEMORY_BYTES_A_CYCLE if weights > _L3_BYTES else _L3_BYTES_A_CYCLE
    for node in one.graph.nodes:
        op = ops.info(node)
        if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor):
            continue
        if op is not None and (op.kind == "shape" or op.elementwise):  # a view, or part of a kernel
            continue
        sources = node.all_input_nodes
        moved = _bytes(node) + sum(_bytes(source) for source in sources if source.op != "get_attr")
        moved //= threads
        together += _waiting(moved, images * moved, isa) - _waiting(moved, moved, isa)
        if op is not None and op.kind == "embedding":
            continue  # reads a few rows of its weight
        read = sum(_bytes(source) for source in sources if source.op == "get_attr")
        busy = ops.macs(node) / _macs_a_cycle(isa, sources) / threads
        alone += max(0.0, read / rate - busy) - max(0.0, read / images / rate - busy)
        alone += _JOIN_CYCLES if busy and threads > 1 else 0.0
    return together, alone


def _bytes(node: fx.Node) -> int:
    tensors = [
        leaf for leaf in pytree.tree_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor)
    ]
    return sum(math.prod(sizes_of(tensor)) * tensor.element_size() for tensor in tensors)


def _waiting(moved: int, held: int, isa: Isa) -> float:
    """Cycles for ``moved`` bytes of tensors that are ``held`` bytes in all: those in L2 come without waiting."""
    if held <= isa.l2_bytes:
        return 0.0
    return _WAITING * moved / (_L3_BYTES_A_CYCLE if held <= _L3_BYTES else _MEMORY_BYTES_A_CYCLE)


def _macs_a_cycle(isa: Isa, sources: list[fx.Node]) -> float:
    """Multiply-accumulates of all pipes of vectors."""
    if all(getattr(source.meta["val"], "dtype", None) != torch.uint8 for source in sources):
        return float(isa.pipes * isa.lanes)
    row = isa.dense("uint8")[-1]
    return isa.pipes * isa.lanes * row.step / row.products
