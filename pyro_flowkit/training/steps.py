"""The steps of a fit. A step is: batch, loss, gradient, finite?, clip, learning rate, update.

Between two steps everything that the next one depends on can be saved and put back.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from pyro_flowkit.programs.modules import copied
from pyro_flowkit.training.faults import caused_by_numbers, worst_site
from pyro_flowkit.training.optimizer import (
    GradientNorm,
    load_optimizer_state,
    load_parameter_state,
    optimizer_state,
)
from pyro_flowkit.training.plan import Plan
from pyro_flowkit.training.result import HISTORY
from pyro_flowkit.training.variational import Variational

NON_FINITE_LIMIT = 10
LATELY, FEW = 50, 10  # steps whose norms are looked at, and so few that they say nothing
_NORM = HISTORY.index("grad_norm")


class Steps:
    """Takes steps, and counts them.

    Attributes:
        history: A record of every step.
        seconds: That the fit has taken.
        updated: The last step that was not skipped.
        skipped: How many were.
        last_failure: Why the last of them was.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._state, self._loss = plan, plan.state, plan.loss
        self._optimizer, self._schedule = plan.state.optimizer, plan.schedule
        self._ranks, self._clip_norm = plan.ranks, plan.clip_norm
        self.history: list[list[float]] = []
        self.updated = self.skipped = self._in_a_row = 0
        self.last_failure = ""
        self.seconds = self._before = 0.0  # of them before the fit was resumed
        self._start = time.perf_counter()
        self._optimizer_awaits: dict[str, Any] = {}
        self._gradient_norm = GradientNorm()

    @property
    def have_failed(self) -> bool:
        """Whether so many were skipped in a row that there is no hope."""
        return self._in_a_row >= NON_FINITE_LIMIT

    def begin(self) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def take(self, used: float) -> None:
        """Takes a step; ``used`` is the share of the budget that is gone."""
        plan, state, loss = self._plan, self._state, self._loss
        self._schedule.before_step(state.step, used)
        if plan.kl_weight is not None and isinstance(loss, Variational):
            loss.kl_weight = plan.kl_weight(state.step, used)
        loss.begin_step(state.step)
        parameters = loss.parameters()
        batch = plan.batches[state.step]
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
        state.epoch = (state.step - 1) // (plan.batches.steps_per_epoch or state.step)
        state.elbo, state.learning_rate = -value, self._schedule.learning_rate
        if failure:
            self._skip(failure)
        else:
            self._in_a_row, self.updated = 0, state.step
            largest = self._largest_norm()
            if norm > largest:
                torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm_tensor)
            self._optimizer.step()
            self._schedule.after_step()
            plan.judge.add(-value, used)
        self.seconds = seconds
        self._record([state.step, -value, state.learning_rate, norm, seconds, math.nan])

    def where_it_failed(self) -> str:
        """The parameter, site or row where the numbers of the last step stop being finite; or nothing."""
        return worst_site(self._loss, self._plan.batches[self._state.step - 1])

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, and the records."""
        return {
            "step": self._state.step,
            "seconds": self.seconds,
            "tensors": copied(self._loss.tensors()),
            "optimizer": optimizer_state(self._optimizer, self._loss.names()),
            "schedule": self._schedule.state_dict(),
            "counts": [self.skipped, self._in_a_row, self.updated],
            "last_failure": self.last_failure,
            "history": torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(HISTORY)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave.

        Raises:
            ValueError: If it is of another model, guide or optimizer.
        """
        self._loss.load(state["tensors"], self._plan.batches[0])
        self._optimizer_awaits = load_optimizer_state(
            self._optimizer, state["optimizer"], self._loss.names()
        )
        self._take_fresh()
        self._schedule.load_state_dict(state["schedule"])
        self.skipped, self._in_a_row, self.updated = state["counts"]
        self.last_failure = state["last_failure"]
        self.history = state["history"].tolist()
        self._state.step = state["step"]
        self.seconds = self._before = state["seconds"]
        if self.history:
            _, self._state.elbo, self._state.learning_rate, *_ = self.history[-1]

    def _largest_norm(self) -> float:
        """What the gradient is clipped to."""
        if self._clip_norm is not None:
            return self._clip_norm
        if self._plan.clip_ratio is None:
            return math.inf
        norms = [record[_NORM] for record in self.history[-LATELY:]]
        norms = [norm for norm in norms if math.isfinite(norm)]
        return self._plan.clip_ratio * statistics.median(norms) if len(norms) >= FEW else math.inf

    def _record(self, record: list[float]) -> None:
        self.history.append(record)
        self._plan.bar.step(self._state, record[HISTORY.index("seconds")])
        if self._plan.trackers:
            named = dict(zip(HISTORY[1:-1], record[1:-1], strict=True))
            self._plan.trackers.log(self._state.step, named)

    def _meet(self, seconds: float) -> float:
        """Agree with the other processes on the time, and that all have the same new parameters."""
        new = len(self._loss.fresh)
        seconds, most, least = self._ranks.largest(seconds, new, -new)
        if most != -least:
            raise ValueError(
                f"Expected the same parameters on every process, got {new} new ones on this one and up to {most:g} on "
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
        if self._plan.options.non_finite == "raise":
            where = self.where_it_failed()
            raise FloatingPointError(
                f"Expected a finite loss and gradient at step {self._state.step}, got {failure}"
                + (f"; {where}" if where else "")
            )
        self.skipped += 1
        self._in_a_row += 1
        self.last_failure = failure
