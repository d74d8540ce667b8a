"""What a callback sees and may do while ``fit`` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class FitState:
    """The state of a running fit, handed to every hook.

    Attributes:
        model: The model being trained.
        guide: Its guide, or None.
        optimizer: The torch optimizer.
        step: Number of steps done.
        epoch: Number of epochs begun, minus one; 0 without data.
        elbo: The last step's objective, per datum where data were given (nats).
        learning_rate: Learning rate of the first parameter group.
        validation: The last validation objective (nats per datum), or None.
        gap: The last estimate of log evidence - ELBO of a guide that watches it (nats), or None.
        stop: Set to a text to end the fit after this step; it becomes the result's ``stop_reason``.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow, fit
        >>> from pyro_flowkit.training import Callback, FitState
        >>> class Steps(Callback):
        ...     def on_step(self, state: FitState):
        ...         print(state.step, state.epoch, state.validation)
        >>> x = torch.randn(20, 2)
        >>> _ = fit(SplineFlow(2), data=x, batch_size=10, max_steps=3, callbacks=[Steps()], progress=False)
        1 0 None
        2 0 None
        3 1 None
    """

    model: Any
    guide: Any
    optimizer: torch.optim.Optimizer
    step: int = 0
    epoch: int = 0
    elbo: float = float("nan")
    learning_rate: float = float("nan")
    validation: float | None = None
    gap: float | None = None
    stop: str | None = None


class Callback:
    """Base class of callbacks; each hook does nothing until overridden.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow, fit
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> from pyro_flowkit.training import Callback
        >>> class Third(Callback):
        ...     def on_step(self, state):
        ...         state.stop = "third step" if state.step == 3 else state.stop
        >>> fit(SplineFlow(2), data=x, max_steps=9, callbacks=[Third()], progress=False).stop_reason
        'third step'
    """

    def on_start(self, state: FitState) -> None:
        """Called once, before the first step."""

    def on_step(self, state: FitState) -> None:
        """Called after every step, skipped ones included, and after its validation if there is one."""

    def on_validation(self, state: FitState) -> None:
        """Called after every validation; ``state.validation`` is fresh."""

    def on_end(self, state: FitState) -> None:
        """Called once at the end, with the returned parameters in place."""
