"""Where a node stands in the user's model."""

from __future__ import annotations

from torch import fx


def paths(node: fx.Node) -> tuple[str, ...]:
    """The modules around a node, outermost first: ``("features", "features.0", "features.0.conv")``."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(path for path, _ in stack.values() if path)


def describe(node: fx.Node) -> str:
    """``node 'conv2d_3' (layer 'features.3.conv')``."""
    inner = paths(node)
    return f"node {node.name!r} (layer {inner[-1]!r})" if inner else f"node {node.name!r}"
