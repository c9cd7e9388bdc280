"""The table of integer layers against their float forms: looked up in a store, measured within a clock budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from graphopt.backends.cpu.generator import generator_version
from graphopt.backends.cpu.isa import Isa
from graphopt.backends.cpu.rivals import Rivals
from graphopt.backends.cpu.trial import Remote
from graphopt.backends.cpu.versus import Job
from graphopt.backends.lower.float_fallback import Times, worth_measuring
from graphopt.errors import TuneError
from graphopt.tuning.child import Child, WorkerDied
from graphopt.tuning.protocol import Failure
from graphopt.tuning.store import Key, Store, Trial, target_of

_LOG = logging.getLogger(__name__)

_SECONDS = 0.2  # of timing; compiling four kernels takes as long again
_LIMIT_SECONDS = 15.0
_CHOICE = '{"algorithm": "float32"}'  # what the trials of this table are of


class Comparison:
    """Trials of float forms, with the integer forms as their reference, of one network on one device."""

    def __init__(
        self,
        layers: Mapping[str, Rivals],
        isa: Isa,
        threads: int,
        device: str,
        store: Store,
        remote: Remote | None = None,
        child: Child | None = None,
    ) -> None:
        self.layers = layers
        self.isa = isa
        self.threads = threads
        self.target = target_of(isa.name, threads, device)
        self.store = store
        self.remote = remote
        self.child = child or Child()

    def _key(self, layer: Rivals) -> Key:
        generator = generator_version(Job.__module__)
        return Key(layer.key, self.target, version("apache-tvm"), generator)

    def times(self) -> dict[str, Times]:
        """What the store has, by ``Rivals.key``: the latest trial, unless one failed."""
        found = {}
        for layer in self.layers.values():
            trials = self.store.trials(self._key(layer))
            if trials and all(trial.outcome == "measured" for trial in trials):
                seconds, reference = trials[-1].seconds, trials[-1].reference
                assert seconds is not None
                assert reference is not None
                found[layer.key] = Times(reference, seconds)
        return found

    def run(self, budget: float, progress: Callable[[float, str], None]) -> None:
        """Measure the layers whose float form may be faster, the largest first, once each."""
        started = time.monotonic()
        ordered = sorted(self.layers.items(), key=lambda item: -item[1].int8.macs)
        with self.child:
            for name, layer in ordered:
                key = self._key(layer)
                if not worth_measuring(layer, self.isa, self.threads) or self.store.trials(key):
                    continue
                spent = time.monotonic() - started
                if spent >= budget:
                    return
                progress(spent / budget, f"{name}: int8 or float32")
                self._measure(name, layer, key, budget - spent)

    def _measure(self, name: str, layer: Rivals, key: Key, left: float) -> None:
        job = Job(layer, self.isa.name, self.threads, _SECONDS, self.remote)
        self.child.start()
        limit = min(_LIMIT_SECONDS, max(1.0, left))
        try:
            answer = self.child.run(job, limit)
        except WorkerDied as death:
            if death.too_slow and limit < _LIMIT_SECONDS:
                return  # the budget ended it: that says nothing about the layer
            answer = death
        if isinstance(answer, Failure) and answer.fatal:
            raise TuneError(f"layer {name!r} cannot be measured: {answer.message}")
        trial = _trial(answer)
        self.store.add(key, trial, repr(layer))
        _LOG.info("tuning: %s: float32 over int8: %s", name, trial.ratio or trial.note)


def _trial(answer: Any) -> Trial:
    if isinstance(answer, WorkerDied):
        return Trial(_CHOICE, "too slow" if answer.too_slow else "died", note=str(answer))
    if isinstance(answer, Failure):
        return Trial(_CHOICE, "failed", note=answer.message)
    return Trial(_CHOICE, "measured", answer.seconds, answer.reference, answer.ratio)
