"""``Edit``: the handle through which a pass changes its private copy of a program, and ``Build``, which makes nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt import ops
from graphopt.errors import PassError
from graphopt.program import LayerChange, Program, attribute
from graphopt.progress import track

T = TypeVar("T")
_STACK = "nn_module_stack"
_INHERITED_META = (_STACK, "stack_trace")


def _name_of(target: Any) -> str | None:
    """``relu`` for ``aten.relu.default``; None leaves the choice to fx."""
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else None


class Build:
    """Makes nodes before an anchor; ``build.conv2d(x, w)`` emits the op table's overload of that name.

    Every node gets its shape and dtype (``meta["val"]``) at once by running it on fake tensors, and the provenance of
    the nodes it replaces. Its module is the first one's. A node that replaces one of the same operator stays in that one's
    module, and stands for the others' too: a convolution that takes in a batch norm is found under either name.
    Arguments are nodes, numbers or lists, as ATen takes them.
    """

    def __init__(self, program: Program, anchor: fx.Node, origins: Sequence[fx.Node] = ()) -> None:
        self._program = program
        self._anchor = anchor
        self._origins = tuple(origins) or (anchor,)

    def __getattr__(self, name: str) -> Callable[..., fx.Node]:
        op = ops.BY_NAME.get(name)
        if op is None:
            raise AttributeError(
                f"no operator {name!r} in the op table; use build.call(target, ...)"
            )
        return lambda *args, **kwargs: self.call(op.targets[0], *args, **kwargs)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of any overload (``torch.ops.aten.conv2d.default``)."""
        graph = self._program.graph
        with graph.inserting_before(self._anchor):
            node = graph.call_function(target, args, kwargs, name=_name_of(target))
        node.meta = self._meta(target)
        node.meta["val"] = propagate(node, fake_mode(self._program))
        return node

    def parameter(self, name: str, tensor: torch.Tensor, trainable: bool | None = None) -> fx.Node:
        """A new parameter (or buffer, for integers and ``trainable=False``), read by the returned node.

        ``name`` is a hint: a dot becomes part of the path, and a number is added where the name is taken.
        """
        module = self._program.graph_module
        path = _free_path(module, name)
        if trainable is None:
            trainable = tensor.is_floating_point()
        owner, leaf = _owner(module, path)
        if trainable:
            owner.register_parameter(leaf, torch.nn.Parameter(tensor.detach(), requires_grad=True))
        else:
            owner.register_buffer(leaf, tensor.detach())
        return self._read(path)

    def update(self, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
        """The ``get_attr`` node of a parameter that takes another value and keeps its name.

        Only for a parameter that nothing but the replaced nodes reads (``match.unshared``). Programs that share the old
        tensor are not touched.
        """
        set_tensor(self._program, node, tensor)
        return self._read(str(node.target))

    def _read(self, path: str) -> fx.Node:
        graph = self._program.graph
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.get_attr(path)
        node.meta = self._meta()
        node.meta["val"] = propagate(node, fake_mode(self._program))
        return node

    def _meta(self, target: Any = None) -> dict[str, Any]:
        same = [origin for origin in self._origins if origin.target == target]
        others = [origin for origin in self._origins if origin not in same]
        meta: dict[str, Any] = {}
        provenance: dict[str, None] = {}
        for origin in (*same, *others):
            provenance.update(dict.fromkeys(origin.meta.get("provenance", (origin.name,))))
            for key in _INHERITED_META:
                if key in origin.meta:
                    meta.setdefault(key, origin.meta[key])
        if same:
            stacks = [origin.meta.get(_STACK) or {} for origin in (*others, *reversed(same))]
            meta[_STACK] = {key: value for stack in stacks for key, value in stack.items()}
        return {**meta, "provenance": tuple(provenance)}


class Edit:
    """One pass at work on one program. The driver counts what goes through here."""

    def __init__(self, program: Program, name: str) -> None:
        self.program = program
        self.pass_name = name
        self.rewrites = 0
        self.declines: dict[tuple[str, str], None] = {}
        self.notes: list[str] = []
        self.layers: list[LayerChange] = []

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    def nodes(self, *names: str) -> Iterator[fx.Node]:
        """The calls of the named operators (all calls where none is named), safe against changes on the way."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node._erased:
                continue
            if not names or ops.is_op(node, *names):
                yield node

    def build(self, anchor: fx.Node, origins: Sequence[fx.Node] = ()) -> Build:
        """A ``Build`` whose nodes stand before ``anchor`` and carry the provenance of ``origins``."""
        return Build(self.program, anchor, origins)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every reader of ``old`` reads ``new``, except what ``new`` is computed by. Counts one rewrite."""
        if old is new:
            raise PassError(
                f"{self.pass_name}: the rewrite of node {old.name!r} returned that same node"
            )
        inside = _between(old, new)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
        self.rewrites += 1

    def replace_argument(self, node: fx.Node, argument: str, value: Any) -> None:
        """Set one argument of a call, by its schema name. Counts one rewrite."""
        index = ops.position(node, argument)
        if index >= len(node.args):  # arguments left at their defaults are not in the call
            node.args = (*node.args, *list(ops.bind(node).values())[len(node.args) : index + 1])
        node.update_arg(index, value)
        self.rewrites += 1

    def set_tensor(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Let a ``get_attr`` node read another tensor; programs that share the old one are not touched. Counts one."""
        set_tensor(self.program, node, tensor)
        self.rewrites += 1

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing reads. Counts one rewrite."""
        self.graph.erase_node(node)
        self.rewrites += 1

    def decline(self, node: fx.Node, reason: str) -> None:
        """Record why the pass leaves a node as it is (shown by ``--explain`` and in the history)."""
        self.declines[node.name, reason] = None

    def note(self, text: str) -> None:
        """A line for the history record."""
        self.notes.append(text)

    def layer_changed(
        self,
        node: fx.Node,
        parameters: tuple[int, int],
        macs: tuple[int, int],
        error: float | None = None,
        text: str = "",
    ) -> None:
        """Record what became of one layer: counts before and after, reconstruction error, and a word ("rank 32")."""
        modules = [path for path, _ in (node.meta.get(_STACK) or {}).values()]
        layer = modules[-1] if modules else ""
        self.layers.append(LayerChange(node.name, layer, parameters, macs, error, text))

    def progress(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Iterate with a progress bar on a terminal."""
        return track(items, f"{self.pass_name}: {label}", total)


def _between(old: fx.Node, new: fx.Node) -> set[fx.Node]:
    """``new`` and those of its ancestors that stand after ``old``."""
    found, stack = {new}, [new]
    while stack:
        near = [n for n in stack.pop().all_input_nodes if old < n and n not in found]
        found.update(near)
        stack.extend(near)
    return found


def set_tensor(program: Program, node: fx.Node, tensor: torch.Tensor) -> None:
    """Let a ``get_attr`` node of ``program`` read another tensor: a parameter stays one, a buffer stays one."""
    owner, leaf = _owner(program.graph_module, str(node.target))
    old = attribute(program.graph_module, str(node.target))
    if isinstance(old, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    else:
        tensor = tensor.detach()
    setattr(owner, leaf, tensor)
    node.meta["val"] = propagate(node, fake_mode(program))


def fake_mode(program: Program) -> FakeTensorMode:
    """The mode in which the program's shapes were recorded."""
    return graph_mode(program.graph)


def graph_mode(graph: fx.Graph) -> FakeTensorMode:
    """``fake_mode`` of a graph whose placeholders carry fake tensors."""
    mode = detect_fake_mode([n.meta.get("val") for n in graph.nodes if n.op == "placeholder"])
    return mode or FakeTensorMode()


def propagate(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of a node from the fake values of its arguments."""
    if node.op == "get_attr":
        module = node.graph.owning_module
        assert module is not None
        return mode.from_tensor(attribute(module, str(node.target)), static_shapes=True)
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    info = ops.info(node)
    with mode, torch.no_grad():
        if info is not None and info.kind == "pad" and _is_symbolic(args[0]):
            return _padded(args[0], ops.bind(node)["pad"])
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_symbolic(value: Any) -> bool:
    return any(isinstance(size, torch.SymInt) for size in value.shape)


def _padded(value: Any, pad: Sequence[int]) -> Any:
    """A padded value. torch's own fake form fixes every size of a dynamic one at its example."""
    sizes = list(value.shape)
    for axis, widths in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        sizes[-axis] += sum(widths)
    return value.new_empty(sizes)


def _owner(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    """The submodule that holds the last part of a dotted path; missing ones are made."""
    *parents, leaf = path.split(".")
    for part in parents:
        child = getattr(module, part, None)
        if child is None:
            child = torch.nn.Module()
            module.add_module(part, child)
        module = child
    return module, leaf


def _free_path(module: torch.nn.Module, name: str) -> str:
    path, number = name, 0
    while True:
        with suppress(AttributeError):
            attribute(module, path)
            number += 1
            path = f"{name}_{number}"
            continue
        return path


def sweep(program: Program) -> int:
    """Erase calls and parameters that nothing reads; delete unread tensors from the module. Returns nodes erased."""
    erased = 0
    for node in reversed(list(program.graph.nodes)):
        if node.users or ops.has_effect(node):
            continue
        program.graph.erase_node(node)
        erased += 1
    program.graph_module.delete_all_unused_submodules()
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name in _tensor_names(program.graph_module):
        if name not in used:
            owner, leaf = _owner(program.graph_module, name)
            delattr(owner, leaf)
    return erased


def _tensor_names(module: torch.nn.Module) -> list[str]:
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return parameters + [name for name, _ in module.named_buffers(remove_duplicate=False)]
