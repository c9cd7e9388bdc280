"""The networks of the benchmarks: repeatable, of the published sizes, and BERT's mask hides what it should."""

from __future__ import annotations

import pytest
import torch

from graphopt.bench.bert import Bert, Shape
from graphopt.bench.networks import NETWORKS

_SMALL = Shape(layers=2, hidden=32, heads=4, intermediate=64, vocabulary=50, positions=16)


def test_minilm_has_the_published_parameters() -> None:
    """22.7 M with the pooler's 384 x 385, which is left out."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Bert().parameters())
    assert count == 22_713_216 - 384 * 385


def test_a_masked_token_changes_no_other() -> None:
    torch.manual_seed(0)
    model = Bert(_SMALL).eval()
    ids = torch.arange(8).reshape(1, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    other = ids.clone()
    other[:, 6:] = 40
    torch.testing.assert_close(model(ids, mask)[:, :6], model(other, mask)[:, :6], rtol=0, atol=0)
    assert not torch.equal(model(ids, torch.ones_like(mask))[:, :6], model(ids, mask)[:, :6])


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_repeat_and_follow_the_batch(name: str) -> None:
    first, second = NETWORKS[name].inputs(), NETWORKS[name].inputs()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {tensor.shape[0] for tensor in NETWORKS[name].inputs(3)} == {3}


def test_weights_repeat() -> None:
    first, second = (NETWORKS["squeezenet1_1"].model().state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
