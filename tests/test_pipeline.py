from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import graphopt as go
from graphopt import registry
from graphopt.errors import PassError, RecipeError
from graphopt.passing import Pass
from tests.passes.helpers import network, operators


@dataclass(frozen=True)
class Nested:
    depth: int = 1


@pytest.fixture(autouse=True)
def _sample_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    registry.register(Sample)


@dataclass(frozen=True)
class Sample(Pass):
    """Changes nothing."""

    name = "sample"
    contract = go.exact

    count: int
    mode: Literal["a", "b"] = "a"
    nested: Nested = field(default_factory=Nested)
    data: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise PassError(f"sample: count must be at least 0, not {self.count}")

    def apply(self, edit: go.Edit) -> None:
        edit.note(f"count {self.count}")


def test_passes_run_in_order() -> None:
    pipeline = go.Pipeline([go.passes.RemoveIdentities(), go.passes.FoldBatchNorm()])
    result = pipeline(network("mobilenet"))
    assert [record.name for record in result.history] == ["remove-identities", "fold-batch-norm"]
    assert not {"dropout", "batch_norm"} & set(operators(result))
    assert [pass_.name for pass_ in pipeline] == ["remove-identities", "fold-batch-norm"]


def test_a_recipe_equals_its_passes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "passes:\n  - fold-batch-norm\n  - sample: {count: 3, mode: b, nested: {depth: 4}}\n"
    )
    pipeline = go.Pipeline.from_yaml(path)
    assert pipeline.passes == (go.passes.FoldBatchNorm(), Sample(3, "b", Nested(4)))
    assert pipeline(network("mlp")).history[-1].notes == ("count 3",)


def test_data_reaches_the_passes_that_take_it() -> None:
    batches = [torch.ones(1)]
    pipeline = go.Pipeline.from_text(
        "passes: [fold-batch-norm, {sample: {count: 1}}]", data=batches
    )
    assert vars(pipeline.passes[1])["data"] is batches


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: a recipe is a mapping with the key 'passes'"),
        ("- a", "r.yaml:1: a recipe is a mapping with the key 'passes'"),
        ("\nsteps: []", "r.yaml:2: unknown key 'steps'; the only key is 'passes'"),
        ("passes: 3", "r.yaml:1: 'passes' must be a list"),
        ("passes: [a", "r.yaml:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("passes:\n  - [a]", "r.yaml:2: each pass is a name or 'name: {option: value}'"),
        ("passes:\n  - sample: 3", "r.yaml:2: options of 'sample' must be a mapping"),
        ("passes:\n  - sample", "r.yaml:2: sample needs option 'count'"),
        (
            "passes:\n  - sample:\n      cuont: 3",
            "r.yaml:3: sample has no option 'cuont'; its options: count, mode, nested, data",
        ),
        (
            "passes:\n  - sample:\n      [count]: 3",
            "r.yaml:3: sample has no option ",
        ),
        (
            "passes:\n  - sample:\n      count: many",
            "r.yaml:3: option 'count' of sample: Input should be a valid integer, "
            "unable to parse string as an integer, not 'many'",
        ),
        (
            "passes:\n  - sample:\n      count: 1\n      mode: c",
            "r.yaml:4: option 'mode' of sample: Input should be 'a' or 'b', not 'c'",
        ),
        (
            "passes:\n  - sample:\n      count: 1\n      count: 2",
            "r.yaml:4: sample sets option 'count' twice",
        ),
        (
            "passes:\n  - sample:\n      count: !!python/name:os.system ''",
            "r.yaml:3: option 'count' of sample: could not determine a constructor for the tag",
        ),
        ("passes:\n  - sample: {count: -1}", "r.yaml:2: sample: count must be at least 0, not -1"),
        ("passes:\n\n  - fold-batchnorm", "r.yaml:3: no pass is called 'fold-batchnorm'; "),
    ],
)
def test_errors_name_file_line_and_option(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        go.Pipeline.from_text(text, "r.yaml")
    assert str(caught.value).startswith(message)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    with pytest.raises(RecipeError) as caught:
        go.Pipeline.from_yaml(absent)
    assert str(caught.value) == f"recipe {absent} cannot be read: No such file or directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError) as caught:
        go.Pipeline.from_yaml(binary)
    assert str(caught.value) == f"recipe {binary} is not UTF-8 text"


def test_classes_are_no_passes() -> None:
    message = r"^a pipeline holds passes, not the class FoldBatchNorm; write FoldBatchNorm\(\)$"
    with pytest.raises(PassError, match=message):
        go.Pipeline([go.passes.FoldBatchNorm])  # type: ignore[list-item]  # the mistake
    message = "^a pipeline holds passes, not 'sample'; Pipeline.from_text takes names$"
    with pytest.raises(PassError, match=message):
        go.Pipeline(["sample"])  # type: ignore[list-item]  # the mistake
