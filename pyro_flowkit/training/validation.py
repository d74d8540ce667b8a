"""Objectives that can be compared: validation with fixed noise, and windows of noisy steps.

The ELBO of one step is noisy, and the largest of many noisy values is the luckiest one, not the
best. So a state is judged either on held-out rows with the same random numbers every time, or by
the mean over a window of steps with that mean's standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from pyro_flowkit.programs.modules import copied
from pyro_flowkit.training.data import Batch, Device, as_batch
from pyro_flowkit.training.faults import caused_by_numbers
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.state import Tensors, evaluating

VALIDATION_SEED = 20190511
_TELLING = 10  # steps
_ALIKE = 2.0  # times an error


class _Evaluates(Protocol):
    modules: list[torch.nn.Module]
    registered: dict[str, torch.nn.Module]

    def parameters(self) -> list[torch.Tensor]: ...

    def evaluate(self, batch: Batch) -> float: ...


class Validator:
    """The objective on held-out rows, in eval mode, with the same noise at every call.

    Args:
        held_out: Tensors with ``M`` rows each, or a DataLoader.
        chunk: Most rows per evaluation, of tensors; the chunks' means are weighted by their rows.
        device: Where to put the batches of a DataLoader; None leaves them.
        check: Of the batches of a DataLoader, with their name, at the first call.
    """

    def __init__(
        self,
        held_out: Batch | DataLoader,
        chunk: int,
        device: Device = None,
        check: Callable[[Batch, str], None] | None = None,
    ) -> None:
        self._held_out, self._chunk, self._device = held_out, chunk, device
        self._check = check

    def __call__(self, loss: _Evaluates, ranks: Ranks) -> float:
        """Objective per held-out datum (nats); several processes share the work."""
        total, count = 0.0, 0
        devices = list({t.device.index for t in loss.parameters() if t.is_cuda})
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            evaluating([*loss.modules, *loss.registered.values()]),
        ):
            torch.manual_seed(VALIDATION_SEED)
            for number, batch in enumerate(self._batches()):
                if number % ranks.count != ranks.number:
                    continue
                torch.manual_seed(VALIDATION_SEED + number)
                try:
                    total -= loss.evaluate(batch) * len(batch[0])
                except (ValueError, torch.linalg.LinAlgError) as error:
                    if not caused_by_numbers(error):
                        raise
                    total = math.nan
                count += len(batch[0])
        total, rows = ranks.total(total, count)
        return total / rows

    def _batches(self) -> Iterator[Batch]:
        if isinstance(self._held_out, DataLoader):
            for number, given in enumerate(self._held_out):
                batch = as_batch(given, "every batch of val_data", self._device)
                if self._check is not None:
                    self._check(batch, f"batch {number} of val_data")
                yield batch
            self._check = None
            return
        for start in range(0, len(self._held_out[0]), self._chunk):
            yield tuple(tensor[start : start + self._chunk] for tensor in self._held_out)


class Window:
    """Consecutive steps, and the mean and standard error of the objective over those that count.

    A step whose KL terms had another weight than 1 is one of the window, but its objective is another one.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._values: list[float] = []
        self._annealed = 0

    @property
    def full(self) -> bool:
        """Whether enough steps have gone in."""
        return len(self) >= self.length

    @property
    def is_telling(self) -> bool:
        """Whether enough steps count for a mean that says anything."""
        return len(self._values) >= min(_TELLING, self.length)

    @property
    def is_annealed(self) -> bool:
        """Whether there is a step that does not count."""
        return self._annealed > 0

    def __len__(self) -> int:
        return len(self._values) + self._annealed

    def add(self, value: float, *, annealed: bool = False) -> None:
        """Adds one finite step."""
        if annealed:
            self._annealed += 1
        else:
            self._values.append(value)

    @property
    def values(self) -> list[float]:
        """The steps that count."""
        return list(self._values)

    def close(self) -> tuple[float, float]:
        """Returns (mean, standard error), NaN if no step counts, and empties the window."""
        values, self._values, self._annealed = self._values, [], 0
        if not values:
            return math.nan, math.nan
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
        return mean, math.sqrt(variance / len(values))

    def state_dict(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "values": list(self._values),
            "annealed": self._annealed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.length, self._values = state["length"], list(state["values"])
        self._annealed = state["annealed"]


class Best:
    """Keeps the best state, and counts how long the objective has not improved.

    An estimate counts as an improvement if it exceeds the last one that did by more than the
    standard error of their difference and by more than ``tolerance`` nats. The best estimate is that
    with the highest (mean - 2 standard errors). The kept state is the latest one that is not worse than it by more
    than the standard error of the difference times ``sqrt(2 log N)``, by which the largest of N noisy estimates is
    too large. An error that is more than twice the best one's is none of noise alone, but of a fall, and counts as
    twice. For exact values (standard error 0) this is the first of the highest.

    Attributes:
        tensors: Copies of the kept state's tensors, by name; None before there is one.
        step: The number of steps after which they were taken.
        stalled: Number of estimates since the last improvement.
    """

    tolerance = 1e-4

    def __init__(self) -> None:
        self._reference = (-math.inf, 0.0)
        self._best = (-math.inf, 0.0)
        self._count = 0
        self.tensors: Tensors | None = None
        self.step = 0
        self.stalled = 0

    def update(self, step: int, mean: float, error: float, tensors: Callable[[], Tensors]) -> None:
        """Judges the state after ``step`` steps by an estimate and its standard error.

        Args:
            step: Number of steps.
            mean: The estimate (nats).
            error: Its standard error; 0 for an exact value.
            tensors: Called for the live tensors of the state.
        """
        if not math.isfinite(mean):
            self.stalled += 1
            return
        self._count += 1
        if mean - 2 * error > self._best[0] - 2 * self._best[1]:
            self._best = (mean, error)
            self.tensors, self.step = copied(tensors()), step
        elif error > 0 and self._is_level(mean, error):
            self.tensors, self.step = copied(tensors()), step
        if mean > self._reference[0] + max(math.hypot(error, self._reference[1]), self.tolerance):
            self._reference, self.stalled = (mean, error), 0
        else:
            self.stalled += 1

    def _is_level(self, mean: float, error: float) -> bool:
        best, error_of_best = self._best
        noise = math.hypot(min(error, _ALIKE * error_of_best), error_of_best)
        return mean >= best - self._luck * noise

    @property
    def _luck(self) -> float:
        """How many standard errors the largest of so many estimates is above its mean, about; at least one."""
        return max(1.0, math.sqrt(2.0 * math.log(self._count)))

    @property
    def mean(self) -> float:
        """The best estimate; -inf before there is one."""
        return self._best[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "numbers": [*self._reference, *self._best],
            "tensors": self.tensors,
            "step": self.step,
            "stalled": self.stalled,
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        numbers = state["numbers"]
        self._reference, self._best = (numbers[0], numbers[1]), (numbers[2], numbers[3])
        self.tensors, self.step, self.stalled = state["tensors"], state["step"], state["stalled"]
        self._count = state["count"]
