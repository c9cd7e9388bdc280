"""Each way in which channels couple, on the smallest network that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.contract import difference
from graphopt.passes.prune import channels
from tests.passes.helpers import captured
from tests.passes.prune.channels.helpers import masked, shrunk

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-12  # float64, sums of some hundred terms of size 1 in another order


def coupled(
    function: Callable[..., Tensor], *inputs: Tensor, **parts: nn.Module | Tensor
) -> channels.Coupling:
    """The coupling of a function between two 1 x 1 convolutions, ``first`` and ``last``, unless it has its own."""
    torch.manual_seed(0)
    for part in parts.values():
        part.double()
    return channels.couple(captured(function, *(inputs or (X,)), **parts))


def conv(inputs: int, outputs: int, kernel: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)  # type: ignore[arg-type]


def slots(group: channels.Group) -> dict[str, str]:
    """``parameter:axis`` -> role of each member."""
    return {f"{member.parameter}:{member.axis}": member.role for member in group.members}


def check(coupling: channels.Coupling) -> None:
    """Masked and shrunk agree with two thirds of the channels, and again with one."""
    for share in (0.67, 0.0):
        choice = {
            number: group.best(
                torch.arange(group.size).remainder(3).double(), group.count(share * group.size)
            )
            for number, group in enumerate(coupling.groups)
        }
        program = coupling.program
        zeroed, small = masked(program, choice), shrunk(program, choice)
        with torch.no_grad():
            inputs = tuple(x + 0.5 for x in program.example_inputs)
            assert difference(zeroed(*inputs), small(*inputs)) <= TOLERANCE
        assert small.stats().parameters < program.stats().parameters


def test_a_chain_of_convolution_and_norm() -> None:
    coupling = coupled(
        lambda x, first, norm, last: last(F.relu(norm(first(x)))),
        first=conv(4, 8, 3), norm=nn.BatchNorm2d(8), last=conv(8, 3),
    )  # fmt: skip
    (group,) = coupling.groups
    assert (group.size, group.blocks, group.name) == (8, 1, "conv2d")
    assert slots(group) == {
        "first.weight:0": "output",
        "first.bias:0": "bias",
        "norm.weight:0": "scale",
        "norm.bias:0": "shift",
        "norm.running_mean:0": "statistic",
        "norm.running_var:0": "statistic",
        "last.weight:1": "input",
    }
    assert [node.name for node in group.layers] == ["conv2d"]
    assert [node.name for node in group.readers] == ["conv2d_1"]
    assert {node.name: reason for node, reason in coupling.frozen.items()} == {
        "conv2d_1": "its channels are an output of the network"
    }
    assert {node.name: share for node, share in coupling.share.items()} == {
        "conv2d": 1,
        "conv2d_1": 0,
    }
    check(coupling)


def test_a_residual_couples_both_branches() -> None:
    def network(x: Tensor, first: nn.Module, inner: nn.Module, last: nn.Module) -> Tensor:
        y = first(x)
        return last(F.relu(y + inner(y)))  # type: ignore[no-any-return]

    coupling = coupled(network, first=conv(4, 6), inner=conv(6, 6, 3, padding=1), last=conv(6, 2))
    (group,) = coupling.groups
    assert [node.name for node in group.layers] == ["conv2d", "conv2d_1"]
    assert slots(group) | {"inner.weight:1": "input", "inner.weight:0": "output"} == slots(group)
    check(coupling)


def test_a_concatenation_keeps_branches_apart() -> None:
    coupling = coupled(
        lambda x, one, two, last: last(torch.cat([one(x), two(x)], 1)),
        one=conv(4, 3), two=conv(4, 5), last=conv(8, 2),
    )  # fmt: skip
    assert [group.size for group in coupling.groups] == [3, 5]
    (member,) = (m for m in coupling.groups[1].members if m.parameter == "last.weight")
    assert member.channel.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4]
    check(coupling)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_goes_with_its_inputs(multiplier: int) -> None:
    coupling = coupled(
        lambda x, first, depthwise, last: last(depthwise(first(x))),
        first=conv(4, 6), depthwise=conv(6, 6 * multiplier, 3, groups=6), last=conv(6 * multiplier, 2),
    )  # fmt: skip
    (group,) = coupling.groups
    assert group.size == 6
    (member,) = (m for m in group.members if m.parameter == "depthwise.weight")
    assert member.channel.tolist() == [c for c in range(6) for _ in range(multiplier)]
    check(coupling)


def test_a_grouped_convolution_loses_equally_many_of_each_group() -> None:
    coupling = coupled(
        lambda x, first, grouped, last: last(grouped(first(x))),
        first=conv(4, 6), grouped=conv(6, 8, 3, groups=2), last=conv(8, 2),
    )  # fmt: skip
    inputs, outputs = coupling.groups
    assert (inputs.size, inputs.block.tolist()) == (6, [0, 0, 0, 1, 1, 1])
    assert (outputs.size, outputs.blocks) == (8, 2)
    (member,) = (m for m in inputs.members if m.parameter == "grouped.weight")
    assert member.channel.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (
        inputs.complaint(torch.tensor([0, 1, 3]))
        == "equally many channels of each of 2 blocks must be kept"
    )
    assert inputs.complaint(torch.tensor([0, 2, 3, 4])) is None
    small = shrunk(coupling.program, {0: torch.tensor([0, 2, 3, 4])})  # other columns in each group
    assert small.graph_module.get_parameter("grouped.weight").shape == (8, 2, 3, 3)
    weight = coupling.program.graph_module.get_parameter("grouped.weight")
    assert torch.equal(small.graph_module.get_parameter("grouped.weight")[:4], weight[:4, [0, 2]])
    assert torch.equal(small.graph_module.get_parameter("grouped.weight")[4:], weight[4:, [0, 1]])
    check(coupling)


def test_joined_groups_keep_one_channel_of_each_part() -> None:
    def network(x: Tensor, **p: nn.Module) -> Tensor:
        y = torch.cat([p[name](x) for name in ("a", "b", "c", "d")], 1)
        return p["grouped"](y)  # type: ignore[no-any-return]

    coupling = coupled(
        network,
        a=conv(4, 2),
        b=conv(4, 2),
        c=conv(4, 2),
        d=conv(4, 2),
        grouped=conv(8, 4, groups=2),
    )
    (group,) = coupling.groups
    assert (group.size, group.blocks, group.parts) == (8, 2, 4)
    assert group.count(0) == 4
    assert group.complaint(torch.tensor([0, 1, 4, 6])) == "an axis would lose all of its channels"
    kept = group.best(torch.tensor([9.0, 8, 2, 1, 9, 8, 7, 6]), 6)
    assert kept.tolist() == [0, 1, 2, 4, 5, 6]
    check(coupling)


def test_a_flattened_channel_is_all_of_its_pixels() -> None:
    coupling = coupled(
        lambda x, first, last: last(first(x).flatten(1)),
        first=conv(4, 3),
        last=nn.Linear(3 * 36, 5),
    )
    (group,) = coupling.groups
    (member,) = (m for m in group.members if m.role == "input")
    assert member.channel.tolist() == [c for c in range(3) for _ in range(36)]
    check(coupling)


def test_a_shared_layer_couples_its_inputs_and_outputs() -> None:
    def network(x: Tensor, first: nn.Module, shared: nn.Module, last: nn.Module) -> Tensor:
        return last(shared(shared(first(x))))  # type: ignore[no-any-return]

    coupling = coupled(network, first=conv(4, 5), shared=conv(5, 5), last=conv(5, 2))
    (group,) = coupling.groups
    assert group.size == 5
    assert {"shared.weight:0", "shared.weight:1"} <= slots(group).keys()
    check(coupling)


def test_a_gate_couples_with_what_it_scales() -> None:
    def network(x: Tensor, first: nn.Module, gate: nn.Module, last: nn.Module) -> Tensor:
        y = first(x)
        return last(y * torch.sigmoid(gate(F.adaptive_avg_pool2d(y, 1))))  # type: ignore[no-any-return]

    coupling = coupled(network, first=conv(4, 5), gate=conv(5, 5), last=conv(5, 2))
    assert [group.size for group in coupling.groups] == [5]
    check(coupling)


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_moves_into_the_reader_s_bias(bias: bool) -> None:
    coupling = coupled(
        lambda x, first, last: F.relu(last(torch.sigmoid(first(x)))),
        first=conv(4, 6), last=nn.Conv2d(6, 3, 3, bias=bias),
    )  # fmt: skip
    check(coupling)
    small = shrunk(coupling.program, {0: torch.tensor([1, 4])})
    weight = coupling.program.graph_module.get_parameter("last.weight")
    old = (
        coupling.program.graph_module.get_parameter("last.bias")
        if bias
        else torch.zeros(3, dtype=torch.float64)
    )
    expected = old + 0.5 * weight[:, [0, 2, 3, 5]].sum((1, 2, 3))
    assert torch.allclose(small.graph_module.get_parameter("last.bias"), expected, rtol=1e-12)


def test_a_constant_stays_where_the_reader_pads() -> None:
    coupling = coupled(
        lambda x, first, last: last(torch.sigmoid(first(x))),
        first=conv(4, 6),
        last=conv(6, 3, 3, padding=1),
    )
    assert not coupling.groups
    (reason, _) = coupling.frozen.values()
    assert reason == "conv2d_1 would read 0.5, not zero, from a removed channel"


def test_parts_of_a_split_may_differ_afterwards() -> None:
    def network(x: Tensor, first: nn.Module, one: nn.Module, two: nn.Module) -> Tensor:
        left, right = first(x).chunk(2, 1)
        return one(left) + two(right)  # type: ignore[no-any-return]

    coupling = coupled(network, first=conv(4, 8), one=conv(4, 2), two=conv(4, 2))
    assert [group.size for group in coupling.groups] == [4, 4]
    small = shrunk(coupling.program, {0: torch.tensor([1]), 1: torch.tensor([0, 2, 3])})
    (split,) = (n for n in small.graph.nodes if "split" in str(n.target))
    assert split.args[1] == [1, 3]
    check(coupling)


def test_a_channel_shuffle_ties_channels_in_step() -> None:
    def network(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
        y = first(x)
        y = y.reshape(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6)
        return last(y)  # type: ignore[no-any-return]

    coupling = coupled(network, first=conv(4, 8), last=conv(8, 2))
    (group,) = coupling.groups
    made, read = (m.channel.tolist() for m in group.members if m.parameter.endswith("weight"))
    assert made == [0, 1, 2, 3, 0, 1, 2, 3]
    assert read == [0, 0, 1, 1, 2, 2, 3, 3]
    check(coupling)


def test_pixel_shuffle_makes_one_channel_of_four() -> None:
    coupling = coupled(
        lambda x, first, last: last(F.pixel_shuffle(first(x), 2)),
        first=conv(4, 12),
        last=conv(3, 2),
    )
    assert [group.size for group in coupling.groups] == [3]
    check(coupling)


def test_a_group_norm_loses_whole_groups() -> None:
    coupling = coupled(
        lambda x, first, norm, last: last(norm(first(x))),
        first=conv(4, 12), norm=nn.GroupNorm(4, 12), last=conv(12, 2),
    )  # fmt: skip
    (group,) = coupling.groups
    assert group.size == 4
    small = shrunk(coupling.program, {0: torch.tensor([0, 3])})
    (norm,) = (n for n in small.graph.nodes if "group_norm" in str(n.target))
    assert norm.args[1] == 2
    check(coupling)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 4, 2).permute(2, 0, 3, 1, 4)
        y = (
            F.scaled_dot_product_attention(q, k, v)
            if self.fused
            else (q @ k.transpose(-2, -1)).softmax(-1) @ v
        )
        return self.out(y.transpose(1, 2).reshape(2, 5, 8))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [True, False])
def test_attention_loses_whole_heads(fused: bool) -> None:
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    coupling = coupled(lambda x, attention: attention(x), tokens, attention=Attention(fused))
    (group,) = coupling.groups
    assert group.size == 4
    (member,) = (m for m in group.members if m.role == "input")
    assert member.channel.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    check(coupling)


def test_features_of_query_and_key_couple_and_the_scale_stays() -> None:
    def network(x: Tensor, query: nn.Module, key: nn.Module, value: nn.Module) -> Tensor:
        return F.scaled_dot_product_attention(query(x), key(x), value(x))

    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    coupling = coupled(
        network, tokens, query=nn.Linear(6, 4), key=nn.Linear(6, 4), value=nn.Linear(6, 3)
    )
    (group,) = coupling.groups
    assert [node.name for node in group.layers] == ["linear", "linear_1"]
    small = shrunk(coupling.program, {0: torch.tensor([0])})
    (attention,) = (n for n in small.graph.nodes if "attention" in str(n.target))
    assert attention.kwargs["scale"] == 0.5
    check(coupling)


def test_a_bias_written_into_follows_its_channels() -> None:
    """As SwinV2 drops the bias of its keys."""

    def network(x: Tensor, weight: Tensor, bias: Tensor, last: nn.Module) -> Tensor:
        shift = bias.clone()
        shift[2:4].zero_()
        return last(F.linear(x, weight, shift))  # type: ignore[no-any-return]

    tokens = torch.randn(2, 5, 4, dtype=torch.float64)
    coupling = coupled(
        network, tokens, last=nn.Linear(6, 2),
        weight=nn.Parameter(torch.randn(6, 4, dtype=torch.float64)),
        bias=nn.Parameter(torch.randn(6, dtype=torch.float64)),
    )  # fmt: skip
    assert [group.size for group in coupling.groups] == [
        4,
        2,
    ]  # what is written into may not vanish
    check(coupling)
    small = shrunk(coupling.program, {0: torch.tensor([0, 3]), 1: torch.tensor([1])})
    (scatter,) = (n for n in small.graph.nodes if "slice_scatter" in str(n.target))
    assert scatter.args[3:] == (1, 2)


def test_a_transposed_convolution() -> None:
    coupling = coupled(
        lambda x, first, up, last: last(up(first(x))),
        first=conv(4, 5), up=nn.ConvTranspose2d(5, 6, 2, 2), last=conv(6, 2),
    )  # fmt: skip
    assert [group.size for group in coupling.groups] == [5, 6]
    check(coupling)


def test_the_last_axis_of_linear_layers() -> None:
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    coupling = coupled(
        lambda x, one, two: two(F.gelu(one(x))), tokens, one=nn.Linear(6, 8), two=nn.Linear(8, 6)
    )
    assert [group.size for group in coupling.groups] == [8]
    check(coupling)


def test_a_pruned_weight_loses_its_mask_too() -> None:
    coupling = coupled(
        lambda x, w, w_mask, last: last(F.conv2d(x, w * w_mask)),
        w=nn.Parameter(torch.randn(6, 4, 1, 1, dtype=torch.float64)),
        w_mask=torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(12).reshape(6, 4, 1, 1),
        last=conv(6, 2),
    )
    (group,) = coupling.groups
    assert {"w:0": "output", "w_mask:0": "output"}.items() <= slots(group).items()
    check(coupling)


FROZEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "output": (lambda x, a, b: a(x), "its channels are an output of the network"),
    "input": (lambda x, a, b: b(a(x) + x), "its channels meet an input of the network"),
    "layer_norm": (
        lambda x, a, b: b(F.layer_norm(a(x), (4, 6, 6))),
        "layer_norm normalises over its channels",
    ),
    "softmax": (lambda x, a, b: b(a(x).softmax(1)), "softmax mixes its channels"),
    "mean": (lambda x, a, b: b(a(x) * a(x).mean(1, keepdim=True)), "mean reduces over its channels"),
    "sort": (lambda x, a, b: b(a(x).sort(1).values), "sort (sort) is not understood"),
    "stride": (lambda x, a, b: b(a(x)[:, ::2].repeat(1, 2, 1, 1)), "slice_1 strides over it"),
    "select": (lambda x, a, b: b(a(x) * a(x)[:, 1:2]), "slice_1 is one channel alone"),
    "reciprocal": (lambda x, a, b: b(1 / a(x)), "reciprocal of zeros is not finite"),
    "uneven view": (lambda x, a, b: b(a(x).reshape(2, 6, 4, 6).reshape(2, 4, 6, 6)), "reshape splits it unevenly"),
    "one": (lambda x, a, b: b(F.group_norm(a(x), 1)), "all of its channels are coupled into one"),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_freezes_says_why(name: str) -> None:
    function, reason = FROZEN[name]
    coupling = coupled(function, a=conv(4, 4), b=conv(4, 4))
    first = next(iter(coupling.frozen))
    assert first.name == "conv2d"
    assert coupling.frozen[first] == reason


def test_nothing_to_prune_is_no_error() -> None:
    coupling = coupled(lambda x: x.relu())
    assert coupling.groups == ()
    assert not coupling.frozen
    assert isinstance(shrunk(coupling.program, {}), go.Program)
