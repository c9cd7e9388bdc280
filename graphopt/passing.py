"""``Pass`` and ``RewritePass``: what an author writes; the driver that runs them is ``graphopt.driver``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from graphopt import driver
from graphopt.contract import Contract
from graphopt.edit import Edit
from graphopt.program import Program
from graphopt.rule import RewriteRule


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a whole program. Subclasses are frozen dataclasses whose fields are the options.

    ``name`` is the registry's (``"fold-batch-norm"``); ``runs_after`` names passes that must come earlier where both
    are in one pipeline; ``contract`` is what is promised about the output (``exact``, ``within(eps)``, ``lossy``).
    Calling a pass returns a new program; the input is untouched.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    runs_after: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, edit: Edit) -> None:
        """Change ``edit.program``, a private copy, through ``edit``."""

    def promised(self) -> Contract:
        """The contract under these options; override where an option changes it."""
        return self.contract

    def measured(self) -> bool:
        """False where the driver should not run the result to measure its error (only a lossy pass may say so)."""
        return True

    def __call__(self, program: Program) -> Program:
        """Run under the driver: count, clean, verify, measure, record.

        Raises PassError where the pass fails, VerifyError where its result is not well formed and ContractError where
        the output moved by more than the contract allows; each names the pass.
        """
        return driver.run(self, program)


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that is a set of local rules, tried at every node until nothing changes."""

    rules: ClassVar[tuple[RewriteRule, ...]] = ()

    def active_rules(self) -> tuple[RewriteRule, ...]:
        """The rules under these options; override where an option selects or configures them."""
        return self.rules

    def apply(self, edit: Edit) -> None:
        driver.apply_rules(edit, self.active_rules())
