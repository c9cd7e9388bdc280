"""What a user can get wrong, and what he is told."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import TrainError
from tests.models import example
from tests.train.tasks import capture, net, sgd, task

X, Y = task(1)[0]
PROGRAM = capture(net())


def raises(message: str, data: Any, **options: Any) -> None:
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        go.fine_tune(PROGRAM, data, **options)


BAD_BATCHES = {
    "fine-tune: batch 1 of epoch 1 holds no labels; give batches of (inputs, labels), or learn from a "
    "teacher alone: distill with alpha=0": X,
    "fine-tune: batch 1 of epoch 1 is dict; give (inputs, labels), inputs a tensor or a tuple": {
        "image": X
    },
    "fine-tune: batch 1 of epoch 1 is 3 things; give (inputs, labels), inputs a tensor or a tuple": (
        X,
        Y,
        Y,
    ),
    "fine-tune: batch 1 of epoch 1: input 'x' must have size 6 in dimension 3, not 5": (
        X[..., :5],
        Y,
    ),
    "fine-tune: batch 1 of epoch 1: the program takes 1 input(s), 2 were given": ((X, X), Y),
    "fine-tune: batch 1 of epoch 1: input 'x' must have a batch of 1 to 64, not 80; capture with "
    "dynamic_batch=(low, high), or leave the last, smaller batch out": (X.repeat(5, 1, 1, 1), Y),
    "fine-tune: batch 1 of epoch 1: the loss does not take output float32[16, 4] with labels int64[8]: "
    "Expected input batch_size (16) to match target batch_size (8).": (X, Y[:8]),
    "fine-tune: batch 1 of epoch 1: the loss does not take output float32[16, 4] with labels int64[16]: "
    "Target 9 is out of bounds.": (X, torch.full((16,), 9)),
    "fine-tune: the loss is nan at step 1 (batch 1 of epoch 1); the batch itself holds NaN or infinity: "
    "check how it is prepared": (X * float("nan"), Y),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_batches(message: str) -> None:
    raises(message, [(X, Y), BAD_BATCHES[message]])


def test_a_loss_that_diverges_names_the_step_and_the_rate() -> None:
    with pytest.raises(
        TrainError,
        match=r"^fine-tune: the loss is (nan|inf) at step \d+ \(batch \d of epoch \d+\); lower the learning "
        r"rate \(now 1e\+10\) or clip gradients with clip_norm=1\.0$",
    ):
        go.fine_tune(PROGRAM, task(), epochs=9, optimizer=sgd(1e10))


def test_a_fixed_batch_says_how_to_capture() -> None:
    program = go.capture(net(), (X[:8],))
    message = (
        "fine-tune: batch 0 of epoch 1: input 'x' must have size 8 in dimension 0, not 16; capture with "
        "dynamic_batch=(low, high), or leave the last, smaller batch out"
    )
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        go.fine_tune(program, [(X, Y)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "option epochs must be at least 1, not 0"),
        ({"steps": 0}, "option steps must be at least 1 or None, not 0"),
        ({"clip_norm": 0.0}, "option clip_norm must be positive or None, not 0.0"),
        ({"patience": 2}, "option patience needs validation=batches to look at"),
        (
            {"scheduler_every": "batch"},
            "option scheduler_every must be 'step' or 'epoch', not 'batch'",
        ),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    raises(message, [(X, Y)], **options)


def test_an_unknown_option_lists_those_there_are() -> None:
    with pytest.raises(
        TrainError, match=r"^fine-tune has no option 'lr'; its options: epochs, steps, "
    ):
        go.fine_tune(PROGRAM, [(X, Y)], lr=0.1)  # type: ignore[call-arg]


def test_data_that_is_none() -> None:
    raises("fine-tune needs data: an iterable of batches (inputs, labels), not a Tensor", X)
    raises("fine-tune: the data holds no batch in epoch 1", [])
    raises(
        "fine-tune cannot go through a list_iterator twice; pass a list or a DataLoader",
        iter([(X, Y)]),
        epochs=2,
    )
    raises(
        "fine-tune: validation batch 0 is missing: the data holds no batch", [(X, Y)], validation=[]
    )


def test_a_program_without_parameters() -> None:
    program = go.capture(nn.ReLU(), (example(2, 3),))
    message = "fine-tune: the program has no parameter that requires a gradient"
    with pytest.raises(TrainError, match=f"^{message}$"):
        go.fine_tune(program, [(example(2, 3), torch.zeros(2, dtype=torch.int64))])


def test_several_outputs_need_a_loss() -> None:
    program = go.capture(nn.LSTM(3, 4, batch_first=True), (example(2, 5, 3),))
    with pytest.raises(
        TrainError, match=r"the program returns a tuple, not one tensor; pass loss=$"
    ):
        go.fine_tune(program, [(example(2, 5, 3), torch.zeros(2, dtype=torch.int64))])


def test_a_loss_must_be_one_number() -> None:
    raises(
        "fine-tune: batch 0 of epoch 1: the loss must give one number, not float32[16]",
        [(X, Y)],
        loss=nn.CrossEntropyLoss(reduction="none"),
    )
