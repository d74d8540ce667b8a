"""The training loop: one pass of step, judge, record, until a reason to stop.

A step is: batch, loss, gradient, finite?, clip, learning rate, update. After every window of steps
the state is judged (see judge.py), which decides about the best state and about stopping.
Between two steps everything that the next one depends on can be saved and put back.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pyro_flowkit.training.callbacks import FitState
from pyro_flowkit.training.checkpoint import Checkpoints
from pyro_flowkit.training.data import Batches
from pyro_flowkit.training.faults import Interruption, caused_by_numbers, worst_site
from pyro_flowkit.training.files import check_plain
from pyro_flowkit.training.identity import check_probe, probe
from pyro_flowkit.training.judge import Judge
from pyro_flowkit.training.losses import MaximumLikelihood, Variational
from pyro_flowkit.training.optimizer import (
    GradientNorm,
    load_optimizer_state,
    load_parameter_state,
    optimizer_state,
)
from pyro_flowkit.training.progress import Bar
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.result import HISTORY, FitResult, history_columns
from pyro_flowkit.training.schedule import Schedule
from pyro_flowkit.training.state import copied, random_state, set_random_state
from pyro_flowkit.training.tolerance import Tolerance
from pyro_flowkit.warning import warn

NON_FINITE_LIMIT = 10
MAX_SKIPPED = 0.1  # of the steps, without a word
INTERRUPTIONS = ("interrupted", "terminated")


@dataclass
class Limits:
    """When to stop; None means never for that reason."""

    max_steps: int | None
    max_seconds: float | None
    patience: int | None
    steps_reason: str = "max_steps"
    patience_reason: str = "patience"

    def used(self, step: int, seconds: float) -> float:
        """Share of the budget that is gone."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_seconds = seconds / self.max_seconds if self.max_seconds else 0.0
        return max(by_steps, by_seconds)


class Loop:
    """One fit; ``run`` returns its result. The arguments are those of ``fit``, resolved."""

    def __init__(
        self,
        loss: MaximumLikelihood | Variational,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        limits: Limits,
        *,
        ranks: Ranks,
        judge: Judge,
        kl_weight: Callable[[int, float], float] | None,
        clip_norm: float | None,
        restore_best: bool,
        non_finite: str,
        callbacks: Sequence[Any],
        trackers: Any,  # as `safely` makes them
        checkpoints: Checkpoints | None,
        extra: dict[str, Any],
        keep_better: Callable[[], bool] | None,
        tolerance: Tolerance | None,
        notes: tuple[str, ...],
        state: FitState,
        bar: Bar,
    ) -> None:
        self._loss, self._batches = loss, batches
        self._optimizer, self._schedule, self._limits = optimizer, schedule, limits
        self._ranks, self._judge, self._kl_weight = ranks, judge, kl_weight
        self._clip_norm, self._restore_best = clip_norm, restore_best
        self._non_finite, self._callbacks, self._trackers = non_finite, callbacks, trackers
        self._checkpoints, self._extra = checkpoints, extra
        self._keep_better, self._tolerance = keep_better, tolerance
        self._notes, self._state, self._bar = notes, state, bar
        self._history: list[list[float]] = []
        self._skipped = self._in_a_row = 0
        self._updated = 0  # the last step that was not skipped
        self._last_failure = ""
        self._warned_of_validation = False
        self._seconds = self._before = 0.0  # that the fit has taken; of them before it was resumed
        self._optimizer_awaits: dict[str, Any] = {}
        self._reason = self._divergence = ""
        self._gradient_norm = GradientNorm()
        self._is_final = False  # ended for good, not by a limit or a wish

    def run(self, settings: Mapping[str, Any]) -> FitResult:
        """Trains until a limit, a plateau, a callback, an interruption or persistent NaN.

        Args:
            settings: What to tell the trackers of the call.
        """
        checkpoints = self._checkpoints
        with (
            Interruption() as self._interruption,
            checkpoints.held() if checkpoints else nullcontext(),
        ):
            self._train(settings)
            try:
                kept = self._finish()
            except KeyboardInterrupt:
                self._loss.set_mode(training=False)
                raise
            result = self._result(kept)
            self._call("on_end")
            steps = self._state.step
            summary = {"stop_reason": result.stop_reason, "best_step": kept, "steps": steps}
            self._trackers.end(summary)
            return result

    def _train(self, settings: Mapping[str, Any]) -> None:
        """All steps; what ended them is the reason."""
        state = self._state
        self._call("on_start")
        self._bar.begin_at(state.step)
        if self._checkpoints is not None:  # what cannot be written is better known now
            check_plain({"schedule": self._schedule.state_dict()})
        self._trackers.start({key: str(value) for key, value in settings.items()}, state.step)
        self._start = time.perf_counter()
        with warnings.catch_warnings(), self._bar:
            # Non-finite steps are counted and reported here, once, instead of by each warning.
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+inf|-inf)")
            try:
                if not self._is_final:
                    self._reason = self._steps()
                self._save()
                if self._reason not in INTERRUPTIONS and self._judge.can_judge_last():
                    self._judged()
            except KeyboardInterrupt:  # somewhere in a step: no state to go on from
                self._reason = "interrupted"
            except BaseException as error:
                self._trackers.end({"stop_reason": type(error).__name__, "steps": state.step})
                raise

    def _steps(self) -> str:
        state, limits = self._state, self._limits
        if state.stop is not None:  # before it began
            return state.stop
        self._judge.begin()
        if state.step == 0 and self._tolerance is not None and self._starts_near(self._tolerance):
            self._is_final = True
            return "tolerance"
        while True:
            if limits.max_steps is not None and state.step >= limits.max_steps:
                return limits.steps_reason
            if limits.max_seconds is not None and self._seconds >= limits.max_seconds:
                return "max_seconds"
            if self._checkpoints is not None and self._checkpoints.is_due():
                self._save()
            self._step(limits.used(state.step, self._seconds))
            ended = self._judged() if self._judge.is_due else ""
            self._is_final = bool(ended)
            try:
                self._call("on_step")
            except KeyboardInterrupt:
                self._interruption.reason = "interrupted"
            if ended:
                return ended
            if self._in_a_row >= NON_FINITE_LIMIT:
                where = worst_site(self._loss, self._batches[state.step - 1])
                self._is_final = True
                return (
                    f"non-finite at step {state.step}: {self._last_failure} "
                    f"({NON_FINITE_LIMIT} steps in a row){f'; {where}' if where else ''}"
                )
            stop = self._wish_to_stop()
            if stop is not None:
                return stop

    def _wish_to_stop(self) -> str | None:
        """The reason why a callback or a signal ends the fit; on all processes if on any."""
        own = self._interruption.reason
        code = INTERRUPTIONS.index(own) + 2 if own in INTERRUPTIONS else 1
        if own is None and self._state.stop is None:
            code = 0
        code = int(self._ranks.largest(code)[0])
        if code > 1:
            return INTERRUPTIONS[code - 2]
        return self._state.stop or ("stopped by another process" if code else None)

    def _step(self, used: float) -> None:
        state, loss = self._state, self._loss
        self._schedule.before_step(state.step, used)
        if self._kl_weight is not None and isinstance(loss, Variational):
            loss.kl_weight = self._kl_weight(state.step, used)
        loss.begin_step(state.step)
        parameters = loss.parameters()
        batch = self._batches[state.step]
        for parameter in parameters:
            parameter.grad = None
        failure = ""
        try:
            value = loss.backward(batch)
        except (ValueError, torch.linalg.LinAlgError) as error:
            if state.step == 0 or not caused_by_numbers(error):
                raise
            value, failure = math.nan, " ".join(str(error).split())[:300]
        seconds = self._meet(self._before + time.perf_counter() - self._start)
        if loss.fresh:
            self._take_fresh()
        value = self._ranks.average(parameters, value)
        # While this list lives, the optimizer need not make objects of the gradients a second time.
        grads = [p.grad for p in parameters if p.grad is not None]
        norm_tensor = self._gradient_norm(parameters, grads)
        norm = math.nan if failure else norm_tensor.item()
        if not failure and not math.isfinite(value):
            failure = f"loss {value}"
        if not failure and not math.isfinite(norm):
            failure = f"gradient norm {norm}"
        state.step += 1
        state.epoch = (state.step - 1) // (self._batches.steps_per_epoch or state.step)
        state.elbo, state.learning_rate = -value, self._schedule.learning_rate
        if failure:
            self._skip(failure)
        else:
            self._in_a_row, self._updated = 0, state.step
            if self._clip_norm is not None and norm > self._clip_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm_tensor)
            self._optimizer.step()
            self._schedule.after_step()
            self._judge.add(-value, used)
        self._seconds = seconds
        record = [state.step, -value, state.learning_rate, norm, seconds, math.nan]
        self._history.append(record)
        self._bar.step(state, seconds)
        if self._trackers:
            self._trackers.log(state.step, dict(zip(HISTORY[1:-1], record[1:-1], strict=True)))

    def _meet(self, seconds: float) -> float:
        """Agree with the other processes on the time, and that all have the same new parameters."""
        new = len(self._loss.fresh)
        seconds, most, least = self._ranks.largest(seconds, new, -new)
        if most != -least:
            raise ValueError(
                f"expected the same parameters on every process, got {new} new ones on this one and up to {most:g} on "
                f"another at step {self._state.step + 1}"
            )
        return seconds

    def _take_fresh(self) -> None:
        """Parameters that came into being late join the first group."""
        group, names = self._optimizer.param_groups[0], self._loss.names()
        self._ranks.broadcast(self._loss.fresh)
        for parameter in self._loss.fresh:
            group["params"].append(parameter)
            saved = self._optimizer_awaits.pop(names[id(parameter)], None)
            if saved is not None:
                load_parameter_state(self._optimizer, group, parameter, saved)
        self._loss.fresh.clear()

    def _skip(self, failure: str) -> None:
        if self._non_finite == "raise":
            where = worst_site(self._loss, self._batches[self._state.step - 1])
            raise FloatingPointError(
                f"expected a finite loss and gradient at step {self._state.step}, got {failure}"
                + (f"; {where}" if where else "")
            )
        self._skipped += 1
        self._in_a_row += 1
        self._last_failure = failure

    def _judged(self) -> str:
        """Judges the state at the end of a window; the reason why the fit should stop, empty if it should not."""
        found = self._judge.judge(self._updated)
        if found is not None:
            if not math.isfinite(found) and not self._warned_of_validation:
                self._warned_of_validation = True
                warn(
                    f"expected a finite objective on the validation data, got {found} at step {self._state.step}: "
                    "states that cannot be judged are not kept",
                    RuntimeWarning,
                )
            self._state.validation = self._history[-1][-1] = found
            self._call("on_validation")
            self._trackers.log(self._state.step, {"validation": found})
        if self._tolerance is not None and self._is_near(self._tolerance):
            return "tolerance"
        limits = self._limits
        if not (self._judge.has_stalled(limits.patience) and self._schedule.on_plateau()):
            return ""
        lost = self._judge.has_diverged and limits.patience_reason != "patience"
        return "diverged" if lost or limits.patience is None else limits.patience_reason

    def _starts_near(self, tolerance: Tolerance) -> bool:
        """Whether the guide need not be trained."""
        if isinstance(self._loss, Variational) and self._loss.kl_weight != 1.0:
            return False
        self._state.gap = tolerance.judge_start()
        return tolerance.is_met

    def _is_near(self, tolerance: Tolerance) -> bool:
        """Whether the guide is near enough to the posterior; moves the end where more steps at this rate are no use."""
        if isinstance(self._loss, Variational) and self._loss.kl_weight != 1.0:
            return False
        self._state.gap = tolerance.judge(self._state.step)
        self._trackers.log(self._state.step, {"gap": self._state.gap})
        if tolerance.look_ahead(self._state.step):
            self._end_at(tolerance.end)
        return tolerance.is_met

    def _end_at(self, step: int | None) -> None:
        self._limits.max_steps = step
        self._bar.end_at(step)

    def _finish(self) -> int:
        """Puts the parameters that are kept in place; the step that they are from."""
        failed = self._in_a_row >= NON_FINITE_LIMIT
        best = self._restore_best and self._reason != "tolerance"  # which the last state has met
        kept = self._judge.put_in_place(self._updated, best=best, failed=failed)
        self._divergence = self._judge.conclude(kept, failed=failed)
        if self._keep_better is not None:
            kept = kept if self._ranks.share(self._keep_better()) else 0
            self._ranks.broadcast(self._loss.tensors().values())
        if self._tolerance is not None:
            self._state.gap = self._tolerance.at_the_end(kept)
        self._loss.set_mode(training=False)
        self._optimizer.zero_grad(set_to_none=True)
        if failed:
            warn(f"fit stopped early: {self._reason}", RuntimeWarning)
        elif self._skipped > MAX_SKIPPED * self._state.step:
            warn(
                f"{self._skipped} of {self._state.step} steps were left out, the last one for its "
                f"{self._last_failure}: look at the data of those steps, or at where the model has no density",
                RuntimeWarning,
            )
        return kept

    def _save(self) -> None:
        """Writes a checkpoint, where there is a place for it."""
        if self._checkpoints is not None:
            self._trackers.flush()
            self._checkpoints.save(self._state.step, self._content)

    def _content(self) -> dict[str, Any]:
        """All that the next step depends on, and what was recorded so far."""
        return {
            **self._extra,
            "step": self._state.step,
            "seconds": self._seconds,
            "ended": self._reason if self._is_final else None,
            "tensors": copied(self._loss.tensors()),
            "optimizer": optimizer_state(self._optimizer, self._loss.names()),
            "schedule": self._schedule.state_dict(),
            "batches": self._batches.state_dict(),
            "random": self._ranks.gather(random_state()),
            "judge": self._judge.state_dict(),
            "tolerance": None if self._tolerance is None else self._tolerance.state_dict(),
            "counts": [self._skipped, self._in_a_row, self._updated],
            "last_failure": self._last_failure,
            "validation": self._state.validation,
            "objective": probe(self._loss, self._batches),
            "history": torch.tensor(self._history, dtype=torch.float64).reshape(-1, len(HISTORY)),
        }

    def load(self, content: Mapping[str, Any]) -> None:
        """Goes on from the content of a checkpoint.

        Raises:
            ValueError: If it is of another model, guide or optimizer.
        """
        self._loss.load(content["tensors"], self._batches[0])
        self._optimizer_awaits = load_optimizer_state(
            self._optimizer, content["optimizer"], self._loss.names()
        )
        self._take_fresh()
        check_probe(content["objective"], probe(self._loss, self._batches))
        self._schedule.load_state_dict(content["schedule"])
        self._judge.load_state_dict(content["judge"])
        if self._tolerance is not None and content["tolerance"] is not None:
            self._tolerance.load_state_dict(content["tolerance"])
            if self._tolerance.end is not None:
                self._end_at(self._tolerance.end)
        self._skipped, self._in_a_row, self._updated = content["counts"]
        self._last_failure = content["last_failure"]
        self._history = content["history"].tolist()
        self._state.step, self._state.validation = content["step"], content["validation"]
        self._seconds = self._before = content["seconds"]
        if self._history:
            _, self._state.elbo, self._state.learning_rate, *_ = self._history[-1]
        self._reason, self._is_final = content["ended"] or "", content["ended"] is not None
        self._batches.load_state_dict(content["batches"])
        set_random_state(content["random"][self._ranks.number])

    def _call(self, hook: str) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self._state)

    def _result(self, kept: int) -> FitResult:
        return FitResult(
            model=self._state.model,
            guide=self._state.guide,
            history=history_columns(self._history),
            stop_reason=self._reason,
            best_step=kept,
            skipped_steps=self._skipped,
            notes=self._notes,
            divergence=self._divergence,
            gap=self._state.gap,
            is_point=isinstance(self._loss, Variational) and self._loss.is_point,
            param_names=tuple(self._loss.param_names),
        )
