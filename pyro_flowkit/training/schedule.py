"""Learning-rate schedules as functions of the share of the budget that is used up.

A schedule multiplies every group's initial learning rate by f(u), with u in [0, 1) the larger of
(steps done / steps allowed) and (seconds passed / seconds allowed):

    constant     f(u) = 1
    cosine       f(u) = (1 + cos(pi u)) / 2
    flat_cosine  f(u) = 1, from u = 0.4 on (1 + cos(pi (u - 0.4) / 0.6)) / 2
    cooldown     f(u) = 1, from u = 0.9 on (1 + cos(pi (u - 0.9) / 0.1)) / 2
    step         f(u) = 1, then 1/10 from u = 0.5, then 1/100 from u = 0.8

"plateau" has no budget: it divides the rate by ten whenever the objective stops improving, twice.

A rate that falls pays once training is held up by the noise of its steps. A long training is, a short one is not yet:
"cooldown" is as good as any for the first and loses little on the second (Alexander Hägele et al. Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations. NeurIPS 2024; here ``python -m benchmarks.pyro_examples``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLAT_SHARE = 0.4  # of the steps, of flat_cosine

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda used: 1.0,
    "cosine": lambda used: 0.5 * (1.0 + math.cos(math.pi * used)),
    "flat_cosine": lambda used: (
        0.5 * (1.0 + math.cos(math.pi * max(0.0, used - FLAT_SHARE) / (1.0 - FLAT_SHARE)))
    ),
    "cooldown": lambda used: 0.5 * (1.0 + math.cos(math.pi * max(0.0, used - 0.9) / 0.1)),
    "step": lambda used: 1.0 if used < 0.5 else 0.1 if used < 0.8 else 0.01,
}


class Schedule:
    """Sets an optimizer's learning rate; also says whether a plateau ends the fit.

    Args:
        optimizer: The optimizer, with its initial learning rates.
        scheduler: "constant", "cosine", "flat_cosine", "cooldown", "step", "plateau", or a callable that takes the
            optimizer and returns a ``torch.optim.lr_scheduler.LRScheduler``, stepped once per optimizer step.
        warmup_steps: Over so many first steps the rate rises in a line to what the name gives. Adam's first steps move
            every parameter by the whole rate, whatever its gradient: too far for one that starts near its place.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the callable returns something else than an ``LRScheduler``, or one that needs
            a metric (``ReduceLROnPlateau``).
    """

    drops = 2

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: str | Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        warmup_steps: int = 0,
    ) -> None:
        self._optimizer, self._warmup_steps = optimizer, warmup_steps
        self._initial = [float(group["lr"]) for group in optimizer.param_groups]
        self._factor: Callable[[float], float] | None = None
        self._torch: torch.optim.lr_scheduler.LRScheduler | None = None
        self._drops_left = 0
        if callable(scheduler):
            built = scheduler(optimizer)
            if isinstance(built, torch.optim.lr_scheduler.ReduceLROnPlateau) or not isinstance(
                built, torch.optim.lr_scheduler.LRScheduler
            ):
                raise TypeError(
                    "Expected scheduler(optimizer) to return an LRScheduler that needs no metric, "
                    f"got {type(built).__name__}"
                )
            self._torch = built
        elif scheduler == "plateau":
            self._drops_left = self.drops
        elif scheduler in SCHEDULES:
            self._factor = SCHEDULES[scheduler]
        else:
            names = ", ".join([*SCHEDULES, "plateau"])
            raise ValueError(f"Expected scheduler to be one of {names}, got {scheduler!r}")

    @property
    def learning_rate(self) -> float:
        """The first parameter group's learning rate."""
        return float(self._optimizer.param_groups[0]["lr"])

    def before_step(self, step: int, used: float) -> None:
        """Sets the rate for the next step, after ``step`` others; ``used`` is the share of the budget that is gone."""
        if self._factor is not None:
            factor = self._factor(min(used, 1.0))
            if step < self._warmup_steps:
                factor *= (step + 1) / (self._warmup_steps + 1)
            for group, initial in zip(self._optimizer.param_groups, self._initial, strict=True):
                group["lr"] = initial * factor

    def after_step(self) -> None:
        """Advances a torch scheduler after an optimizer step."""
        if self._torch is not None:
            self._torch.step()

    def on_plateau(self) -> bool:
        """Lowers the rate where that is still to be done; True if the fit should end instead."""
        if self._drops_left == 0:
            return True
        self._drops_left -= 1
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr"] / 10
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "drops_left": self._drops_left,
            "torch": None if self._torch is None else self._torch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drops_left = state["drops_left"]
        if self._torch is not None and state["torch"] is not None:
            self._torch.load_state_dict(state["torch"])


def kl_weight(
    schedule: Callable[[int], float] | tuple[float, float],
) -> Callable[[int, float], float]:
    """The weight of a KL schedule, as a function of the step and of the share of the budget that is gone.

    Args:
        schedule: A function of the step, or ``(w, share)``: from w in a line to 1 over that share, then 1.

    Raises:
        ValueError: If the numbers are out of range.
    """
    if callable(schedule):
        return lambda step, used: float(schedule(step))
    weight, share = schedule
    if not (0 <= weight and 0 < share <= 1):
        raise ValueError(
            f"Expected kl_schedule = (weight >= 0, share in (0, 1]) or a function of the step, got {schedule}"
        )
    return lambda step, used: 1.0 if used >= share else weight + (1.0 - weight) * used / share
