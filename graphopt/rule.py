"""``RewriteRule``: a local rewrite as three small methods."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import fx

from graphopt.edit import Build
from graphopt.pattern import Call, Match, Operators


class RewriteRule(ABC):
    """What to match, when to decline, what to put there instead.

    ``check`` raises ``Decline(reason)`` (``match.decline``, ``match.sole_use``) and builds nothing; ``rewrite`` builds
    the new nodes and returns the one that takes the matched root's place. The driver counts, removes dead nodes,
    verifies and measures.
    """

    @abstractmethod
    def pattern(self, op: Operators) -> Call:
        """The expression to match."""

    def check(self, match: Match) -> None:  # noqa: B027 - declining is optional
        """Decline with a reason where the rewrite would not hold."""

    @abstractmethod
    def rewrite(self, build: Build, match: Match) -> fx.Node:
        """Build the replacement."""
