"""What each granularity leaves behind, on layers of every kind, shape and grouping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt import ops
from graphopt.errors import PassError
from graphopt.passes.prune import (
    NM,
    Block,
    Element,
    Filter,
    Global,
    Gradual,
    PerLayer,
    Prune,
    Random,
)
from graphopt.passes.prune.layout import LAYERS, Layout
from tests.passes.helpers import reasons
from tests.passes.prune.support import capture, granules_of, masks, seeded, small_cnn, sparsity

KINDS = {
    "linear": (nn.Linear, ()),
    "conv1d": (nn.Conv1d, (9,)),
    "conv2d": (nn.Conv2d, (5, 6)),
    "conv3d": (nn.Conv3d, (3, 4, 3)),
    "conv_transpose1d": (nn.ConvTranspose1d, (9,)),
    "conv_transpose2d": (nn.ConvTranspose2d, (3, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d, (2, 2, 3)),
}


@st.composite
def layers(draw):
    """A program of one layer, and its weight by output, input (of all groups) and tap."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    make, spatial = KINDS[kind]
    groups = 1 if kind == "linear" else draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (draw(st.integers(1, 11)) * groups for _ in range(2))
    options = {} if kind == "linear" else {"kernel_size": draw(st.integers(1, 3)), "groups": groups}
    if kind.startswith("conv") and "transpose" not in kind:
        options["padding"] = 1
    layer = seeded(lambda: make(inputs, outputs, **options))
    return capture(layer, 2, inputs, *spatial), groups, "transpose" in kind


def by_output(mask, groups, transposed):
    """``[groups, outputs, inputs, taps]``, element by element."""
    first, second = mask.shape[:2]
    flat = mask.reshape(first, second, -1)
    if not transposed:
        return flat.reshape(groups, first // groups, second, -1)
    rows = torch.zeros(groups, second, first // groups, flat.shape[2])
    for i in range(first):
        for o in range(second):
            rows[i // (first // groups), o, i % (first // groups)] = flat[i, o]
    return rows


def pruned(program, granularity, share=0.5):
    """The mask of the only layer, or None where it was declined."""
    schedule = PerLayer() if isinstance(granularity, NM) else PerLayer(share)
    result = Prune(Random(1), schedule, granularity)(program)
    return next(iter(masks(result).values()), None), result


FEW = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(layers(), st.floats(0, 1))
def test_elements_are_counted_exactly(drawn, share):
    program, _, _ = drawn
    mask, result = pruned(program, Element(), share)
    weight = next(iter(program.graph_module.parameters()))
    expected = round(share * weight.numel())
    zeros = 0 if mask is None else int((mask == 0).sum())
    assert zeros == expected
    assert result.history[-1].rewrites == (expected > 0)


@FEW
@given(layers(), st.integers(1, 4), st.integers(1, 4))
def test_blocks_are_zero_or_one_and_aligned_within_a_group(drawn, outputs, inputs):
    program, groups, transposed = drawn
    mask, result = pruned(program, Block(inputs, outputs))
    if mask is None:
        assert result.history[-1].declines or result.history[-1].rewrites == 0
        return
    rows = by_output(mask, groups, transposed)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    for top in range(0, rows.shape[1], outputs):
        for left in range(0, rows.shape[2], inputs):
            block = rows[:, top : top + outputs, left : left + inputs].flatten(1, 2)
            assert torch.equal(block.amin(1), block.amax(1))


@FEW
@given(layers(), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (2, 3)]))
def test_n_of_every_m_inputs_stay(drawn, pattern):
    program, groups, transposed = drawn
    n, m = pattern
    mask, result = pruned(program, NM(n, m))
    inputs = Layout.of(next(n for n in result.graph.nodes if ops.is_op(n, *LAYERS))).sizes[2]
    if inputs < m:
        assert mask is None
        return
    rows = by_output(mask, groups, transposed)
    for left in range(0, inputs, m):
        held = rows[:, :, left : left + m]
        assert bool((held.sum(2) == min(n, held.shape[2])).all())


@FEW
@given(layers())
def test_filters_are_whole(drawn):
    program, groups, transposed = drawn
    mask, _ = pruned(program, Filter())
    if mask is not None:
        rows = by_output(mask, groups, transposed).flatten(2)
        assert torch.equal(rows.amin(2), rows.amax(2))
        assert int((rows[:, :, 0] == 0).sum()) == round(rows.shape[0] * rows.shape[1] / 2)


@FEW
@given(layers(), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_means_and_sizes_are_those_of_the_blocks(drawn, outputs, inputs, whole):
    program, _, transposed = drawn
    granularity = Filter() if whole else Block(inputs, outputs)
    for one in granules_of(program, granularity):
        (weight,) = one.weights
        values = weight.tensor(program)
        rows = by_output(values, weight.layout.groups, transposed)
        groups, high, wide, taps = one.shape
        means = one.mean({weight: values})
        sizes = torch.as_tensor(one.sizes).expand(one.shape)
        a, b = (1, rows.shape[2]) if whole else (outputs, inputs)
        assert one.elements == values.numel() == int(sizes.sum())
        for y in range(high):
            for x in range(wide):
                block = rows[:, y * a : (y + 1) * a, x * b : (x + 1) * b]
                block = block.reshape(groups, -1, 1) if taps == 1 else block.flatten(1, 2)
                torch.testing.assert_close(means[:, y, x], block.mean(1))
                assert bool((sizes[:, y, x] == block.shape[1]).all())


def test_two_of_four_of_a_network():
    program = Prune(granularity=NM(), exclude=("0",))(capture(small_cnn(), 1, 3, 8, 8))
    assert sparsity(masks(program)) == 0.5
    assert all(layer.text == "50.0% zeros" for layer in program.history[-1].layers)


def test_a_schedule_on_its_way_breaks_no_pattern():
    """Below the sparsity of the pattern fewer go, and only those that the pattern lets go."""
    program = capture(small_cnn(), 1, 3, 8, 8)
    part = Prune(schedule=Gradual(initial=0.25), granularity=NM(), exclude=("0",))(program)
    full = Prune(granularity=NM(), exclude=("0",))(program)
    some, all_ = masks(part), masks(full)
    assert sparsity(some) == pytest.approx(0.25, abs=0.001)
    assert all(bool((some[name] >= all_[name]).all()) for name in all_)


@pytest.mark.parametrize(
    ("granularity", "reason"),
    [
        (Block(), "it has 16 x 3 channels a group, less than a block of 1 x 4"),
        (Block(2, 32), "it has 16 x 3 channels a group, less than a block of 32 x 2"),
        (NM(), "it has 3 input channels a group, fewer than m=4"),
    ],
)
def test_layers_too_small_for_the_pattern_decline(granularity, reason):
    schedule = PerLayer() if isinstance(granularity, NM) else Global(0.5)
    program = Prune(schedule=schedule, granularity=granularity, layers=("0",))(
        capture(small_cnn(), 1, 3, 8, 8)
    )
    assert program.history[-1].rewrites == 0
    assert reason in reasons(program)
    assert program.history[-1].notes == ("no layer to prune",)


def test_one_filter_is_all_or_nothing():
    program = Prune(granularity=Filter())(capture(nn.Linear(4, 1), 2, 4))
    assert reasons(program) == ["it has one filter"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Block(0),
            "granularity block: inputs and outputs must be at least 1, not 0 and 1",
        ),
        (lambda: NM(4, 4), "granularity n-m: n must be at least 1 and less than m, not 4 of 4"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(PassError) as caught:
        make()
    assert str(caught.value) == message
