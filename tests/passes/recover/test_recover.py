"""Training as a step of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt as go
from graphopt.errors import RecipeError, TrainError
from tests.train.tasks import capture, net, parameters_equal, task


class Unsized:
    """Batches that do not say how many there are."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


RECIPE = """
passes:
  - prune: {schedule: {global: 0.6}}
  - fine-tune: {epochs: 4, learning_rate: 0.1}
  - quantize
  - distill: {epochs: 2, learning_rate: 0.02, alpha: 0.3, temperature: 2, features: {norm: norm}, feature_weight: 0.1}
"""


def test_a_recipe_prunes_quantizes_and_recovers() -> None:
    data = task(12)
    whole = go.fine_tune(
        capture(net(drop=0)), data, epochs=4, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    recipe = go.Pipeline.from_text(
        RECIPE.replace(", features: {norm: norm}, feature_weight: 0.1", ""),
        data=data,
        calibration=[images for images, _ in data],
        teacher=whole,
    )
    result = recipe(whole)
    names = [record.name for record in result.history]
    assert names == ["fine-tune", "prune", "fine-tune", "quantize", "distill"]
    tuned = result.history[2]
    assert tuned.rewrites > 5
    assert tuned.notes[0].startswith("4 epoch(s), 48 step(s)")
    assert tuned.options["learning_rate"] == 0.1
    assert tuned.options["data"] == "<list>"
    score = go.evaluate(result, task(4, seed=8)).score
    assert score is not None
    assert score > 0.9
    zeros = sum(row.parameters - row.nonzero for row in result.stats().layers)
    assert zeros > 0.5 * result.stats().parameters


def test_a_recipe_prunes_while_it_trains() -> None:
    text = """
passes:
  - prune: &blocks {schedule: {gradual: {sparsity: 0.6, updates: 5, every: 6}}, score: taylor}
  - fine-tune: {epochs: 4, learning_rate: 0.1, prune: *blocks}
"""
    result = go.Pipeline.from_text(text, data=task(12))(capture(net(drop=0)))
    masks = [t for name, t in result.graph_module.named_buffers() if name.endswith("_mask")]
    assert sum(int((m == 0).sum()) for m in masks) == round(0.6 * sum(m.numel() for m in masks))
    assert len(result.history[-1].notes) == 1
    short = go.Pipeline.from_text(text, data=task(7))(capture(net(drop=0)))
    assert short.history[-1].notes[1:] == (
        "it ended before the pruning, whose last update is at step 30",
    )


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("{schedule: {global: 0.5}}", "gradual pruning needs schedule gradual, not global"),
        ("{shedule: gradual}", "option 'prune' of fine-tune: it has no 'shedule', not {"),
    ],
)
def test_errors_of_what_moves_the_masks(prune: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe:3: {re.escape(message)}"):
        go.Pipeline.from_text(f"\npasses:\n  - fine-tune: {{prune: {prune}}}")


def test_features_in_a_recipe() -> None:
    (_, _, _, distill) = go.Pipeline.from_text(RECIPE, data=task(1))
    assert isinstance(distill, go.passes.Distill)
    assert distill.features == {"norm": "norm"}


def test_the_pass_is_the_function() -> None:
    program, data = capture(net()), task(3)
    one = go.passes.FineTune(epochs=2, cosine=False, data=data)(program)
    other = go.fine_tune(program, data, epochs=2)
    assert parameters_equal(one, other)


def test_the_learning_rate_falls_along_a_cosine(tmp_path: Path) -> None:
    """To 0 at the last step, of a single epoch too; epoch by epoch where the data does not say how long it is."""
    data, log = task(4), tmp_path / "log"
    for given, wanted in ((data, [0.1, 0.0853553, 0.05, 0.0146447]), (Unsized(data), [0.1] * 4)):
        pass_ = go.passes.FineTune(epochs=1, learning_rate=0.1, data=given)
        keywords = pass_.keywords()
        keywords["log"] = log
        go.fine_tune(capture(net()), given, **keywords)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rates = [row["learning_rate"] for row in rows if row["event"] == "step"]
        assert rates == pytest.approx(wanted, rel=1e-5)


def test_a_run_that_goes_on_with_more_epochs_follows_their_cosine(tmp_path: Path) -> None:
    data, log = task(2), tmp_path / "log"
    for epochs in (1, 2):
        pass_ = go.passes.FineTune(
            epochs=epochs, learning_rate=0.1, data=data, checkpoint=str(tmp_path / "checkpoint")
        )
        keywords = pass_.keywords()
        keywords["log"] = log
        go.fine_tune(capture(net()), data, **keywords)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if row["event"] == "step"]
    # the step after the end has the rate that the first run ended with
    assert rates == pytest.approx([0.1, 0.05, 0.0, 0.0146447], rel=1e-5)


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (go.passes.FineTune(), "fine-tune needs data: an iterable of batches (inputs, labels)"),
        (
            go.passes.Distill(data=task(1)),
            "distill needs teacher=program, the network to learn from",
        ),
        (go.passes.FineTune(epochs=0, data=task(1)), "option epochs must be at least 1, not 0"),
    ],
)
def test_errors(pass_: go.Pass, message: str) -> None:
    with pytest.raises(TrainError, match=f"^{re.escape(message)}"):
        pass_(capture(net()))
