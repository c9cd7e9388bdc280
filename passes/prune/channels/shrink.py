"""The network without some of its channels, and the same mathematics with zeros in their place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.edit import Edit, fake_mode, propagate
from graphopt.errors import PassError
from graphopt.passes.prune.channels.arguments import rewrite_arguments
from graphopt.passes.prune.channels.coupling import Coupling
from graphopt.passes.prune.channels.group import Group
from graphopt.passes.prune.channels.labels import Axis
from graphopt.passes.prune.channels.walk import ZEROED

Kept = NDArray[np.bool_]


def shrink(edit: Edit, keep: Mapping[Group, Tensor]) -> None:
    """Remove every channel that ``keep`` does not name from the groups that it names (indices of channels, any order).

    Parameters lose rows and columns, calls get the new sizes (views, splits, slices, groups of convolutions and norms), and a
    constant that a removed channel held (sigmoid(0), say) moves into the bias of the layer that read it. The groups are
    of no use afterwards. Raises PassError where the groups are not those of this program, or a choice is not valid.
    """
    coupling = _coupling(edit, keep)
    if coupling is None:
        return
    kept = coupling.kept(keep)
    _fold_constants(edit, coupling, kept)
    for node, tensor in _by_parameter(edit):
        smaller = _cut(coupling, node, tensor, kept)
        if smaller.shape != tensor.shape:
            edit.set_tensor(node, smaller.contiguous())
    for node in edit.nodes():
        rewrite_arguments(edit, node, coupling, kept)
    _propagate_shapes(edit)


def mask(edit: Edit, keep: Mapping[Group, Tensor]) -> None:
    """Zero what makes the channels that ``keep`` does not name: shapes stay, and the channels can grow back in training.

    Zeroed are rows of weights, biases, scales and shifts of norms, and other parameters that meet the channels; the columns of the
    layers that read them are left. The network computes what ``shrink`` would make of it.
    """
    coupling = _coupling(edit, keep)
    if coupling is None:
        return
    kept = coupling.kept(keep)
    for node, tensor in _by_parameter(edit):
        if not tensor.is_floating_point():
            continue
        factor = torch.ones_like(tensor)
        for axis, dimension in enumerate(coupling.walk.parameters[id(tensor)]):
            if (
                isinstance(dimension, Axis)
                and dimension.is_named
                and _is_zeroed(coupling, dimension)
            ):
                stays = torch.from_numpy(kept[coupling.classes.of[dimension.ids]]).to(tensor.device)
                factor.movedim(axis, -1)[..., ~stays] = 0
        if not factor.all():
            edit.set_tensor(node, torch.where(factor.bool(), tensor.detach(), 0))


def _is_zeroed(coupling: Coupling, axis: Axis) -> bool:
    return any(coupling.walk.roles.get(slot, ("factor",))[0] in ZEROED for slot in axis.slots)


def _coupling(edit: Edit, keep: Mapping[Group, Tensor]) -> Coupling | None:
    """The coupling of the groups, checked; None where there are none."""
    couplings = {id(group.coupling): group.coupling for group in keep}
    for coupling in couplings.values():
        coupling.check_current(edit.program, edit.pass_name)
    if len(couplings) > 1:
        raise PassError(f"{edit.pass_name}: the groups must come from one call of channels.groups")
    for group, channels in keep.items():
        complaint = group.complaint(channels)
        if complaint is not None:
            raise PassError(f"{edit.pass_name}: channels of node {group.name!r}: {complaint}")
    return next(iter(couplings.values()), None)


def _by_parameter(edit: Edit) -> list[tuple[fx.Node, Tensor]]:
    """Each parameter once, with a node that reads it."""
    nodes = {str(node.target): node for node in edit.graph.find_nodes(op="get_attr")}
    return [(node, edit.program.tensor(node)) for node in nodes.values()]


def _cut(coupling: Coupling, node: fx.Node, tensor: Tensor, kept: Kept) -> Tensor:
    """A parameter without the removed indices."""
    walk, of = coupling.walk, coupling.classes.of
    if id(tensor) not in walk.parameters:
        return tensor  # a bias that took a constant
    out = tensor.detach()
    grouped = walk.per_group.get(str(node.target))
    for axis, dimension in enumerate(walk.parameters[id(tensor)]):
        if axis == 1 and grouped is not None:
            continue
        if isinstance(dimension, Axis) and dimension.is_named:
            stays = torch.from_numpy(kept[of[dimension.ids]]).to(tensor.device)
            if not stays.all():
                out = out.index_select(axis, torch.where(stays)[0])
    if grouped is not None:
        stays = torch.from_numpy(kept[of[grouped]]).to(tensor.device)
        rows = out.reshape(len(stays), -1, *out.shape[1:])
        out = torch.cat([block[:, columns] for block, columns in zip(rows, stays, strict=True)])
    return out


def _fold_constants(edit: Edit, coupling: Coupling, kept: Kept) -> None:
    """``b + sum_i W[:, i] * c_i`` over removed inputs i that hold ``c_i``."""
    of = coupling.classes.of
    for node, ids, rest in coupling.walk.folds:
        removed = torch.from_numpy(~kept[of[ids]] & (rest != 0))
        if not removed.any():
            continue
        arguments = ops.bind(node)
        weight = edit.program.tensor(arguments["weight"]).detach()
        columns = weight.cpu().double().reshape(*weight.shape[:2], -1).sum(2)
        extra = columns[:, removed] @ torch.from_numpy(rest)[removed]
        bias = arguments["bias"]
        if bias is not None:
            _replace_bias(edit, coupling, bias, extra)
            continue
        dimension = coupling.walk.layers[node]
        if isinstance(dimension, Axis):
            extra = extra[torch.from_numpy(kept[of[dimension.ids]])]
        owner = str(arguments["weight"].target).rpartition(".")[0] or node.name
        value = edit.build(node).parameter(f"{owner}.bias", extra.to(weight))
        edit.replace_argument(node, "bias", value)


def _replace_bias(edit: Edit, coupling: Coupling, bias: fx.Node, extra: Tensor) -> None:
    """Another value for a bias, which keeps its channels."""
    old = edit.program.tensor(bias)
    edit.set_tensor(bias, (old.detach().cpu().double() + extra).to(old))
    coupling.walk.parameters[id(edit.program.tensor(bias))] = coupling.walk.parameters[id(old)]


def _propagate_shapes(edit: Edit) -> None:
    """Record the shapes of every value anew."""
    mode = fake_mode(edit.program)
    for node in edit.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and pytree.tree_leaves(node.meta.get("val"))
        ):
            node.meta["val"] = propagate(node, mode)
