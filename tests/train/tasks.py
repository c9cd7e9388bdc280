"""A small task that can be learnt in seconds, and a network with all that training has to treat with care."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import graphopt as go
from graphopt import ops
from graphopt.edit import Edit
from tests.models import example

CLASSES = 4


class Net(nn.Module):
    """Batch norm, dropout, an in-place activation."""

    def __init__(self, width: int = 8, drop: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        y = F.adaptive_avg_pool2d(F.relu(self.second(y)), 2).flatten(1)
        result: Tensor = self.fc(self.drop(y))
        return result


def net(width: int = 8, drop: float = 0.2, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(width, drop).eval()


def capture(model: nn.Module, size: int = 6) -> go.Program:
    return go.capture(model, (example(4, 1, size, size),), dynamic_batch=(1, 64))


def task(batches: int = 6, size: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Images with a bright quarter, which is the label."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(batches):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        images = torch.randn(size, 1, 6, 6, generator=generator) * 0.5
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 3 * (label // 2), 3 * (label % 2)
            image[:, row : row + 3, column : column + 3] += 1.0 + 0.5 * label
        data.append((images, labels))
    return data


@dataclass(frozen=True)
class Mask(go.Pass):
    """``W -> W * M`` for every layer, M without a share of the weights, the smallest."""

    name = "mask-smallest"
    contract = go.lossy

    share: float = 0.5

    def apply(self, edit: Edit) -> None:
        for node in edit.nodes("conv2d", "linear"):
            weight = ops.bind(node)["weight"]
            values = edit.program.tensor(weight).detach()
            mask = (values.abs() > values.abs().flatten().quantile(self.share)).float()
            build = edit.build(node)
            held = build.parameter(f"{weight.target}_mask", mask, trainable=False)
            edit.replace_argument(node, "weight", build.mul(weight, held))


def sgd(rate: float = 0.1) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def parameters_equal(one: go.Program, other: go.Program) -> bool:
    mine, theirs = (dict(p.graph_module.state_dict()) for p in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def nodes(program: go.Program, name: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if ops.is_op(node, name)]
