"""The loop: epochs of steps on a program in place, validated, logged, and saved so that a killed run goes on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import modes
from graphopt.errors import TrainError
from graphopt.program import Program
from graphopt.progress import meter
from graphopt.train import batches, checkpoint, rng
from graphopt.train.evaluation import Evaluation, device_of, measure, shown
from graphopt.train.journal import Journal
from graphopt.train.objective import Objective, score
from graphopt.train.options import Batches, Options

log = logging.getLogger(__name__)


@dataclass
class State:
    """Where a run stands. Losses and scores are sums over the samples of the epoch so far."""

    epoch: int = 0
    position: int = 0  # batches of the epoch that were trained on
    step: int = 0
    samples: int = 0
    loss: float = 0.0
    score: float = 0.0
    scored: bool = True
    first_loss: float = math.nan  # means of whole epochs
    last_loss: float = math.nan
    best: float = -math.inf
    best_epoch: int = 0
    waited: int = 0  # epochs without improvement
    reason: str = ""  # why it ended
    seconds: float = 0.0


class Trainer:
    """Trains ``program``, which it may change, by ``objective``; ``run`` leaves the best weights in it."""

    def __init__(
        self, name: str, program: Program, data: Batches, objective: Objective, options: Options
    ) -> None:
        self.name = name
        self.program = program
        self.data = data
        self.objective = objective
        self.options = options
        self.state = State()
        self.validated: Evaluation | None = None
        self._journal = Journal(options.log)
        self._best: dict[str, Tensor] | None = None

    def run(self) -> None:
        """Train to the end. Raises TrainError, naming batch and step, for data that does not fit and losses that are no numbers."""
        was_training, home = self.program.training, device_of(self.program)
        with rng.preserved(), meter(self.name) as show:
            rng.seed_epoch(self.options.seed, 0)
            try:
                self._prepare(home)
                while not self._ended():
                    self._epoch(show)
                self._finish()
            finally:
                self._journal.close()
                self.program.graph_module.to(home)
        for parameter in self.program.graph_module.parameters():
            parameter.grad = None
        self.program.train(was_training)

    def notes(self) -> list[str]:
        """What the history says of the run."""
        state = self.state
        text = f"{state.epoch} epoch(s), {state.step} step(s) ({state.reason}): "
        lines = [f"{text}loss {state.first_loss:.4g} -> {state.last_loss:.4g}"]
        if self.validated is not None:
            kept = f"; the weights of epoch {state.best_epoch} are kept" if self._best else ""
            lines.append(
                f"validation: loss {self.validated.loss:.4g}, score {shown(self.validated.score)}{kept}"
            )
        end = getattr(self.options.pruner, "end", None)
        if end is not None and state.step <= end:
            lines.append(f"it ended before the pruning, whose last update is at step {end}")
        return lines

    # what a run begins with

    def _prepare(self, home: torch.device) -> None:
        device = torch.device(self.options.device) if self.options.device is not None else home
        identity = self._identity()
        self.program.graph_module.to(device)
        self.objective.to(device)
        self._masks = self._mask_versions()
        parameters = [p for p in self.program.graph_module.parameters() if p.requires_grad]
        if not parameters:
            raise TrainError(f"{self.name}: the program has no parameter that requires a gradient")
        self._parameters = [*parameters, *self.objective.parameters()]
        self._optimizer = self.options.optimizer(self._parameters)
        make = self.options.scheduler
        self._scheduler = None if make is None else make(self._optimizer)
        identity |= {
            "optimizer": self._optimizer_identity(),
            "scheduler": _class_of(self._scheduler),
        }
        path = self.options.checkpoint
        self._checkpoint = None if path is None else checkpoint.Checkpoint(path, identity)
        saved = None if self._checkpoint is None else self._checkpoint.load()
        self._resumed = saved
        if saved is None:
            self._journal.open(0)
            self._journal.write(
                "start", run=self.name, **identity, options=self.options.described()
            )
        else:
            self._load(saved)
        self._began = time.monotonic() - self.state.seconds

    def _identity(self) -> dict[str, Any]:
        """What two runs must share for one to go on with the other's checkpoint."""
        return {
            "program": checkpoint.fingerprint(self.program),
            "objective": self.objective.described(),
            "batches": batches.length(self.data),
            "seed": self.options.seed,
            "clip_norm": self.options.clip_norm,
            "frozen_statistics": self.options.frozen_statistics,
        }

    def _optimizer_identity(self) -> dict[str, Any]:
        plain = (bool, int, float, str)
        defaults = self._optimizer.defaults
        return {
            "class": _class_of(self._optimizer),
            **{k: v for k, v in defaults.items() if isinstance(v, plain)},
        }

    def _load(self, saved: dict[str, Any]) -> None:
        checkpoint.restore_values(self.program, saved["program"])
        self.objective.load_state_dict(saved["objective"])
        self._optimizer.load_state_dict(saved["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(saved["scheduler"])
        self._best = saved["best"]
        self.state = State(**saved["state"])
        self.state.reason = ""  # a run that ended goes on where its options now ask for more
        self.validated = None if saved["validated"] is None else Evaluation(**saved["validated"])
        self._masks = self._mask_versions()
        self._journal.open(saved["journal"])
        log.info(
            "%s: resumes at epoch %d, step %d", self.name, self.state.epoch + 1, self.state.step
        )

    # an epoch

    def _epoch(self, show: Callable[[float, str], None]) -> None:
        state, options = self.state, self.options
        self._set_mode(True)
        way = batches.Epoch(self.data, options.seed, state.epoch, self._resumed)
        self._resumed = None
        for batch in way:
            self._step(batch)
            show(self._share(), self._text())
            if self._steps_are_done():
                break
            if self._checkpoint is not None and state.step % options.checkpoint_every == 0:
                self._save(way.started_from)
        if not state.samples:
            raise TrainError(f"{self.name}: the data holds no batch in epoch {state.epoch + 1}")
        self._end_epoch()
        self._save(way.generators())

    def _step(self, batch: Any) -> None:
        state, options = self.state, self.options
        where = f"{self.name}: batch {state.position} of epoch {state.epoch + 1}"
        inputs, labels = batches.to_device(batches.split(batch, where), device_of(self.program))
        batches.check(self.program, inputs, where)
        result = self.objective(self.program, inputs, labels, where)
        loss = float(result.loss.detach())
        rate = self._optimizer.param_groups[0]["lr"]
        self._check_finite(loss, "loss", rate, (inputs, labels))
        self._optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        row: dict[str, Any] = {}
        if options.clip_norm is not None:
            row["gradient_norm"] = float(
                nn.utils.clip_grad_norm_(self._parameters, options.clip_norm)
            )
            self._check_finite(row["gradient_norm"], "gradient", rate, (inputs, labels))
        self._optimizer.step()
        if options.pruner is not None:
            row["pruner"] = _number(options.pruner.step(self.program, state.step))
            self._forget_best_of_other_masks()
        if self._scheduler is not None and options.scheduler_every == "step":
            self._scheduler.step()
        value = score(options.metric, result.output, labels)
        count = batches.size(inputs)
        state.loss += loss * count
        state.score += (value or 0.0) * count
        state.scored = state.scored and value is not None
        state.samples += count
        state.position += 1
        self._journal.write(
            "step",
            step=state.step,
            epoch=state.epoch + 1,
            loss=loss,
            **result.terms,
            score=value,
            learning_rate=float(rate),
            **row,
        )
        state.step += 1

    def _end_epoch(self) -> None:
        state, options = self.state, self.options
        state.last_loss = state.loss / state.samples
        if state.epoch == 0:
            state.first_loss = state.last_loss
        trained = state.score / state.samples if state.scored else None
        state.epoch += 1
        validated = self._validate()
        if self._scheduler is not None and options.scheduler_every == "epoch":
            self._step_scheduler(state.last_loss if validated is None else validated.loss)
        state.position, state.samples, state.loss, state.score, state.scored = 0, 0, 0.0, 0.0, True
        state.seconds = time.monotonic() - self._began
        row = {
            "epoch": state.epoch,
            "loss": state.last_loss,
            "score": trained,
            "validation_loss": None if validated is None else validated.loss,
            "validation_score": None if validated is None else validated.score,
            "best_epoch": state.best_epoch or None,
            "seconds": state.seconds,
            "seconds_left": self._seconds_left(),
        }
        self._journal.write("epoch", step=state.step, **row)
        log.info(
            "%s: epoch %d of %d: loss %.4g, score %s, validation score %s, %.0f s left",
            self.name,
            state.epoch,
            options.epochs,
            state.last_loss,
            shown(trained),
            shown(None if validated is None else validated.score),
            row["seconds_left"],
        )
        state.reason = self._reason()

    def _validate(self) -> Evaluation | None:
        state, options = self.state, self.options
        if options.validation is None:
            return None
        self._set_mode(False)
        label = f"{self.name}: validation batch"
        seen = measure(self.program, options.validation, self.objective, options.metric, label)
        if self._best is None or seen.rank > state.best:
            self._best = checkpoint.values(self.program)
            self.validated = seen
            state.best, state.best_epoch, state.waited = seen.rank, state.epoch, 0
        else:
            state.waited += 1
        return seen

    def _step_scheduler(self, loss: float) -> None:
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(loss)
        elif self._scheduler is not None:
            self._scheduler.step()

    def _forget_best_of_other_masks(self) -> None:
        """Weights of another sparsity are no candidates: pruning has moved on."""
        versions = self._mask_versions()
        if versions != self._masks:
            self._masks = versions
            self._best, self.state.best, self.state.waited = None, -math.inf, 0

    def _mask_versions(self) -> dict[str, tuple[int, int]]:
        held = checkpoint.tensors(self.program).items()
        return {name: (id(t), t._version) for name, t in held if name.endswith("_mask")}

    # the end

    def _ended(self) -> bool:
        return bool(self._reason())

    def _reason(self) -> str:
        state, options = self.state, self.options
        if self._steps_are_done():
            return "all steps done"
        if state.epoch >= options.epochs:
            return "all epochs done"
        if options.patience is not None and state.waited >= options.patience:
            return f"no improvement in {state.waited} epoch(s)"
        return ""

    def _steps_are_done(self) -> bool:
        return self.options.steps is not None and self.state.step >= self.options.steps

    def _finish(self) -> None:
        self.state.reason = self._reason()
        if self._best is not None:
            checkpoint.restore_values(self.program, self._best)
        self._journal.write("end", step=self.state.step, reason=self.state.reason)

    def _save(self, generators: list[Tensor]) -> None:
        if self._checkpoint is None:
            return
        state = self.state
        state.seconds = time.monotonic() - self._began
        held = {
            "state": asdict(state),
            "program": checkpoint.values(self.program),
            "objective": self.objective.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "best": self._best,
            "validated": None if self.validated is None else asdict(self.validated),
            "journal": self._journal.offset,
            "position": state.position,
            "generators": generators,
            "rng": rng.snapshot(),
        }
        self._checkpoint.save(held)

    # small things

    def _set_mode(self, training: bool) -> None:
        self.program.train(training)
        if training and self.options.frozen_statistics:
            modes.set_mode(self.program.graph, True, frozen_statistics=True)
            self.program.graph_module.recompile()

    def _check_finite(self, value: float, what: str, rate: float, batch: Any) -> None:
        if math.isfinite(value):
            return
        floats = [
            leaf
            for leaf in pytree.tree_leaves(batch)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        bad = not all(bool(torch.isfinite(leaf).all()) for leaf in floats)
        advice = (
            "the batch itself holds NaN or infinity: check how it is prepared"
            if bad
            else f"lower the learning rate (now {rate:g}) or clip gradients with clip_norm=1.0"
        )
        state = self.state
        raise TrainError(
            f"{self.name}: the {what} is {value} at step {state.step} (batch {state.position} of epoch "
            f"{state.epoch + 1}); {advice}"
        )

    def _total(self) -> int | None:
        """How many steps there will be, where that is known."""
        options, per_epoch = self.options, batches.length(self.data)
        known = None if per_epoch is None else per_epoch * options.epochs
        counts = [count for count in (known, options.steps) if count is not None]
        return min(counts, default=None)

    def _share(self) -> float:
        total = self._total()
        return self.state.step / total if total else self.state.epoch / self.options.epochs

    def _seconds_left(self) -> float | None:
        share = self._share()
        seconds = time.monotonic() - self._began
        return seconds * (1 - share) / share if share else None

    def _text(self) -> str:
        state = self.state
        scored = f", score {state.score / state.samples:.4f}" if state.scored else ""
        return f"epoch {state.epoch + 1} of {self.options.epochs}, loss {state.loss / state.samples:.4g}{scored}"


def _class_of(value: Any) -> str:
    return type(value).__name__


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
