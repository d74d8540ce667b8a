"""Objectives that can be compared: validation with fixed noise, and windows of noisy steps.

The ELBO of one step is noisy, and the largest of many noisy values is the luckiest one, not the
best. So a state is judged either on held-out rows with the same random numbers every time, or by
the mean over a window of steps with that mean's standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from pyro_flowkit.training.state import Snapshot, evaluating

Batch = tuple[torch.Tensor, ...]
VALIDATION_SEED = 20190511


class _Evaluates(Protocol):
    modules: list[torch.nn.Module]

    def evaluate(self, batch: Batch) -> float: ...


class Validator:
    """The objective on held-out rows, in eval mode, with the same noise at every call.

    Args:
        rows: Held-out tensors with `M` rows each.
        chunk: Most rows per evaluation; the chunks' means are weighted by their rows.
    """

    def __init__(self, rows: Batch, chunk: int) -> None:
        self._rows, self._chunk = rows, chunk

    def __call__(self, loss: _Evaluates) -> float:
        """Objective per held-out datum (nats)."""
        total, count = 0.0, len(self._rows[0])
        devices = list({tensor.device.index for tensor in self._rows if tensor.is_cuda})
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            evaluating(loss.modules),
        ):
            torch.manual_seed(VALIDATION_SEED)
            for start in range(0, count, self._chunk):
                batch = tuple(tensor[start : start + self._chunk] for tensor in self._rows)
                total -= loss.evaluate(batch) * len(batch[0])
        return total / count


class Window:
    """Mean and standard error of the objective over consecutive steps."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._values: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    @property
    def full(self) -> bool:
        """Whether enough steps have gone in."""
        return len(self._values) >= self.length

    def add(self, value: float) -> None:
        """Adds one finite step."""
        self._values.append(value)

    def close(self) -> tuple[float, float]:
        """Returns (mean, standard error) and empties the window."""
        values, self._values = self._values, []
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
        return mean, math.sqrt(variance / len(values))


class Best:
    """Keeps the best state, and counts how long the objective has not improved.

    An estimate counts as an improvement if it exceeds the last one that did by more than the
    standard error of their difference and by more than `tolerance` nats. The best estimate is that
    with the highest (mean - 2 standard errors); the kept state is the latest one that is not worse
    than it by more than the standard error of the difference. For exact values (standard error 0)
    this is the first of the highest.

    Args:
        take: Makes a snapshot of the current state.
    """

    tolerance = 1e-4

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take
        self._reference = (-math.inf, 0.0)
        self._best = (-math.inf, 0.0)
        self.snapshot: Snapshot | None = None
        self.step = 0
        self.stalled = 0

    def update(self, step: int, mean: float, error: float) -> None:
        """Judges the state after `step` steps by an estimate and its standard error."""
        if not math.isfinite(mean):
            self.stalled += 1
            return
        if mean - 2 * error > self._best[0] - 2 * self._best[1]:
            self._best = (mean, error)
            self.snapshot, self.step = self._take(), step
        elif error > 0 and mean >= self._best[0] - math.hypot(error, self._best[1]):
            self.snapshot, self.step = self._take(), step
        if mean > self._reference[0] + max(math.hypot(error, self._reference[1]), self.tolerance):
            self._reference, self.stalled = (mean, error), 0
        else:
            self.stalled += 1
