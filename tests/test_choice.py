"""Options that are one of several named objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pydantic
import pytest

from graphopt.choice import Choice
from graphopt.errors import PassError


class Shape(Choice):
    pass


@dataclass(frozen=True)
class Circle(Shape):
    name: ClassVar[str] = "circle"
    radius: float = 1.0
    filled: bool = False


@dataclass(frozen=True)
class Point(Shape):
    name: ClassVar[str] = "point"


class Colour(Choice):
    pass


@dataclass(frozen=True)
class Red(Colour):
    name: ClassVar[str] = "red"


@pytest.mark.parametrize(
    ("written", "choice"),
    [
        ("circle", Circle()),
        ({"circle": None}, Circle()),
        ({"circle": 2}, Circle(2.0)),
        ({"circle": {"filled": True, "radius": "3"}}, Circle(3.0, True)),
        ("point", Point()),
        (Circle(4.0), Circle(4.0)),
    ],
)
def test_written_and_read(written, choice):
    assert Shape.parse(written) == choice
    assert pydantic.TypeAdapter(Shape).validate_python(written) == choice
    assert Shape.parse(choice.to_json()) == choice


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (3, "shape must be a name or {name: {option: value}}"),
        ({"circle": 1, "point": 2}, "shape must be a name or {name: {option: value}}"),
        ("cirkle", "no shape is called 'cirkle'; choose from circle"),
        ("square", "no shape is called 'square'; choose from circle, point"),
        ("red", "no shape is called 'red'; choose from circle, point"),
        (
            {"circle": {"diameter": 2}},
            "shape circle has no option 'diameter'; its options: radius, filled",
        ),
        ({"point": 3}, "shape point has no options"),
        ({"point": {"x": 3}}, "shape point has no option 'x'; its options: none"),
        (
            {"circle": {"radius": "wide"}},
            "option 'radius' of shape circle: Input should be a valid number, unable to parse string as a "
            "number, not 'wide'",
        ),
    ],
)
def test_mistakes_are_named(written, message):
    with pytest.raises(PassError) as caught:
        Shape.parse(written)
    assert str(caught.value) == message
    with pytest.raises(pydantic.ValidationError) as wrapped:
        pydantic.TypeAdapter(Shape).validate_python(written)
    assert wrapped.value.errors()[0]["msg"] == message
