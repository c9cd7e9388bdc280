"""``graphopt passes``: every registered pass with its options and contract."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Any

from graphopt.cli import options
from graphopt.cli.console import print_json, print_table

if TYPE_CHECKING:
    from graphopt.passing import Pass


def _type_name(declared: Any) -> str:
    text = declared.__name__ if isinstance(declared, type) else str(declared)
    return text.replace("typing.", "").replace("collections.abc.", "")


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default as JSON holds it; ``"required"`` where there is none."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def describe(cls: type[Pass]) -> dict[str, Any]:
    """What the table and the JSON say of a pass; the source is the class itself."""
    hints = typing.get_type_hints(cls)
    return {
        "name": cls.name,
        "contract": str(cls.contract),
        "runs_after": list(cls.runs_after),
        "summary": (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " "),
        "options": [
            {
                "name": field.name,
                "type": _type_name(hints[field.name]),
                "default": _default(field),
            }
            for field in dataclasses.fields(cls)
        ],
        "defined_in": cls.__module__,
    }


def command(
    plugin: options.Plugins = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """List every pass with its options, their types and defaults, and its contract.

    \b
    graphopt passes
    graphopt passes --plugin mine.py --json
    """
    from graphopt.registry import all_passes

    described = [describe(cls) for cls in all_passes().values()]
    if json:
        print_json(described)
        return
    rows = [
        (
            entry["name"],
            entry["contract"],
            "\n".join(f"{o['name']}: {o['type']} = {o['default']}" for o in entry["options"]),
            entry["summary"],
        )
        for entry in described
    ]
    print_table("", ("pass", "contract", "options", "what it does"), rows)
