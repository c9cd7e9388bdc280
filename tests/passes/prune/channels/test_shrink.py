"""What ``shrink`` and ``mask`` ask of their callers, and what they leave."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.contract import difference
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes.prune import channels
from tests.models import example
from tests.passes.helpers import network
from tests.passes.prune.channels.helpers import cut, draw, masked, shrunk


def small_network() -> go.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return go.capture(model.eval(), (example(2, 3, 6, 6),))


def edit_of(program: go.Program) -> tuple[Edit, channels.Group]:
    edit = Edit(program.clone(), "prune")
    (group,) = channels.groups(edit.program)
    return edit, group


@pytest.mark.parametrize(
    ("keep", "complaint"),
    [
        ([], "the kept channels must be a vector of at least one index"),
        ([1, 8], "the kept channels must be 0 to 7"),
        ([-1], "the kept channels must be 0 to 7"),
        ([1, 1], "a channel is named twice"),
    ],
)
def test_a_choice_that_is_not_valid(keep: list[int], complaint: str) -> None:
    for change in (channels.shrink, channels.mask):
        edit, group = edit_of(small_network())
        with pytest.raises(PassError) as caught:
            change(edit, {group: torch.tensor(keep, dtype=torch.int64)})
        assert str(caught.value) == f"prune: channels of node 'conv2d': {complaint}"


def test_groups_of_another_program_or_of_an_earlier_state() -> None:
    edit, group = edit_of(small_network())
    other, _ = edit_of(small_network())
    expected = (
        "prune: the groups of channels are not those of this program as it is now; "
        "ask for channels.groups(edit.program) again"
    )
    with pytest.raises(PassError) as caught:
        channels.shrink(other, {group: torch.tensor([0])})
    assert str(caught.value) == expected
    channels.shrink(edit, {group: torch.tensor([0, 1, 2])})
    with pytest.raises(PassError) as caught:
        channels.shrink(edit, {group: torch.tensor([0])})
    assert str(caught.value) == expected


def test_two_calls_of_groups_do_not_mix() -> None:
    edit = Edit(network("mobilenet").clone(), "prune")
    first, second = channels.groups(edit.program), channels.groups(edit.program)
    with pytest.raises(PassError) as caught:
        channels.shrink(edit, {first[0]: torch.tensor([0]), second[1]: torch.tensor([0])})
    assert str(caught.value) == "prune: the groups must come from one call of channels.groups"


def test_nothing_removed_changes_nothing() -> None:
    for change in (channels.shrink, channels.mask):
        edit, group = edit_of(small_network())
        change(edit, {group: torch.arange(8)})
        change(edit, {})
        assert edit.rewrites == 0


def test_the_input_program_keeps_its_tensors() -> None:
    program = small_network()
    before = {name: value.clone() for name, value in program.graph_module.state_dict().items()}
    shrunk(program, {0: torch.tensor([0])})
    masked(program, {0: torch.tensor([0])})
    after = program.graph_module.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_masked_channels_grow_back_and_shrunk_networks_train() -> None:
    program = small_network()
    x, kept = example(2, 3, 6, 6), {0: torch.tensor([0, 5])}
    for result in (masked(program, kept), shrunk(program, kept)):
        optimizer = torch.optim.SGD(result.graph_module.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (result(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
    soft = masked(program, kept).graph_module
    assert soft.get_parameter("0.weight").requires_grad
    assert not soft.get_parameter("0.weight")[1:5].any()


def test_training_mode() -> None:
    """Statistics of the batch, and the running ones that they update, are those of the channels that stay."""
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.BatchNorm2d(12),
    ]
    model = nn.Sequential(*parts, nn.Hardswish(), nn.Conv2d(12, 4, 1))
    program = go.capture(model.eval(), (example(2, 3, 8, 8),)).copy().train()
    choice = {0: torch.tensor([0, 5, 6]), 1: torch.tensor([1, 2, 3, 11])}
    zeroed, small = masked(program, choice), shrunk(program, choice)
    x = program.example_inputs[0] + 0.5
    # float32: 6e-8 a rounding, sums of at most a few hundred terms of size 1
    assert difference(zeroed(x), small(x)) <= 1e-4
    coupling = channels.couple(program)
    expected = cut(coupling, choice, zeroed.graph_module.state_dict())
    running = {n: v for n, v in small.graph_module.state_dict().items() if "running" in n}
    assert len(running) == 4
    for name, value in running.items():
        assert difference(expected[name], value) <= 1e-4


def test_a_dynamic_batch_stays_dynamic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(2 * 64, 5)
    )
    program = go.capture(
        model.eval().double(), (example(2, 3, 6, 6).double(),), dynamic_batch=(1, 8)
    )
    choice = {0: torch.tensor([1])}
    zeroed, small = masked(program, choice), shrunk(program, choice)
    for batch in (1, 3, 8):
        x = example(batch, 3, 6, 6).double()
        with torch.no_grad():
            # float64, sums of at most 128 terms in another order
            assert difference(zeroed(x), small(x)) <= 1e-13


def test_several_rounds() -> None:
    """A network that was pruned is pruned again."""
    program = network("resnet")
    for seed in range(3):
        choice = draw(channels.groups(program), seed)
        zeroed, small = masked(program, choice), shrunk(program, choice)
        with torch.no_grad():
            # float32: 6e-8 a rounding, sums of at most a few hundred terms of size 1
            assert (
                difference(zeroed(*program.example_inputs), small(*program.example_inputs)) <= 1e-4
            )
        program = small


def test_channels_of_one_tensor_under_two_names() -> None:
    """Layers that share one weight still share it afterwards."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.start, self.end = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(self.first(self.start(x)).relu())
            result: torch.Tensor = self.end(y)
            return result

    program = go.capture(Tied().eval(), (example(3, 4),))
    (group,) = channels.groups(program)
    small = shrunk(program, {0: torch.tensor([0, 2, 3])})
    assert group.size == 6
    weights = {id(p) for n, p in small.graph_module.named_parameters() if p.shape == (3, 3)}
    assert len(weights) == 1


def test_counts_are_rounded_to_what_kernels_like() -> None:
    model = nn.Sequential(nn.Conv2d(3, 100, 1), nn.ReLU(), nn.Conv2d(100, 4, 1))
    (group,) = channels.groups(go.capture(model.eval(), (example(1, 3, 4, 4),)))
    assert [group.count(wanted, 16) for wanted in (0, 23, 24, 40, 96, 99, 100)] == [
        16,
        16,
        32,
        48,
        96,
        96,
        100,
    ]
    assert group.count(37.4) == 37
    assert group.count(3, 128) == 3  # no multiple of 128 there
    with pytest.raises(ValueError, match=r"^101 of the 100 channels of conv2d cannot be kept$"):
        group.best(torch.rand(100), 101)


def test_the_coupling_graph() -> None:
    coupling = channels.couple(network("resnet"))
    graph = coupling.graph
    assert {node for node in graph if isinstance(node, channels.Group)} == set(coupling.groups)
    for group in coupling.groups:
        assert {*group.layers, *group.readers} <= set(graph[group])
