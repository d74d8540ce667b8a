"""The training loop: one pass of step, judge, record, until a reason to stop.

A step is: batch, loss, gradient, finite?, clip, learning rate, update. After every window of steps
the state is judged (see validation.py), which decides about the best state and about stopping.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyro_flowkit.training.callbacks import FitState
from pyro_flowkit.training.data import Batches
from pyro_flowkit.training.losses import MaximumLikelihood, Variational
from pyro_flowkit.training.progress import Bar
from pyro_flowkit.training.result import FitResult
from pyro_flowkit.training.schedule import Schedule
from pyro_flowkit.training.state import Snapshot
from pyro_flowkit.training.validation import Best, Validator, Window

NON_FINITE_LIMIT = 10
HISTORY = ("step", "elbo", "learning_rate", "grad_norm", "seconds")


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
    """One fit; `run` returns its result. The arguments are those of `fit`, resolved."""

    def __init__(
        self,
        loss: MaximumLikelihood | Variational,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        limits: Limits,
        *,
        validator: Validator | None,
        window: int,
        clip_norm: float | None,
        restore_best: bool,
        non_finite: str,
        callbacks: Sequence[Any],
        state: FitState,
        bar: Bar,
    ) -> None:
        self._loss, self._batches = loss, batches
        self._optimizer, self._schedule, self._limits = optimizer, schedule, limits
        self._validator, self._window = validator, Window(window)
        self._clip_norm, self._restore_best = clip_norm, restore_best
        self._non_finite, self._callbacks = non_finite, callbacks
        self._state, self._bar = state, bar
        self._best = Best(lambda: Snapshot(loss.modules, loss.parameters))
        self._history: list[tuple[float, ...]] = []
        self._validation: list[tuple[int, float]] = []
        self._skipped = self._in_a_row = 0
        self._updated = 0  # the last step that was not skipped
        self._judged = 0  # the last of those that was at the end of a window
        self._last_failure = ""

    def run(self) -> FitResult:
        """Trains until a limit, a plateau, a callback, an interruption or persistent NaN."""
        self._call("on_start")
        self._start = time.perf_counter()
        with warnings.catch_warnings():
            # Non-finite steps are counted and reported here, once, instead of by each warning.
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+inf|-inf)")
            try:
                reason = self._steps()
                self._judge(final=True)
            except KeyboardInterrupt:
                reason = "interrupted"
            finally:
                self._bar.close()
        kept = self._updated
        failed = self._in_a_row >= NON_FINITE_LIMIT
        if (self._restore_best or failed) and self._best.snapshot is not None:
            self._best.snapshot.restore()
            kept = self._best.step
        for module in self._loss.modules:
            module.eval()
        self._optimizer.zero_grad(set_to_none=True)
        if failed:
            warnings.warn(f"fit stopped early: {reason}", RuntimeWarning, stacklevel=3)
        self._call("on_end")
        return self._result(reason, kept)

    def _steps(self) -> str:
        state, limits = self._state, self._limits
        while True:
            seconds = time.perf_counter() - self._start
            if limits.max_steps is not None and state.step >= limits.max_steps:
                return limits.steps_reason
            if limits.max_seconds is not None and seconds >= limits.max_seconds:
                return "max_seconds"
            self._schedule.before_step(limits.used(state.step, seconds))
            self._step()
            if self._callbacks:
                self._call("on_step")
            if self._in_a_row >= NON_FINITE_LIMIT:
                return (
                    f"non-finite at step {state.step}: {self._last_failure} "
                    f"({NON_FINITE_LIMIT} steps in a row)"
                )
            if self._window.full and self._judge():
                return limits.patience_reason
            if state.stop is not None:
                return state.stop

    def _step(self) -> None:
        state = self._state
        batch = self._batches[state.step]
        for parameter in self._loss.parameters():
            parameter.grad = None
        failure = ""
        try:
            loss, new = self._loss.backward(batch)
            if new:  # parameters that came into being late join the first group
                self._optimizer.param_groups[0]["params"].extend(new)
        except ValueError as error:
            if state.step == 0 or not _caused_by_non_finite(error):
                raise
            loss, failure = math.nan, "a distribution was given NaN or inf"
        grads = [p.grad for p in self._loss.parameters() if p.grad is not None]
        norm_tensor = torch.nn.utils.get_total_norm(grads)
        norm = math.nan if failure else norm_tensor.item()
        if not failure and not math.isfinite(loss):
            failure = f"loss {loss}"
        if not failure and not math.isfinite(norm):
            failure = f"gradient norm {norm}"
        state.step += 1
        state.epoch = (state.step - 1) // self._batches.steps_per_epoch if self._batches.size else 0
        state.elbo, state.learning_rate = -loss, self._schedule.learning_rate
        if failure:
            self._skip(failure)
        else:
            self._in_a_row, self._updated = 0, state.step
            if self._clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self._loss.parameters(), self._clip_norm, norm_tensor
                )
            self._optimizer.step()
            self._schedule.after_step()
            self._window.add(-loss)
        seconds = time.perf_counter() - self._start
        self._history.append((state.step, -loss, state.learning_rate, norm, seconds))
        self._bar.step(state, seconds)

    def _skip(self, failure: str) -> None:
        if self._non_finite == "raise":
            raise FloatingPointError(
                f"expected a finite loss and gradient at step {self._state.step}, got {failure}"
            )
        self._skipped += 1
        self._in_a_row += 1
        self._last_failure = failure

    def _judge(self, final: bool = False) -> bool:
        """Judges the state at the end of a window; True if the fit should stop."""
        state = self._state
        if final and not self._judgeable():
            return False
        mean, error = self._window.close()
        self._judged = self._updated
        if self._validator is not None:
            mean, error = self._validator(self._loss), 0.0
            state.validation = mean
            self._validation.append((state.step, mean))
            self._call("on_validation")
        self._best.update(self._updated, mean, error)
        if self._limits.patience is None or self._best.stalled < self._limits.patience:
            return False
        self._best.stalled = 0
        return self._schedule.on_plateau()

    def _judgeable(self) -> bool:
        """At the end: whether the steps since the last window say anything.

        Without validation a window of fewer than ten steps is too noisy; the state is then kept as
        it is if the window before it was the best.
        """
        if len(self._window) == 0:
            return False
        if self._validator is not None or len(self._window) >= min(10, self._window.length):
            return True
        if self._best.step == self._judged:
            self._best.snapshot = None
        return False

    def _call(self, hook: str) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self._state)

    def _result(self, reason: str, kept: int) -> FitResult:
        table = np.array(self._history, dtype=np.float64).reshape(-1, len(HISTORY)).T
        history = dict(zip(HISTORY, (np.ascontiguousarray(row) for row in table), strict=True))
        history["step"] = history["step"].astype(np.int64)
        return FitResult(
            model=self._state.model,
            guide=self._state.guide,
            history=history,
            validation={
                "step": np.array([step for step, _ in self._validation], dtype=np.int64),
                "elbo": np.array([elbo for _, elbo in self._validation], dtype=np.float64),
            },
            stop_reason=reason,
            best_step=kept,
            skipped_steps=self._skipped,
            param_names=tuple(self._loss.param_names),
        )


def _caused_by_non_finite(error: ValueError) -> bool:
    """Whether argument validation of a distribution refused NaN or inf."""
    text = str(error)
    refused = "to satisfy the constraint" in text or "to be within the support" in text
    return refused and ("nan" in text or "inf" in text)
