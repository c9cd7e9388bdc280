"""Which layer a node is, which layers a pass is asked to take, and the weight that a pass may rewrite."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, fx

from graphopt import ops
from graphopt.edit import Edit


def paths(node: fx.Node) -> tuple[str, ...]:
    """The modules around a node, outermost first: ``("features", "features.0", "features.0.conv")``."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(path for path, _ in stack.values() if path)


def describe(node: fx.Node) -> str:
    """``node 'conv2d_3' (layer 'features.3.conv')``."""
    inner = paths(node)
    return f"node {node.name!r} (layer {inner[-1]!r})" if inner else f"node {node.name!r}"


def names(pattern: str, node: fx.Node) -> bool:
    """True where ``pattern`` is the node's operator or a glob of its name, its module's path or a parent's path."""
    op = ops.info(node)
    if op is not None and op.name == pattern:
        return True
    return any(fnmatchcase(name, pattern) for name in (node.name, *paths(node)))


def chosen(node: fx.Node, layers: Iterable[str], exclude: Iterable[str] = ()) -> bool:
    """True where a pattern of ``layers`` names the node and none of ``exclude`` does."""
    return any(names(pattern, node) for pattern in layers) and not any(
        names(pattern, node) for pattern in exclude
    )


def constant_weight(edit: Edit, node: fx.Node) -> Tensor | str:
    """The float weight that ``node`` alone reads, detached; else why a pass leaves the layer as it is."""
    weight = ops.bind(node)["weight"]
    if weight.op != "get_attr":
        return _computed(weight)
    tensor = edit.program.tensor(weight)
    if not tensor.is_floating_point():
        return f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    readers = sum(
        len(other.users)
        for other in edit.graph.nodes
        if other.op == "get_attr" and edit.program.tensor(other) is tensor
    )
    if readers != 1 or node.all_input_nodes.count(weight) != 1:
        return f"its weight {weight.target} is shared by {readers} layers"
    return tensor.detach()


def _computed(weight: fx.Node) -> str:
    op = ops.info(weight)
    if op is not None and op.kind == "fake_quantize":
        return "its weight is fake-quantized; run this pass before quantization"
    if ops.masked(weight) is not None:
        return "its weight is masked by pruning"
    return "its weight is computed"
