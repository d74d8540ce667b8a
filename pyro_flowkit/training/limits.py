"""When a fit stops, and which schedule leads there: as the caller says, or the recipe, or once nothing improves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro_flowkit.recipe import Recipe
from pyro_flowkit.training.data import Batches
from pyro_flowkit.training.options import Options

DEFAULT_CAP = 20_000
DEFAULT_PATIENCE = 5


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


def chosen_limits(options: Options, recipe: Recipe, batches: Batches) -> tuple[Limits, Any]:
    """Limits and scheduler: the caller's, then the recipe's, then a cap with stopping at plateaus.

    Raises:
        ValueError: If ``max_epochs`` is asked for of data without a length.
    """
    limits = Limits(options.max_steps, options.max_seconds, options.patience)
    if options.max_epochs is not None:
        if batches.steps_per_epoch is None:
            raise ValueError(
                f"Expected data with a known number of batches for max_epochs={options.max_epochs}, got a source "
                "without len()"
            )
        by_epochs = options.max_epochs * batches.steps_per_epoch
        if limits.max_steps is None or by_epochs < limits.max_steps:
            limits.max_steps, limits.steps_reason = by_epochs, "max_epochs"
    scheduler = options.scheduler or recipe.scheduler
    if limits.max_steps is None:
        limits.max_steps = recipe.max_steps
    if limits.max_steps is None and limits.max_seconds is None:
        limits.max_steps = DEFAULT_CAP
        scheduler = scheduler or "plateau"
        if limits.patience is None and scheduler in ("plateau", "constant"):
            limits.patience, limits.patience_reason = DEFAULT_PATIENCE, "converged"
    return limits, scheduler or "cooldown"
