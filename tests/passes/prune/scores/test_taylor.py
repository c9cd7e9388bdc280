"""``|sum g * w|``, averaged over batches."""

import pytest
import torch

from graphopt.errors import CalibrationError, PassError
from graphopt.passes.prune import Block, Taylor
from tests.passes.prune.support import capture, linear, scores_of

W = torch.tensor([[1.0, -2.0, 0.5, 4.0], [3.0, 1.0, -1.0, 0.0]])
PROGRAM = capture(linear(W.tolist()), 2, 4)
GENERATOR = torch.Generator().manual_seed(3)
DATA = [
    (torch.randn(2, 4, generator=GENERATOR), torch.randn(2, 2, generator=GENERATOR))
    for _ in range(3)
]


def changes():
    """``g * w`` for each batch; L is the mean of ``(W x - t)**2`` over 2 samples and 2 outputs."""
    return [(2 / 4) * (x @ W.T - t).T @ x * W for x, t in DATA]


def test_elements():
    (scores,) = scores_of(Taylor(), PROGRAM, data=DATA, loss="mse")
    expected = sum(change.abs() for change in changes()) / 3
    torch.testing.assert_close(scores.reshape(2, 4), expected)


def test_a_block_is_summed_before_the_magnitude():
    (scores,) = scores_of(Taylor(), PROGRAM, Block(), data=DATA, loss="mse")
    expected = sum(change.mean(1).abs() for change in changes()) / 3
    torch.testing.assert_close(scores.flatten(), expected)
    (squared,) = scores_of(Taylor(squared=True), PROGRAM, Block(), data=DATA, loss="mse")
    expected = sum(change.mean(1).square() for change in changes()) / 3
    torch.testing.assert_close(squared.flatten(), expected)


def test_a_loss_of_ones_own():
    (own,) = scores_of(Taylor(), PROGRAM, data=DATA, loss=lambda y, t: ((y - t) ** 2).mean())
    (named,) = scores_of(Taylor(), PROGRAM, data=DATA, loss="mse")
    assert torch.equal(own, named)


def test_large_batches_are_cut_to_the_captured_size():
    together = [tuple(torch.cat([pair[i] for pair in DATA]) for i in (0, 1))]
    (cut,) = scores_of(Taylor(), PROGRAM, data=together, loss="mse")
    (whole,) = scores_of(Taylor(), PROGRAM, data=DATA, loss="mse")
    assert torch.equal(cut, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "prune needs labelled data: pass data=batches, an iterable of (inputs, labels)",
        ),
        ({"data": []}, "prune: the labelled data holds no batch"),
        (
            {"data": [torch.randn(2, 4)]},
            "prune: a batch of labelled data must be (inputs, labels), not Tensor of 2",
        ),
        (
            {"data": [(torch.randn(2, 4), torch.randn(3, 2))]},
            "prune: a batch of labelled data holds 2 input(s) and 3 label(s)",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(options, message):
    with pytest.raises(CalibrationError) as caught:
        scores_of(Taylor(), PROGRAM, loss="mse", **options)
    assert str(caught.value) == message


def test_a_loss_that_does_not_fit_is_named():
    with pytest.raises(PassError) as caught:
        scores_of(Taylor(), PROGRAM, data=DATA, loss=lambda y, t: y)
    assert str(caught.value) == "prune: the loss must return one number, its mean over the batch"
    with pytest.raises(PassError) as caught:
        scores_of(Taylor(), PROGRAM, data=[(x, t[:, :1].long()) for x, t in DATA])
    assert str(caught.value).startswith(
        "prune: the loss fails on outputs of shape [[2, 2]] and labels of shape [2, 1]: "
    )
    with pytest.raises(PassError) as caught:
        scores_of(Taylor(), PROGRAM, data=DATA, loss=lambda y, t: (y - t).sum() / 0)
    assert str(caught.value).startswith("prune: the loss on the labelled data is ")
