"""A compiled network on an emulated processor: the graph of kernel calls is walked here, each call is done there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.artifact import Artifact
from graphopt.backends.isas import ISAS
from graphopt.backends.lower.emit import Lowered, emit
from graphopt.backends.lower.images import choose
from graphopt.backends.lower.one_tensor import ONE_TENSOR
from graphopt.backends.lower.plan import make_plan
from graphopt.backends.lower.step import Context
from graphopt.backends.targets import resolve
from graphopt.batch import image_by_image
from tests.backends.arm.machine import PROCESSORS, Machine

Arrays = list[np.ndarray[Any, Any]]
_CALL = torch.ops.graphopt.call_kernel.default


def lowered(artifact: Artifact) -> Lowered:
    """The graph of kernel calls that the artifact's library was made of."""
    isa = ISAS[resolve(artifact.manifest.target).isa]
    program = choose(artifact.program, isa, artifact.manifest.threads).program
    return emit(make_plan(program), Context(program, isa, artifact.manifest.threads, {}))


class _Calls(fx.Interpreter):
    """Runs the graph; kernels write into noise, the inputs of a concatenation into one tensor."""

    def __init__(self, graph: Lowered, machine: Machine) -> None:
        super().__init__(graph.module)
        self.machine = machine
        self.whole: dict[fx.Node, fx.Node] = {}  # a part of a tensor -> the call that says so
        self.memory: dict[fx.Node, np.ndarray] = {}
        for node in reversed(graph.module.graph.nodes):
            if node.target == _CALL and node.args[1] == ONE_TENSOR:
                for part in node.args[0]:
                    self.whole[part] = self.whole.get(node, node)

    def run_node(self, n: fx.Node) -> Any:
        if n.target != _CALL:
            return super().run_node(n)
        tensors, name, shape, dtype = self.fetch_args_kwargs_from_env(n)[0]
        owner = self.whole.get(n, n)
        if owner not in self.memory:
            like = torch.empty((tensors[0].shape[0], *shape), dtype=dtype).numpy()
            noise = np.random.default_rng(0).integers(0, 256, like.nbytes).astype(np.uint8)
            self.memory[owner] = noise.view(like.dtype).reshape(like.shape)
        if name != ONE_TENSOR:
            arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
            self.memory[owner] = self.machine.call(name, arrays, self.memory[owner]).copy()
        return torch.from_numpy(self.memory[owner])


def run(artifact: Artifact, inputs: tuple[torch.Tensor, ...]) -> Arrays:
    """The outputs, flattened, of the artifact's own library."""
    graph = lowered(artifact)
    processor = PROCESSORS[resolve(artifact.manifest.target).isa]
    with Machine(artifact.library, processor) as machine, torch.no_grad():
        _make_weights(graph, machine)

        def one(arrays: Any) -> Arrays:
            values = _Calls(graph, machine).run(*map(torch.from_numpy, arrays))
            return [value.contiguous().numpy() for value in pytree.tree_leaves(values)]

        arrays = [x.numpy() for x in pytree.tree_leaves(inputs)]
        return image_by_image(one, arrays) if artifact.manifest.image_by_image else one(arrays)


def _make_weights(graph: Lowered, machine: Machine) -> None:
    """What a session does when it loads a file: weights that are stored in another form are transformed."""
    for made in graph.transforms:
        (size,) = made.result.shape
        assert isinstance(size, int)
        out = np.zeros(size, made.result.dtype)
        array = machine.call(made.function, [graph.stored[made.result.name]], out)
        getattr(graph.module, made.result.name).data = torch.from_numpy(array.copy())
