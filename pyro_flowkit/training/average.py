r"""Averages of the parameters over the steps, which are less noisy than the last of them.

a number d in (0, 1)    a_t = d_t a_{t-1} + (1 - d_t) p_t,  d_t = min(d, t / (t + 9)):  exponential moving average
"tail"                  the mean of p_t over the second half of the steps (Polyak and Juditsky 1992)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_flowkit.programs.modules import copied

TAIL = 0.5


class Average:
    """A running average of parameters.

    Args:
        kind: The decay of an exponential moving average, in (0, 1), or "tail".

    Raises:
        ValueError: If it is anything else.
    """

    def __init__(self, kind: float | Literal["tail"]) -> None:
        is_decay = isinstance(kind, float) and 0 < kind < 1
        if kind != "tail" and not is_decay:
            raise ValueError(f"Expected average to be a number in (0, 1) or 'tail', got {kind!r}")
        self._kind = kind
        self.count = 0
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, learned: Mapping[str, Tensor], used: float) -> None:
        """Takes in the parameters after a step, by name; ``used`` is the share of the budget that is gone."""
        if isinstance(self._kind, str):
            if used < TAIL:
                return
            weight = 1.0 / (self.count + 1)
        else:
            weight = max(1.0 - self._kind, 9.0 / (self.count + 9.0))
        for name, parameter in learned.items():
            if name in self._means:
                self._means[name].lerp_(parameter.detach(), weight)
            else:
                self._means[name] = parameter.detach().clone()
        self.count += 1

    @contextmanager
    def in_place(self, learned: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the parameters hold their averages for a while."""
        kept = copied(learned)
        self.put(learned)
        try:
            yield
        finally:
            _write(learned, kept)

    def put(self, learned: Mapping[str, Tensor]) -> None:
        """Writes the averages into the parameters; nothing happens before the first step."""
        _write(learned, self._means)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "means": copied(self._means)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.count = state["count"]
        self._means = {name: mean.to(device) for name, mean in state["means"].items()}


@torch.no_grad()
def _write(learned: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        learned[name].copy_(value)
