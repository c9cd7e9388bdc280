"""The search: which candidate of which layer to measure next, until the budget is spent or nothing is left.

The next trial goes to the layer with the largest ``time share / (trials + 1)`` (D'Hondt's rule): long layers first, short ones
in the end too. A candidate that leads is measured again before it is believed: the fastest of many noisy times is too fast.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from graphopt.backends.cpu import candidates
from graphopt.backends.cpu.conv_plan import ConvChoice, plan_conv2d
from graphopt.backends.cpu.generator import generator_version
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.trial import Job, Remote
from graphopt.backends.cpu.workload import Conv2d
from graphopt.errors import TuneError
from graphopt.tuning.child import Child, WorkerDied
from graphopt.tuning.protocol import Failure
from graphopt.tuning.report import TunedLayer, TuningReport
from graphopt.tuning.store import Key, Store, Trial, target_of

_LOG = logging.getLogger(__name__)

TRIAL_SECONDS = 0.1  # of timing; compiling takes as long again
LIMIT_SECONDS = 15.0  # of a whole trial: the slowest to compile takes 2
_CONFIRMATIONS = 3  # trials of a leader
_WORTH = 0.985  # equal kernels differ by 0.5 %, in a noisy minute by 1.5 %
_FLOAT_COST = 4.0  # of a float32 product beside an int8 one, until something is measured


@dataclass
class Layer:
    """A distinct workload of a network, the layers of the model that have it, and what has been measured of it."""

    workload: Conv2d
    names: list[str]
    key: Key
    trials: list[Trial] = field(default_factory=list)

    @property
    def macs(self) -> int:
        return self.workload.macs * len(self.names)

    @property
    def reference(self) -> float | None:
        """Seconds with the cost model's choice."""
        times = [t.reference for t in self.trials if t.reference is not None]
        return statistics.median(times) if times else None

    def ratios(self) -> dict[str, list[float]]:
        """Measured time over the cost model's, by choice, of those that never failed."""
        bad = {trial.choice for trial in self.trials if trial.outcome != "measured"}
        found: dict[str, list[float]] = {}
        for trial in self.trials:
            if trial.ratio is not None and trial.choice not in bad:
                found.setdefault(trial.choice, []).append(trial.ratio)
        return found

    def leader(self) -> tuple[str, float, int] | None:
        """The fastest choice, its median ratio, and how often it was measured."""
        ratios = self.ratios()
        if not ratios:
            return None
        best = min(ratios, key=lambda choice: statistics.median(ratios[choice]))
        return best, statistics.median(ratios[best]), len(ratios[best])

    def winner(self) -> tuple[ConvChoice | None, float]:
        """What to compile, and its time over the cost model's: 1.0 where the cost model's choice stays."""
        leader = self.leader()
        if leader is None or leader[1] >= _WORTH or leader[2] < 2:
            return None, 1.0
        return candidates.read_choice(leader[0]), leader[1]


class Tuner:
    """Measures the layers of one network for one ISA row, thread count and device."""

    def __init__(
        self,
        convolutions: Sequence[tuple[Conv2d, str]],
        isa: Isa,
        threads: int,
        device: str,
        store: Store,
        remote: Remote | None = None,
        child: Child | None = None,
    ) -> None:
        self.isa = isa
        self.threads = threads
        self.store = store
        self.remote = remote
        self.child = child or Child()
        self.layers = self._layers(convolutions, target_of(isa.name, threads, device))

    def _layers(self, convolutions: Sequence[tuple[Conv2d, str]], target: str) -> list[Layer]:
        tvm, generator = version("apache-tvm"), generator_version()
        layers: dict[str, Layer] = {}
        for workload, name in convolutions:
            key = Key(candidates.workload_key(workload), target, tvm, generator)
            if key.workload not in layers:
                form = candidates.tuned_form(workload)
                layers[key.workload] = Layer(form, [], key, self.store.trials(key))
            layers[key.workload].names.append(name)
        return list(layers.values())

    def choices(self) -> dict[str, ConvChoice]:
        """The measured choices that are worth taking, by the key of their workload."""
        found = {layer.key.workload: layer.winner()[0] for layer in self.layers}
        return {key: choice for key, choice in found.items() if choice is not None}

    def run(self, budget: float, progress: Callable[[float, str], None]) -> None:
        """Measure for ``budget`` seconds; ``progress`` is told the share spent and what is measured now.

        Ctrl-C, like everything else, leaves the finished trials in the store.
        """
        started = time.monotonic()
        with self.child:
            while (spent := time.monotonic() - started) < budget:
                found = self._next()
                if found is None:
                    return
                layer, choice = found
                progress(spent / budget, f"{layer.names[0]}: {choice}")
                self._measure(layer, choice, budget - spent)

    def _next(self) -> tuple[Layer, ConvChoice] | None:
        """The most valuable trial."""
        for layer in sorted(self.layers, key=self._priority, reverse=True):
            choice = self._next_of(layer)
            if choice is not None:
                return layer, choice
        return None

    def _priority(self, layer: Layer) -> float:
        return self._seconds(layer) / (len(layer.trials) + 1)

    def _seconds(self, layer: Layer) -> float:
        """Of all calls together: measured, or else guessed from what was measured of others."""
        if layer.reference is not None:
            return layer.reference * len(layer.names)
        rates = [
            other.reference / self._work(other.workload)
            for other in self.layers
            if other.reference is not None
        ]
        rate = statistics.median(rates) if rates else 1.0
        return self._work(layer.workload) * rate * len(layer.names)

    @staticmethod
    def _work(workload: Conv2d) -> float:
        return workload.macs * (_FLOAT_COST if workload.x.dtype == "float32" else 1.0)

    def _next_of(self, layer: Layer) -> ConvChoice | None:
        """The leader until it is confirmed, then new tiles, then other chunks for the best of them."""
        leader = layer.leader()
        best = None
        if leader is not None and leader[1] < _WORTH:
            best = candidates.read_choice(leader[0])
            if leader[2] < _CONFIRMATIONS:
                return best
        known = {trial.choice for trial in layer.trials}
        choices = candidates.candidates(layer.workload, self.isa)
        choices += candidates.refinements(layer.workload, self.isa, self.threads, best)
        new = (choice for choice in choices if candidates.write_choice(choice) not in known)
        return next(new, None)

    def _measure(self, layer: Layer, choice: ConvChoice, left: float) -> None:
        job = Job(layer.workload, self.isa.name, self.threads, choice, TRIAL_SECONDS, self.remote)
        self.child.start()
        limit = min(LIMIT_SECONDS, max(1.0, left))
        text = candidates.write_choice(choice)
        try:
            answer = self.child.run(job, limit)
        except WorkerDied as death:
            if death.too_slow and limit < LIMIT_SECONDS:
                return  # the budget ended it: that says nothing about the candidate
            answer = death
        if isinstance(answer, Failure) and answer.fatal:
            raise TuneError(f"layer {layer.names[0]!r} cannot be measured: {answer.message}")
        self._file(layer, _trial(text, answer))

    def _file(self, layer: Layer, trial: Trial) -> None:
        self.store.add(layer.key, trial, repr(layer.workload))
        layer.trials.append(trial)
        name = layer.names[0]
        if trial.ratio is None:
            _LOG.warning("tuning: %s: %s %s: %s", name, trial.choice, trial.outcome, trial.note)
        else:
            _LOG.info("tuning: %s: %s takes %.3f of the time", name, trial.choice, trial.ratio)

    def report(self, interrupted: bool = False) -> TuningReport:
        """Where the layers stand."""
        outcomes = Counter(trial.outcome for layer in self.layers for trial in layer.trials)
        return TuningReport(
            self.isa.name,
            self.threads,
            str(self.store.path),
            tuple(self._row(layer) for layer in self.layers),
            self._geometric_mean(),
            self._next() is None,
            dict(outcomes),
            interrupted,
        )

    def _row(self, layer: Layer) -> TunedLayer:
        plan = plan_conv2d(layer.workload, self.isa)
        own = ConvChoice(plan.pixels, plan.vectors)
        choice, ratio = layer.winner()
        seconds = layer.reference
        return TunedLayer(
            tuple(layer.names),
            _shape(layer.workload),
            str(own),
            str(choice or own),
            seconds,
            None if seconds is None else seconds * ratio,
            1 / ratio,
            len(layer.trials),
        )

    def _geometric_mean(self) -> float:
        """Of the cost model's time over the tuned time, one factor a measured layer."""
        logs = [math.log(layer.winner()[1]) for layer in self.layers if layer.reference]
        return math.exp(-statistics.fmean(logs)) if logs else 1.0


def _shape(workload: Conv2d) -> str:
    """``uint8 56x56x64 -> 256, 1x1``."""
    x, (kh, kw), (sh, _) = workload.x, workload.kernel, workload.stride
    stride = f"/{sh}" if workload.stride != (1, 1) else ""
    groups = f" in {workload.groups} groups" if workload.groups > 1 else ""
    return f"{x.dtype} {x.height}x{x.width}x{x.channels} -> {workload.y.channels}, {kh}x{kw}{stride}{groups}"


def _trial(choice: str, answer: Any) -> Trial:
    if isinstance(answer, WorkerDied):
        return Trial(choice, "too slow" if answer.too_slow else "died", note=str(answer))
    if isinstance(answer, Failure):
        return Trial(choice, "failed", note=answer.message)
    return Trial(choice, "measured", answer.seconds, answer.reference, answer.ratio)
