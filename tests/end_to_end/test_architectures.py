"""float32 code against float64 eager, over architectures of three libraries."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import graphopt as go
from tests.end_to_end.support import compiled, run
from tests.zoo import build, names

QUICK = {"resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "lcnet_050"}
ROUNDING = 1e-5  # of the largest output: our own allowance beside four times eager float32's error


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=[] if name in QUICK else [pytest.mark.slow])
        for library, name in names()
    ],
)
def test_within_float32_rounding(library: str, name: str) -> None:
    """``max|ours - f64| <= 4 max|eager - f64| + 1e-5 max|f64|``."""
    model, inputs = build(library, name)
    artifact = compiled(go.capture(model, inputs))
    with torch.no_grad():
        eager = pytree.tree_leaves(model(*inputs))
        exact = pytree.tree_leaves(copy.deepcopy(model).double()(*(x.double() for x in inputs)))
    for ours, single, double in zip(run(artifact, inputs), eager, exact, strict=True):
        truth = double.numpy()
        bound = 4 * np.abs(single.numpy() - truth).max() + ROUNDING * np.abs(truth).max()
        assert np.abs(ours - truth).max() <= bound
