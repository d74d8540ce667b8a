"""What a call of ``fit`` asks for, looked at once: kinds, ranges, and data in whatever holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pyro.infer import ELBO

from pyro_flowkit.training.arguments import (
    as_tensors,
    check_args,
    check_callbacks,
    check_optimizer,
    check_programs,
    whole,
)

COUNTS = ("max_steps", "max_epochs", "batch_size", "patience", "num_particles", "restarts")
POSITIVE = ("max_steps", "max_epochs", "max_seconds", "lr", "clip_norm", "patience")


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`pyro_flowkit.fit`, by its names."""

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    data: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any] | None
    objective: ELBO | str | None
    num_particles: int | None
    max_steps: int | None
    max_epochs: int | None
    max_seconds: float | None
    batch_size: int | None
    val_data: Any
    val_fraction: float
    optimizer: Callable[..., Any] | None
    lr: float | None
    scheduler: str | Callable[[torch.optim.Optimizer], Any] | None
    clip_norm: float | None
    patience: int | None
    restore_best: bool
    average: float | Literal["tail"] | None
    non_finite: str
    kl_schedule: Callable[[int], float] | tuple[float, float] | None
    seed: int | None
    device: str | torch.device | None
    compile: bool
    check_plates: bool
    trackers: Sequence[Any]
    checkpoint_dir: Any
    checkpoint_every: float
    resume: bool
    callbacks: Sequence[Any]
    progress: bool
    tolerance: float | None
    restarts: int

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Self:
        """The options of a call, by name.

        Raises:
            TypeError: If one is of the wrong kind.
            ValueError: If one is out of range.
        """
        check_programs(call["model"], call["guide"])
        check_args(call["args"])
        check_callbacks(call["callbacks"])
        check_optimizer(call["optimizer"])
        counts: dict[str, Any] = {name: whole(name, call[name]) for name in COUNTS}
        options = cls(**{**call, **counts})
        options._check_ranges()
        return options

    def with_tensors(self) -> Self:
        """The same, with tensors in the place of arrays and frames."""
        return replace(
            self,
            data=as_tensors(self.data, self.model),
            val_data=as_tensors(self.val_data, self.model, "val_data"),
        )

    def given_numbers(self) -> dict[str, float]:
        """Limits, rate and clipping, where they are given."""
        return {name: value for name in POSITIVE if (value := getattr(self, name))}

    def _check_ranges(self) -> None:
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"Expected tolerance >= 0 nats, got {self.tolerance}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} > 0, got {value}")
        if not self.checkpoint_every >= 0:
            raise ValueError(f"Expected checkpoint_every >= 0 seconds, got {self.checkpoint_every}")
        if self.non_finite not in ("skip", "raise"):
            raise ValueError(
                f"Expected non_finite to be 'skip' or 'raise', got {self.non_finite!r}"
            )
