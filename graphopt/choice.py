"""``Choice``: an option that is one of several named objects, each with options of its own.

In a recipe: ``score: taylor``, ``score: {magnitude: {norm: 1}}``, or ``schedule: {global: 0.9}``, which sets the first
option.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import pydantic
from pydantic_core import PydanticCustomError, core_schema

from graphopt.errors import PassError


class Choice:
    """A family of choices is a direct subclass; its members are frozen dataclasses with a ``name``.

    A member is known by its name as soon as its class is defined, a plugin's as well as ours.
    """

    name: ClassVar[str]
    _members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Choice in cls.__bases__:
            cls._members = {}
        elif "name" in vars(cls):
            cls._members[cls.name] = cls

    @classmethod
    def parse(cls, value: Any) -> Self:
        """The member that a recipe's ``value`` names. Raises PassError, naming what there is to choose from."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {value: None}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise PassError(f"{cls._family()} must be a name or {{name: {{option: value}}}}")
        ((name, options),) = value.items()
        member = cls._members.get(name)
        if member is None:
            near = difflib.get_close_matches(str(name), cls._members, n=3) or sorted(cls._members)
            raise PassError(f"no {cls._family()} is called {name!r}; choose from {', '.join(near)}")
        fields = [field.name for field in dataclasses.fields(member)]
        if options is None:
            options = {}
        elif not isinstance(options, Mapping):
            if not fields:
                raise PassError(f"{cls._family()} {name} has no options")
            options = {fields[0]: options}
        return member(**_checked(f"{cls._family()} {name}", member, fields, options))  # type: ignore[no-any-return]

    @classmethod
    def _family(cls) -> str:
        return cls.__name__.lower()

    def to_json(self) -> dict[str, Any]:
        """``{name: {option: value}}``, as a recipe writes it."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # members are dataclasses
        return {self.name: {field.name: getattr(self, field.name) for field in fields}}

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._validate)

    @classmethod
    def _validate(cls, value: Any) -> Self:
        try:
            return cls.parse(value)
        except PassError as error:
            raise PydanticCustomError("choice", "{reason}", {"reason": str(error)}) from error


def _checked(
    label: str, member: type[Any], fields: list[str], options: Mapping[Any, Any]
) -> dict[str, Any]:
    """The options converted to their declared types."""
    hints = typing.get_type_hints(member)
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise PassError(
                f"{label} has no option {key!r}; its options: {', '.join(fields) or 'none'}"
            )
        try:
            values[key] = pydantic.TypeAdapter(hints[key]).validate_python(value)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise PassError(f"option {key!r} of {label}: {reason}, not {value!r}") from error
    return values
