"""``Pipeline``: passes one after another, also as a YAML recipe.

passes:
  - fold-batch-norm
  - quantize: {observer: mse, per_channel: true}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from graphopt import registry
from graphopt.errors import GraphoptError, PassError, RecipeError, RegistryError
from graphopt.passing import Pass
from graphopt.program import Program
from graphopt.progress import track


class Pipeline:
    """``Pipeline([a, b])(program) == b(a(program))``.

    Raises PassError at construction where a pass stands before one that it declares to run after.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)
        _check_order(self.passes)

    def __call__(self, program: Program) -> Program:
        for pass_ in track(self.passes, "passes", len(self.passes)):
            program = pass_(program)
        return program

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    @classmethod
    def from_yaml(cls, path: str | Path, **data: Any) -> Pipeline:
        """Read a recipe. ``data`` gives options that YAML cannot hold (``calibration=batches``), to every pass that has them.

        Raises RecipeError naming file, line and option for anything that is not a known pass or a valid option.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path} is not UTF-8 text") from error
        return cls.from_text(text, str(path), **data)

    @classmethod
    def from_text(cls, text: str, source: str = "recipe", **data: Any) -> Pipeline:
        """``from_yaml`` on a string; ``source`` is named in errors."""
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError(f"{source}:{line}: not valid YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{source}:1: not valid YAML: {error}") from error
        return cls([_read_pass(entry, source, data) for entry in _entries(root, source)])


def _check_order(passes: Sequence[Pass]) -> None:
    for pass_ in passes:
        if isinstance(pass_, type):
            raise PassError(
                f"a pipeline holds passes, not the class {pass_.__name__}; write {pass_.__name__}()"
            )
        if not isinstance(pass_, Pass):
            raise PassError(
                f"a pipeline holds passes, not {pass_!r}; Pipeline.from_text takes names"
            )
    names = [pass_.name for pass_ in passes]
    for index, pass_ in enumerate(passes):
        for earlier in pass_.runs_after:
            if earlier in names[index + 1 :] and earlier not in names[:index]:
                raise PassError(
                    f"{pass_.name} must run after {earlier}; put {earlier} before it in the pipeline"
                )


def _at(node: yaml.Node, source: str) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def _entries(root: yaml.Node | None, source: str) -> list[yaml.Node]:
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{source}:1: a recipe is a mapping with the key 'passes'")
    for key, value in root.value:
        if key.value != "passes":
            raise RecipeError(
                f"{_at(key, source)}: unknown key {key.value!r}; the only key is 'passes'"
            )
        if not isinstance(value, yaml.SequenceNode):
            raise RecipeError(f"{_at(value, source)}: 'passes' must be a list")
        return list(value.value)
    raise RecipeError(f"{source}:1: a recipe is a mapping with the key 'passes'")


def _read_pass(entry: yaml.Node, source: str, data: Mapping[str, Any]) -> Pass:
    """One list item: ``name`` or ``name: {option: value}``."""
    options: list[tuple[yaml.Node, yaml.Node]] = []
    if isinstance(entry, yaml.ScalarNode):
        name_node: yaml.Node = entry
    elif isinstance(entry, yaml.MappingNode) and len(entry.value) == 1:
        name_node, value = entry.value[0]
        if isinstance(value, yaml.MappingNode):
            options = value.value
        elif not (isinstance(value, yaml.ScalarNode) and value.tag.endswith(":null")):
            raise RecipeError(
                f"{_at(value, source)}: options of {name_node.value!r} must be a mapping"
            )
    else:
        raise RecipeError(f"{_at(entry, source)}: each pass is a name or 'name: {{option: value}}'")
    try:
        cls = registry.get(str(name_node.value))
    except RegistryError as error:
        raise RecipeError(f"{_at(name_node, source)}: {error}") from error
    return _construct(cls, name_node, options, source, data)


def _construct(
    cls: type[Pass],
    name_node: yaml.Node,
    options: Sequence[tuple[yaml.Node, yaml.Node]],
    source: str,
    data: Mapping[str, Any],
) -> Pass:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    written: set[str] = set()
    values: dict[str, Any] = {name: value for name, value in data.items() if name in fields}
    for key, value in options:
        if not isinstance(key, yaml.ScalarNode) or key.value not in fields:
            known = ", ".join(fields) or "none"
            raise RecipeError(
                f"{_at(key, source)}: {cls.name} has no option {key.value!r}; its options: {known}"
            )
        if key.value in written:
            raise RecipeError(f"{_at(key, source)}: {cls.name} sets option {key.value!r} twice")
        written.add(key.value)
        values[key.value] = _checked(cls, fields[key.value], key, value, source)
    try:
        return cls(**values)
    except TypeError as error:
        missing = [n for n, f in fields.items() if _is_required(f) and n not in values]
        text = f"{cls.name} needs option {missing[0]!r}" if missing else f"{cls.name}: {error}"
        raise RecipeError(f"{_at(name_node, source)}: {text}") from error
    except (GraphoptError, ValueError) as error:
        raise RecipeError(f"{_at(name_node, source)}: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(
    cls: type[Pass], field: dataclasses.Field[Any], key: yaml.Node, value: yaml.Node, source: str
) -> Any:
    """The option's value, converted to the field's declared type."""
    import typing

    try:
        plain = yaml.SafeLoader("").construct_object(value, deep=True)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise RecipeError(
            f"{_at(value, source)}: option {key.value!r} of {cls.name}: {reason}"
        ) from error
    adapter = _adapter(typing.get_type_hints(cls)[field.name])
    try:
        return adapter.validate_python(plain, extra="forbid")
    except pydantic.ValidationError as error:
        found = error.errors()[0]
        unknown = found["type"] == "unexpected_keyword_argument"
        reason = f"it has no {found['loc'][-1]!r}" if unknown else found["msg"]
        raise RecipeError(
            f"{_at(value, source)}: option {key.value!r} of {cls.name}: {reason}, not {plain!r}"
        ) from error


def _adapter(declared: Any) -> pydantic.TypeAdapter[Any]:
    if dataclasses.is_dataclass(declared):
        return pydantic.TypeAdapter(declared)  # pydantic takes no other configuration for these
    return pydantic.TypeAdapter(declared, config={"arbitrary_types_allowed": True})
