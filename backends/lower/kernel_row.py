"""A kernel's row in the manifest: what a profile and a benchmark say of a call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from graphopt.backends.cpu.sparse_forms import Forms
from graphopt.backends.lower.step import Kernel
from graphopt.manifest import Kernel as KernelRow

aten = torch.ops.aten


def kernel_row(
    kernel: Kernel, layer: str, operator: fx.Node, dtype: str, forms: Forms | None
) -> KernelRow:
    """The row of a call with a result of ``dtype``; ``forms`` is what was compared where weights have zeros."""
    compared = forms if kernel.form else None
    return KernelRow(
        name=kernel.name,
        layer=layer,
        operator=str(operator.target).removesuffix(".default"),
        dtype=_multiplied(dtype, kernel),
        macs=kernel.macs or None,
        form=kernel.form,
        density=kernel.density if compared is None else compared.density,
        sparse_gain=kernel.sparse_gain if compared is None else compared.gain,
    )


def _multiplied(dtype: str, kernel: Kernel) -> str:
    """The element type that a benchmark compares a kernel with: of its weights where they are integers, else its result's."""
    if dtype not in ("float32", "float16") or any(c.dtype == np.int8 for c in kernel.constants):
        return "int8"
    weight = str(kernel.constants[0].dtype) if kernel.constants else dtype
    return "float16" if "float16" in (dtype, weight) else "float32"


def origins(nodes: Sequence[fx.Node]) -> list[str]:
    """The module paths (or else node names) of the user's model that a call came from."""
    names: dict[str, None] = {}
    layers = [node for node in nodes if node.target is not aten.to.dtype]
    for node in layers or nodes:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values() if path]
        names[paths[-1] if paths else node.name] = None
    return list(names)
