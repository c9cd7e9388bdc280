"""``--recipe`` and ``--pass`` as one ``Pipeline``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import RecipeError

if TYPE_CHECKING:
    from graphopt.pipeline import Pipeline
    from graphopt.program import Program

_COMMA = re.compile(r",(?![^\[\]{}]*[\]}])")  # none inside brackets


def _as_yaml(text: str) -> str:
    """``name:a=1,b=[2,3]`` as a recipe of that one pass."""
    name, colon, rest = text.partition(":")
    options = []
    for item in _COMMA.split(rest) if colon else ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--pass {text}: {item!r} must look like option=value")
        options.append(f"{key.strip()}: {value.strip()}")
    return f"passes: [{{{name.strip()}: {{{', '.join(options)}}}}}]"


def pipeline(
    recipe: Path | None,
    passes: Sequence[str],
    given: Mapping[str, Callable[[], Any]],
    teacher: Program,
) -> Pipeline:
    """The recipe's passes, then ``passes``. ``given`` makes the data for the passes' options ``calibration`` and ``data``.

    ``teacher``, the model as it came in, is what ``distill`` learns from.

    Raises RecipeError for a pass or option that does not exist, and for data that no pass takes.
    """
    from graphopt.pipeline import Pipeline

    data = {name: load() for name, load in given.items()}
    offered = {**data, "teacher": teacher}
    steps = [*Pipeline.from_yaml(recipe, **offered)] if recipe else []
    for text in passes:
        steps += Pipeline.from_text(_as_yaml(text), f"--pass {text}", **offered)
    taken = {field.name for step in steps for field in dataclasses.fields(step)}
    for name in data:
        if name not in taken:
            kind = "calibration" if name == "calibration" else "labelled"
            raise RecipeError(f"--{name} was given and no pass takes {kind} data")
    return Pipeline(steps)
