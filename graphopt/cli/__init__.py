"""``graphopt compress | compile | run | bench | inspect | passes | targets | demo``.

Neither torch nor TVM is imported before a command needs it: ``graphopt --help`` is quick.
"""

from __future__ import annotations


def main() -> None:
    """The console entry point; exits 0, 1 (a GraphoptError), 2 (usage) or 130 (Ctrl-C)."""
    import sys

    try:
        from graphopt.cli.app import app

        app()
    except KeyboardInterrupt:  # before the command began
        sys.exit(130)
