"""Every pass that runs in any test is verified from outside, on inputs that its own driver has not seen."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils import _pytree as pytree

import graphopt as go
from graphopt import driver
from graphopt.contract import difference
from graphopt.passing import Pass
from graphopt.verify import verify

# The same examples in every run, so that a red build is the change's doing; ``make test-all`` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):  # a keyword is also a folder's name
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _verified_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input program is untouched, the result well formed, its history one record longer, its contract kept."""
    run = driver.run

    def checked(pass_: Pass, program: go.Program) -> go.Program:
        before = _fingerprint(program)
        result = run(pass_, program)
        assert _fingerprint(program) == before, f"{pass_.name} changed its input"
        verify(result)
        held = dict(result.graph_module.state_dict(keep_vars=True))
        read = {str(node.target) for node in result.graph.nodes if node.op == "get_attr"}
        assert set(held) <= read, f"{pass_.name} left {set(held) - read}, which nothing reads"
        assert result.graph.python_code("self").src == result.graph_module.code
        assert result.history[:-1] == program.history
        _check_contract(pass_, program, result)
        return result

    monkeypatch.setattr(driver, "run", checked)


def _fingerprint(program: go.Program) -> tuple[object, ...]:
    """The graph's code, and which tensors in which state of change it reads."""
    tensors = program.graph_module.state_dict(keep_vars=True)
    state = [(name, id(tensor), tensor._version) for name, tensor in tensors.items()]
    return (str(program.graph), tuple(state), len(program.history))


def _check_contract(pass_: Pass, before: go.Program, after: go.Program) -> None:
    contract = pass_.promised()
    if (
        contract.kind == "lossy"
        or after.history[-1].error is None
        or not after.history[-1].rewrites
    ):
        return
    with torch.no_grad():
        inputs = pytree.tree_map_only(torch.Tensor, _another, before.example_inputs)
        error = difference(before(*inputs), after(*inputs))
        if contract.allows(error):
            return
        excess = _beyond_rounding(before, after, inputs) if contract.kind == "within" else error
    assert contract.allows(excess), (
        f"{pass_.name} promises {contract}, moved an unseen input by {error:.3g}"
    )


def _beyond_rounding(before: go.Program, after: go.Program, inputs: tuple[Any, ...]) -> float:
    """How much further from ``before`` in float64 the result is than ``before`` itself.

    A network that rounds by more than the contract (menet108 by 4.5e-4) moves by as much when its sums change their order.
    """
    exact = copy.deepcopy(before.graph_module).double()
    wanted = exact(*pytree.tree_map_only(torch.Tensor, _double, inputs))
    return difference(wanted, after(*inputs)) - difference(wanted, before(*inputs))


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _another(tensor: torch.Tensor) -> Any:
    """Other values of the same shape and type; integers (indices) are only reordered."""
    if not tensor.is_floating_point():
        return tensor.flip(0)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 1.5
