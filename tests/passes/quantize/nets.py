"""Small networks and what the tests ask of their programs."""

import torch
from torch import nn

import graphopt as go
from graphopt import ops
from graphopt.passes.quantize import InsertFakeQuant
from graphopt.passes.quantize.regions import is_fake_quantize


class Net(nn.Module):
    """A module whose forward is a function of it."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.body(self, x)


class Pair(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.inner = Net(forward, **layers)

    def forward(self, x, y):
        return self.inner.body(self.inner, x, y)


def capture(forward, *shape, dynamic_batch=None, **layers):
    torch.manual_seed(0)
    return go.capture(Net(forward, **layers).eval(), (torch.randn(*shape),), dynamic_batch)


def conv(inputs, outputs, kernel=3, **options):
    torch.manual_seed(inputs * 31 + outputs)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def data(program, count=4):
    generator = torch.Generator().manual_seed(1)
    shape = program.example_inputs[0].shape
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def insert(program, **options):
    return InsertFakeQuant(calibration=data(program), **options)(program)


def chain(program):
    """The calls in order; ``fq`` marks an activation's fake quantization (weights' are left out)."""
    names = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if is_fake_quantize(node):
            if node.args[0].op != "get_attr":
                names.append("fq")
            continue
        op = ops.info(node)
        names.append(op.name if op else node.target.__name__)
    return names


def declines(program):
    return dict(program.history[-1].declines)


def activation_quantizers(program):
    nodes = [n for n in program.graph.nodes if is_fake_quantize(n)]
    return [n for n in nodes if n.args[0].op != "get_attr"]
