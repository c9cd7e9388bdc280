"""``tune``: the choices of a program's layers, looked up in a store and measured within a clock budget."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from graphopt.backends.targets import Target, resolve
from graphopt.cpu_features import cpu_name
from graphopt.errors import TargetError, TuneError
from graphopt.preparation import prepare, thread_count
from graphopt.program import Program
from graphopt.progress import meter
from graphopt.tuning.options import Tuning, parse_budget
from graphopt.tuning.report import TuningReport
from graphopt.tuning.store import Store

if TYPE_CHECKING:
    from graphopt.backends.cpu.conv_plan import ConvChoice
    from graphopt.backends.cpu.isa import Isa
    from graphopt.backends.cpu.rivals import Rivals
    from graphopt.backends.cpu.trial import Remote
    from graphopt.backends.cpu.workload import Conv2d
    from graphopt.backends.lower.float_fallback import Times

_COMPARING = 0.25  # of the budget, for integer layers against their float forms
Place = str | os.PathLike[str]


class Search:
    """Options checked before the work starts; ``run`` does it. ``budget`` None only looks up."""

    def __init__(
        self, target: Target, threads: int, tuning: Tuning | Place | None, budget: str | None
    ) -> None:
        self.target = target
        self.threads = threads
        self.tuning = tuning if isinstance(tuning, Tuning) else Tuning(tuning)
        self.seconds = None if budget is None else parse_budget(budget)
        self._spent = 0.0
        self._interrupted = False
        if self.seconds is not None and self.tuning.key is not None and self.tuning.rpc is None:
            raise TuneError(
                f"device {self.tuning.key!r} cannot be measured without its RPC tracker; name it with rpc"
            )
        if self.seconds is not None and self.tuning.rpc is None and not target.runs_here():
            raise TargetError(
                f"target {target.name!r} cannot be tuned here: this CPU lacks {', '.join(target.missing())}; "
                "name a device with rpc and key"
            )
        if self.seconds is None and not self.tuning.path.exists():
            raise TuneError(
                f"the tuning store {self.tuning.path} does not exist; measure first, with tune or graphopt tune"
            )

    def compare(self, layers: Mapping[str, Rivals]) -> dict[str, Times]:
        """Times of integer layers and of their float forms, by ``Rivals.key``; a quarter of the budget may go into them."""
        from graphopt.tuning.comparison import Comparison

        with Store(self.tuning.path) as store:
            comparison = Comparison(layers, *self._device(), store, self._remote())
            if self.seconds is not None:
                started = time.monotonic()
                try:
                    with meter("comparing with float32") as progress:
                        comparison.run(self.seconds * _COMPARING, progress)
                except KeyboardInterrupt:
                    self._interrupted = True
                self._spent = time.monotonic() - started
            return comparison.times()

    def run(self, program: Program) -> tuple[dict[str, ConvChoice], TuningReport]:
        """The winners by workload key, and the report. ``program`` is what ``prepare`` made."""
        from graphopt.tuning.tuner import Tuner

        tunable = self._tunable(program)
        with Store(self.tuning.path) as store:
            tuner = Tuner(tunable, *self._device(), store, self._remote())
            if self.seconds is not None and not self._interrupted:
                try:
                    with meter("tuning") as progress:
                        tuner.run(self.seconds - self._spent, progress)
                except KeyboardInterrupt:
                    self._interrupted = True
            return tuner.choices(), tuner.report(self._interrupted)

    def _device(self) -> tuple[Isa, int, str]:
        """What is measured on: the ISA row, the threads, the device's name."""
        from graphopt.backends.isas import ISAS

        key = self.tuning.key
        name = cpu_name() if key is None else f"device {key}"
        return ISAS[self.target.isa], self.threads, name

    def _remote(self) -> Remote | None:
        from graphopt.backends.cpu.trial import Remote

        tuning = self.tuning
        if tuning.rpc is None or tuning.key is None:
            return None
        return Remote(*tuning.address, tuning.key)

    def _tunable(self, program: Program) -> list[tuple[Conv2d, str]]:
        """The workloads that lowering meets, with the cost model's choices."""
        from graphopt.backends.isas import ISAS
        from graphopt.backends.lower.emit import emit
        from graphopt.backends.lower.plan import make_plan
        from graphopt.backends.lower.step import Context

        context = Context(program, ISAS[self.target.isa], self.threads)
        return emit(make_plan(program), context).tunable


def tune(
    program: Program,
    target: str = "native",
    budget: str = "30s",
    threads: int | None = None,
    tuning: Tuning | Place | None = None,
) -> TuningReport:
    """Measure candidates for ``program``'s convolutions and linear layers, the longest first, and keep the results.

    ``budget`` is a time like "30s" or "5m"; the next call goes on where this one stops, and Ctrl-C ends it early with nothing
    lost (``report.interrupted``). ``tuning`` is the store's path, or a ``Tuning`` with a remote device. Afterwards
    ``compile(..., tuning=...)`` uses what was found.

    Raises ``TuneError``, and ``TargetError`` where neither this machine nor a remote device runs the target's code.
    """
    from graphopt.backends.isas import ISAS
    from graphopt.backends.lower.images import choose

    row, count = resolve(target), thread_count(threads)
    search = Search(row, count, tuning, budget)
    isa = ISAS[row.isa]
    prepared = prepare(program, isa, count, search.compare)
    return search.run(choose(prepared, isa, count).program)[1]
