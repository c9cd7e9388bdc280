"""Indices outside of an embedding's table are refused by a session: compiled code would read past the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import InputError
from graphopt.index_bounds import index_bounds


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(11, 4), nn.Embedding(3, 4)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor, steps: Tensor) -> Any:
        words = self.words(ids.reshape(-1, 5)) * mask.unsqueeze(-1)
        return words + self.kinds(kinds.to(torch.int32)) + self.words(steps.cumsum(1))


def _inputs() -> tuple[Tensor, ...]:
    ids = torch.tensor([[0, 10, 3, 3, 1]])
    return ids, torch.tensor([[0, 2, 1, 1, 0]]), torch.ones_like(ids), torch.ones_like(ids)


def test_values_that_become_indices_are_bounded_by_the_table() -> None:
    program = go.capture(_Tokens().eval(), _inputs())
    assert index_bounds(program) == {"ids": 11, "kinds": 3}


def test_a_session_names_the_argument_and_the_value() -> None:
    artifact = go.compile(go.capture(_Tokens().eval(), _inputs()), threads=1)
    session = artifact.session()
    arrays = [tensor.numpy() for tensor in _inputs()]
    with torch.no_grad():
        wanted = artifact.program(*_inputs()).numpy()
    np.testing.assert_allclose(session(*arrays), wanted, rtol=1e-6)
    for value in (11, -1):
        wrong = arrays[0].copy()
        wrong[0, 2] = value
        with pytest.raises(InputError) as caught:
            session(wrong, *arrays[1:])
        assert str(caught.value) == (
            f"argument 'ids' holds {value}; it must be int64 [1, 5] of 0..10"
        )
    assert "int64 [1, 5] of 0..2" in repr(session)
