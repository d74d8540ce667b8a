"""What a fit makes of its objective: after every window of steps the state is judged, and the best one is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from pyro_flowkit.programs.modules import copied
from pyro_flowkit.training.average import Average
from pyro_flowkit.training.divergence import Divergence
from pyro_flowkit.training.losses import MaximumLikelihood
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.state import Tensors, write_into
from pyro_flowkit.training.validation import Best, Validator, Window
from pyro_flowkit.training.variational import Variational
from pyro_flowkit.warning import warn


class Judge:
    """Judges states by held-out rows, or by the mean over a window of steps.

    Args:
        loss: What is trained.
        validator: The objective on held-out rows; None judges by windows.
        window: Steps per judgement.
        average: The average of the parameters that is judged, and kept, instead of the last step's; or None.
        ranks: The processes that share the fit.
    """

    def __init__(
        self,
        loss: MaximumLikelihood | Variational,
        validator: Validator | None,
        window: int,
        average: Average | None,
        ranks: Ranks,
    ) -> None:
        self._loss, self._validator, self._average, self._ranks = loss, validator, average, ranks
        self._window, self._best = Window(window), Best()
        self._divergence = Divergence(validated=validator is not None)
        self._judged = 0  # the last step that was at the end of a window
        self._first: Tensors = {}  # the state before the first step
        self._first_elbo = float("nan")

    def begin(self) -> None:
        """Takes a copy of the state, to go back to if the first steps are none."""
        self._first = self._first or copied(self._loss.tensors())

    @property
    def is_due(self) -> bool:
        """Whether a window is full."""
        return self._window.full

    def add(self, elbo: float, used: float) -> None:
        """Takes in a step that was done; ``used`` is the share of the budget that was gone before it."""
        if self._first_elbo != self._first_elbo:
            self._first_elbo = -math.inf if self._is_annealed else elbo
        if self._average is not None:
            self._average.update(self._loss.learned, used)
        self._window.add(elbo, annealed=self._is_annealed)

    @property
    def _is_annealed(self) -> bool:
        """Whether the KL has another weight than 1: what is maximised then is not the ELBO."""
        return isinstance(self._loss, Variational) and self._loss.kl_weight != 1.0

    def judge(self, step: int) -> float | None:
        """Judges the state after so many steps; the validation objective where there is one (nats per datum)."""
        steps, telling = self._window.values, self._window.is_telling
        mean, error = self._window.close()
        self._judged = step
        found = None
        average = None if self._validator is None else self._average
        with nullcontext() if average is None else average.in_place(self._loss.learned):
            if self._validator is not None:
                found = mean = self._validator(self._loss, self._ranks)
                error = 0.0
            if steps and not self._is_annealed and (telling or found is not None):
                self._best.update(step, mean, error, self._loss.tensors)
                began = self._first_elbo != -math.inf
                self._divergence.add(step, steps, found, began=began)
        news = self._divergence.news()
        if news:
            kept = f"restore_best=True ends with the best state so far, of step {self._best.step}"
            warn(f"{news}. {kept}", RuntimeWarning)
        return found

    def has_stalled(self, patience: int | None) -> bool:
        """Whether so many judgements have brought nothing; the count begins anew then.

        Without patience: whether the objective has been far below its best for too long to come back.
        """
        if patience is None:
            return self._divergence.is_lost
        if self._best.stalled < patience:
            return False
        self._best.stalled = 0
        return True

    @property
    def has_diverged(self) -> bool:
        """Whether the objective is far below its best."""
        return self._divergence.is_far

    def conclude(self, kept: int, *, failed: bool) -> str:
        """Says in what way the objective has fallen, empty if it has not.

        Args:
            kept: The step whose parameters are kept.
            failed: Whether the end has been said already.
        """
        text, is_new = self._divergence.conclusion(kept)
        if is_new and not failed:
            warn(text, RuntimeWarning)
        return text

    def can_judge_last(self) -> bool:
        """At the end: whether the steps since the last window say anything.

        Without validation a window in which too few steps count is too noisy; the state is then kept as
        it is if the window before it was the best.
        """
        if len(self._window) == 0:
            return False
        if self._validator is not None or self._window.is_telling:
            return True
        if self._best.step == self._judged and not self._window.is_annealed:
            self._best.tensors = None
        return False

    def put_in_place(self, step: int, *, best: bool, failed: bool) -> int:
        """Has the parameters hold what is kept; the step that they are from.

        Args:
            step: The last step that was done.
            best: Whether the best state is kept, rather than the last.
            failed: Whether the last steps were none, so that neither they nor an average of them are of use.
        """
        if best and self._validator is None and self._divergence.is_far:
            failed = True
        average = None if failed else self._average
        if average is not None and not average.count:
            warn(
                "Expected the fit to reach the steps that average='tail' is taken over, the second half of its budget, "
                "got an earlier end: nothing is averaged"
            )
            average = None
        # nothing better than the beginning
        if failed and (self._best.step == 0 or not self._best.mean >= self._first_elbo):
            write_into(self._loss.tensors(), self._first)
            return 0
        if average is not None and self._validator is None:
            average.put(self._loss.learned)
        elif (best or failed) and self._best.tensors is not None:
            write_into(self._loss.tensors(), self._best.tensors)
            return self._best.step
        elif average is not None:
            average.put(self._loss.learned)
        return step

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": self._window.state_dict(),
            "best": self._best.state_dict(),
            "judged": self._judged,
            "first": self._first,
            "first_elbo": self._first_elbo,
            "divergence": self._divergence.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._window.load_state_dict(state["window"])
        self._best.load_state_dict(state["best"])
        self._divergence.load_state_dict(state["divergence"])
        self._judged = state["judged"]
        self._first, self._first_elbo = state["first"], state["first_elbo"]
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"], self._loss.parameters()[0].device)
