"""The progress bar: smoothed ELBO, validation, gap, steps per second; tqdm is loaded when shown."""

from __future__ import annotations

import math
from typing import Any

from pyro_flowkit.training.callbacks import FitState


class Bar:
    """A tqdm bar from the call on, or nothing: it says what is done before the first step, too."""

    interval = 0.2
    memory = 0.98

    def __init__(self) -> None:
        self._bar: Any = None
        self._unit = "nats"
        self._smoothed = self._weight = self._shown = 0.0
        self._pending = 0

    def open(self) -> None:
        """Shows it; without this call all others do nothing."""
        from tqdm.auto import tqdm

        self._bar = tqdm(unit="step", desc="fit", dynamic_ncols=True)

    def say(self, phase: str) -> None:
        """Says what is being done besides steps."""
        if self._bar is not None:
            self._bar.set_postfix_str(phase)

    def begin(self, step: int, total: int | None, *, per_datum: bool) -> None:
        """Begins with the steps.

        Args:
            step: How many were done before.
            total: How many there are at most, where known.
            per_datum: Whether the ELBO is per datum.
        """
        self._unit = "nats/datum" if per_datum else "nats"
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.reset(total)  # the clock, too: it gives the steps per second
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def step(self, state: FitState, seconds: float) -> None:
        """Takes in a step; redraws a few times per second at most."""
        if self._bar is None:
            return
        self._pending += 1
        if math.isfinite(state.elbo):
            self._smoothed = self.memory * self._smoothed + (1 - self.memory) * state.elbo
            self._weight = self.memory * self._weight + (1 - self.memory)
        if seconds - self._shown >= self.interval:
            self._shown = seconds
            self._draw(state)

    def _draw(self, state: FitState) -> None:
        if self._bar is None:
            return
        elbo = self._smoothed / self._weight if self._weight else math.nan
        text = f"ELBO {elbo:.4g} {self._unit}"
        if state.validation is not None:
            text += f", validation {state.validation:.4g}"
        if state.gap is not None:
            text += f", gap {state.gap:.2g}"
        self._bar.set_postfix_str(f"{text}, lr {state.learning_rate:.1e}", refresh=False)
        self._bar.update(self._pending)
        self._pending = 0

    def end_at(self, total: int | None) -> None:
        """Says after how many steps the fit now ends at the latest."""
        if self._bar is not None:
            self._bar.total = total

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.update(self._pending)
            self._bar.close()
            self._bar = None
