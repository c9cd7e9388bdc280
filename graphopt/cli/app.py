"""The commands under one name, and what every failure looks like.

0 is success, 1 a GraphoptError or a file that cannot be read or written (one sentence on stderr), 2 a usage error,
130 Ctrl-C. ``--verbose`` adds the log and the traceback.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from graphopt import __version__
from graphopt.cli import bench, compile, compress, demo, export, inspect, passes, run, targets, tune
from graphopt.cli.console import fail
from graphopt.cli.options import is_verbose
from graphopt.errors import GraphoptError


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


class _Commands(TyperGroup):
    """Turns exceptions into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's deprecations are no concern of the user
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                fail("interrupted; nothing was written", code=130)
            except (GraphoptError, OSError) as error:
                if is_verbose(ctx):
                    traceback.print_exception(error)
                fail(_sentence(error))
            finally:
                logging.getLogger("graphopt").handlers.clear()


app = typer.Typer(
    name="graphopt",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A compiler for compressed neural networks: PyTorch in, one small, fast file out."""


for _command in (compress, compile, tune, run, bench, export, inspect, passes, targets, demo):
    app.command(_command.__name__.rpartition(".")[2])(_command.command)
