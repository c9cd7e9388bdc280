"""The plan as a ``torch.fx`` graph of kernel calls and plain ATen ops, ready for Relax's importer.

A kernel call is ``graphopt::call_kernel(tensors, kernel, shape, dtype)``: it exists for tracing only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree
from tvm import DataType

from graphopt.backends.cpu.planar import planar
from graphopt.backends.cpu.workload import Conv2d, Layout
from graphopt.backends.lower import resize
from graphopt.backends.lower.elementwise import relayout, reordered
from graphopt.backends.lower.kernel_row import kernel_row, origins
from graphopt.backends.lower.one_tensor import ONE_TENSOR
from graphopt.backends.lower.plan import Plan
from graphopt.backends.lower.sparse import Orders, choose_orders
from graphopt.backends.lower.step import (
    Context,
    Kernel,
    KernelSource,
    LoadTransform,
    Step,
    dense_rows,
    image_layout,
    padded_rows,
    rank,
    value_of,
)
from graphopt.manifest import Kernel as KernelRow
from graphopt.manifest import TensorSpec, WeightTransform

aten = torch.ops.aten
_SCHEMA = "call_kernel(Tensor[] tensors, str kernel, int[] shape, ScalarType dtype) -> Tensor"
_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_CONSTANT_NAMES = ("weight", "bias", "multiplier")


def _result(
    tensors: list[torch.Tensor], kernel: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    return tensors[0].new_empty((tensors[0].shape[0], *shape), dtype=dtype)


torch.library.register_fake("graphopt::call_kernel", _result, lib=_LIBRARY)


@dataclass
class Lowered:
    """The emitted module, its kernels by name, a row a call in order of execution, and what tuning can choose for:
    workloads with the layer they came from.

    ``stored`` has the arrays of those parameters that the transforms of ``transforms`` make at loading. ``unaligned`` names
    the inputs that kernels read wherever their data begins.
    """

    module: fx.GraphModule
    functions: dict[str, Any] = field(default_factory=dict)
    calls: list[KernelRow] = field(default_factory=list)
    tunable: list[tuple[Conv2d, str]] = field(default_factory=list)
    stored: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    transforms: list[WeightTransform] = field(default_factory=list)
    unaligned: frozenset[str] = frozenset()


def emit(plan: Plan, context: Context) -> Lowered:
    """Build the module for a CPU; its outputs are the program's, flattened."""
    return emit_kernels(plan, context, choose_orders(plan, context))


def emit_kernels(plan: Plan, source: KernelSource, orders: Orders) -> Lowered:
    """Build the module of ``source``'s kernels."""
    return _Emitter(plan, source, orders).run()


class _Emitter:
    def __init__(self, plan: Plan, context: KernelSource, orders: Orders) -> None:
        self.plan = plan
        self.context = context
        self.orders = orders
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.lowered = Lowered(fx.GraphModule(self.root, fx.Graph()))
        self.plain: dict[fx.Node, Any] = {}
        self.physical: dict[fx.Node, fx.Node] = {}
        self.planar: dict[fx.Node, fx.Node] = {}

    def run(self) -> Lowered:
        for node in self.plan.program.graph.nodes:
            self._node(node)
        module = fx.GraphModule(self.root, self.graph, class_name="Lowered")
        module.graph.lint()
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        unaligned = frozenset(str(node.target) for node in inputs if self._is_unaligned(node))
        return replace(self.lowered, module=module, unaligned=unaligned)

    def _is_unaligned(self, node: fx.Node) -> bool:
        """True where kernels alone read the input, and take it at any element."""
        for user in node.users:
            if user.target == aten.sym_size.int:
                continue
            if user.target != torch.ops.graphopt.call_kernel.default or user.args[1] == ONE_TENSOR:
                return False
            parameters = self.lowered.functions[str(user.args[1])].params
            tensors: Any = user.args[0]
            for tensor, buffer in zip(tensors, parameters, strict=False):  # the last is the result
                if tensor is node and buffer.data_alignment > DataType(buffer.dtype).itemsize:
                    return False
        return True

    def _node(self, node: fx.Node) -> None:
        step = self.plan.steps.get(node)
        if node.op == "placeholder":
            self.plain[node] = self.graph.placeholder(node.name)
        elif node.op == "output":
            leaves = [self._plain_argument(v) for v in pytree.tree_leaves(node.args[0])]
            self.graph.output(tuple(value for value in leaves if isinstance(value, fx.Node)))
        elif step is not None:
            self._step(step)
        elif node in self.plan.live and self._is_relax_call(node):
            self.plain[node] = self._relax_call(node)

    def _is_relax_call(self, node: fx.Node) -> bool:
        inside = node in self.plan.inside or node in self.plan.same
        return node.op == "call_function" and not inside

    def _relax_call(self, node: fx.Node) -> fx.Node:
        if node.target == aten.sym_size.int and node.args[1] == 0:
            source = self.plan.root(node.args[0])  # type: ignore[arg-type]
            made = self.physical.get(source) or self.planar.get(source)
            if made is not None:
                return self.graph.call_function(aten.sym_size.int, (made, 0))
        if resize.is_resize(node):
            return self._resize(node)
        args = fx.map_arg(node.args, self._plain)
        kwargs = fx.map_arg(node.kwargs, self._plain)
        return self._call(node.target, args, kwargs, node.name)

    def _resize(self, node: fx.Node) -> fx.Node:
        indices: list[fx.Node] = []
        weights: list[fx.Node | None] = []
        for axis, (index, weight) in enumerate(resize.taps(node)):
            indices.append(self._parameter(f"{node.name}_index_{axis}", index))
            unit = bool((weight == 1).all())
            weights.append(None if unit else self._parameter(f"{node.name}_weight_{axis}", weight))
        x = self._plain(node.all_input_nodes[0])
        return self._call(resize.weighted_rows, (x, indices, weights), None, node.name)

    def _call(self, target: Any, args: Any, kwargs: Any = None, name: str | None = None) -> fx.Node:
        """A call; a reshape of a reshape is one of its source: TVM makes a copying kernel of the two."""
        if target in _RESHAPES and isinstance(args[0], fx.Node) and args[0].target in _RESHAPES:
            args = (args[0].args[0], *args[1:])
        return self.graph.create_node("call_function", target, tuple(args), kwargs or {}, name)

    def _plain_argument(self, value: Any) -> Any:
        return self._plain(value) if isinstance(value, fx.Node) else value

    def _plain(self, node: fx.Node) -> Any:
        """The value as PyTorch holds it, converted from its layout once."""
        if node not in self.plain:
            self.plain[node] = (
                self._constant(node) if node.op == "get_attr" else self._to_plain(node)
            )
        return self.plain[node]

    def _constant(self, node: fx.Node) -> fx.Node:
        tensor = self.plan.program.tensor(node).detach()
        return self._parameter(str(node.target).replace(".", "_"), tensor)

    def _parameter(self, name: str, tensor: torch.Tensor) -> fx.Node:
        free, number = name, 0
        while hasattr(self.root, free):
            number += 1
            free = f"{name}_{number}"
        self.root.register_parameter(
            free, torch.nn.Parameter(tensor.contiguous(), requires_grad=False)
        )
        return self.graph.get_attr(free)

    def _to_plain(self, node: fx.Node) -> fx.Node:
        root = self.plan.root(node)
        layout, dense, source = self.plan.layouts[root], image_layout(root), self._to_physical(root)
        if not _is_nchw(layout):
            kernel = relayout(layout, dense, "nhwc", "nchw", self.context)
            name = f"{node.name}_plain"
            source = self._kernel(kernel, [source], _nchw(dense), dense.dtype, name, [root])
            if rank(node) == 4:
                return source
        return self._logical(source, node)

    def _to_physical(self, node: fx.Node) -> fx.Node:
        """A plain or planar value in the layout that its readers share, converted once."""
        root = self.plan.root(node)
        if root in self.planar and root not in self.physical:
            layout = self.plan.layouts[root]
            source = self.planar[root]
            self.physical[root] = self._reorder(source, planar(layout), layout, [root])
        if root not in self.physical:
            layout, dense = self.plan.layouts[root], image_layout(root)
            if _is_nchw(layout):
                self.physical[root] = self._reshape(self._plain(root), _shape(layout))
            else:
                kernel = relayout(dense, layout, "nchw", "nhwc", self.context)
                name = f"{node.name}_nhwc"
                self.physical[root] = self._kernel(
                    kernel, [self._nchw(root)], _shape(layout), layout.dtype, name, [root]
                )
        return self.physical[root]

    def _planar_input(self, value: fx.Node) -> tuple[fx.Node, Layout]:
        """A value in planar order, converted once."""
        root = self.plan.root(value)
        layout = planar(self.plan.layouts[root])
        if root not in self.planar:
            source, physical = self._physical_input(value)
            self.planar[root] = self._reorder(source, physical, layout, [root])
        return self.planar[root], layout

    def _nchw(self, node: fx.Node) -> fx.Node:
        plain: fx.Node = self._plain(node)
        return plain if rank(node) == 4 else self._reshape(plain, _nchw(image_layout(node)))

    def _reshape(self, source: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        return self._call(aten.reshape.default, (source, [-1, *shape]))

    def _logical(self, source: fx.Node, node: fx.Node) -> fx.Node:
        return self._reshape(source, tuple(int(size) for size in value_of(node).shape[1:]))

    def _step(self, step: Step) -> None:
        if step.output in self.plan.in_place:
            self._one_tensor(step)
            return
        if step.output in self.orders.planar:
            self._planar_step(step)
            return
        if step.output in self.orders.rows:
            self._sparse_rows(step)
            return
        inputs, layouts = [], []
        for value, plain in zip(step.inputs, step.plain_inputs, strict=True):
            source, layout = (
                self._plain_input(step, value) if plain else self._physical_input(value)
            )
            inputs.append(source)
            layouts.append(layout)
        output = self._output_layout(step)
        kernel = self.context.kernel(step, layouts, output)
        nchw = step.plain_output and not step.is_rows
        shape = _nchw(output) if nchw else _shape(output)
        made = self._kernel(kernel, inputs, shape, output.dtype, step.output.name, step.nodes)
        if not step.plain_output:
            self.physical[step.output] = made
        elif nchw and rank(step.output) == 4:
            self.plain[step.output] = made
        else:
            self.plain[step.output] = self._logical(made, step.output)

    def _planar_step(self, step: Step) -> None:
        taken = [self._planar_input(value) for value in step.inputs]
        output = planar(self.plan.layouts[step.output])
        kernel = self.context.kernel(step, [layout for _, layout in taken], output)
        name, sources = step.output.name, [source for source, _ in taken]
        self.planar[step.output] = self._kernel(
            kernel, sources, output.shape, output.dtype, name, step.nodes
        )

    def _sparse_rows(self, step: Step) -> None:
        """A sparse linear layer between plain rows."""
        inputs, layouts = [], []
        for value in step.inputs:
            rows, layout = self._plain_input(step, value)
            layouts.append(planar(layout))
            inputs.append(self._reorder(rows, layout, layouts[-1], [value]))
        output = dense_rows(step.output)
        planes = planar(output)
        kernel = self.context.kernel(step, layouts, planes)
        name = f"{step.output.name}_planes"
        made = self._kernel(kernel, inputs, planes.shape, output.dtype, name, step.nodes)
        rows = self._reorder(made, planes, output, step.nodes)
        self.plain[step.output] = self._logical(rows, step.output)

    def _reorder(self, source: fx.Node, x: Layout, y: Layout, nodes: list[fx.Node]) -> fx.Node:
        assert isinstance(self.context, Context), "planar tensors are for CPUs"
        kernel, name = reordered(x, y, self.context), f"{nodes[-1].name}_{y.order}"
        return self._kernel(kernel, [source], y.shape, y.dtype, name, nodes)

    def _one_tensor(self, step: Step) -> None:
        """The kernels of the inputs have each written their channels of the whole tensor."""
        shape, dtype = _shape(self.plan.layouts[step.output]), value_of(step.output).dtype
        parts = [self._to_physical(self.plan.root(value)) for value in step.inputs]
        self.physical[step.output] = self._call(
            torch.ops.graphopt.call_kernel.default,
            (parts, ONE_TENSOR, list(shape), dtype),
            None,
            step.output.name,
        )

    def _physical_input(self, value: fx.Node) -> tuple[fx.Node, Layout]:
        return self._to_physical(value), self.plan.layouts[self.plan.root(value)]

    def _plain_input(self, step: Step, value: fx.Node) -> tuple[fx.Node, Layout]:
        if not step.is_rows:
            return self._nchw(value), image_layout(value)
        layout = dense_rows(value)
        source = self._reshape(self._plain(value), _shape(layout))
        padded = padded_rows(value) if step.whole_dots else layout
        if padded == layout:
            return source, layout
        kernel = relayout(layout, padded, "nhwc", "nhwc", self.context)
        name = f"{value.name}_rows"
        return self._kernel(kernel, [source], _shape(padded), layout.dtype, name, [value]), padded

    def _output_layout(self, step: Step) -> Layout:
        if not step.plain_output:
            return self.plan.layouts[step.output]
        return dense_rows(step.output) if step.is_rows else image_layout(step.output)

    def _kernel(
        self,
        kernel: Kernel,
        inputs: list[fx.Node],
        shape: tuple[int, ...],
        dtype: str,
        name: str,
        nodes: list[fx.Node],
    ) -> fx.Node:
        if kernel.before is not None:
            first = kernel.before
            part = (first.kernel, inputs[:1], first.shape, first.dtype, f"{name}_sums", nodes)
            inputs = [self._kernel(*part), *inputs[1:]]
        constants = []
        for index, array in enumerate(kernel.constants):
            suffix = _CONSTANT_NAMES[index] if index < len(_CONSTANT_NAMES) else str(index)
            array = np.ascontiguousarray(array)
            transform = kernel.load_transform if index == 0 else None
            if transform is None:
                tensor = torch.from_numpy(array)
            else:  # never written: only its shape matters, and untouched pages cost nothing
                tensor = torch.empty(transform.size, dtype=getattr(torch, transform.dtype))
            constant = self._parameter(f"{name}_{suffix}", tensor)
            if transform is not None:
                self._loaded(str(constant.target), array, transform)
            constants.append(constant)
        self.lowered.functions.setdefault(kernel.name, kernel.function)
        layer = ", ".join(origins(nodes))
        if kernel.tunable is not None:
            self.lowered.tunable.append((kernel.tunable, layer))
        forms = self.orders.forms.get(nodes[-1])
        self.lowered.calls.append(kernel_row(kernel, layer, nodes[0], dtype, forms))
        torch_dtype = getattr(torch, dtype)
        tensors = [inputs[0], *constants, *inputs[1:]]
        arguments = (tensors, kernel.name, list(shape), torch_dtype)
        return self._call(torch.ops.graphopt.call_kernel.default, arguments, None, name)

    def _loaded(self, parameter: str, array: np.ndarray[Any, Any], made: LoadTransform) -> None:
        """Note that a session makes ``parameter`` of ``array``."""
        self.lowered.stored[parameter] = array
        self.lowered.functions.setdefault(made.name, made.function)
        result = TensorSpec(parameter, made.dtype, (made.size,))
        self.lowered.transforms.append(WeightTransform(parameter, made.name, result))


def _shape(layout: Layout) -> tuple[int, ...]:
    """A physical tensor's dimensions after the batch."""
    return layout.shape


def _is_nchw(layout: Layout) -> bool:
    """True where the physical memory is that of the plain tensor."""
    return layout.is_dense and (layout.height * layout.width == 1 or layout.channels == 1)


def _nchw(layout: Layout) -> tuple[int, ...]:
    return layout.channels, layout.height, layout.width
