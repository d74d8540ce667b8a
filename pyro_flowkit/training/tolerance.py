"""When a guide's fit stops by itself: when little is left to gain, or when a constant rate gains no more.

After every window of steps the gap between log evidence and ELBO is estimated (:mod:`pyro_flowkit.guides.room`). Once
it is below the tolerance with two standard errors, in several sets of draws, the fit ends. While the rate is constant
the gap falls to a level that the noise of the steps holds it at; from there on only a falling rate helps, so that it
begins to fall then, for the same share of the steps as planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from pyro_flowkit.guides.room import Gap, Room
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.schedule import FLAT_SHARE

TOLERANCE = 0.01
CONFIRMING_DRAWS = 8192
NUM_CONFIRMING = (
    4  # times, each of which must find the gap below: a part that is seldom seen hides from some
)
OTHER_SEEDS = 2**28  # and its multiples; of a seed PyTorch's generator takes the lower 32 bits
SPAN = 8  # judgements that are compared with as many before them
PROGRESS = 0.9  # of the gap before: what is more is none


def watch_gap(
    room: Room | None,
    ranks: Ranks,
    tolerance: float | None,
    max_steps: int | None,
    scheduler: Any,
) -> Tolerance | None:
    """What watches the gap of a guide while it trains; None where there is no way to estimate it.

    Args:
        room: Of the guide, or None.
        ranks: The processes that share the fit.
        tolerance: The caller's, in nats; None is the default where the plan is the guide's own.
        max_steps: Of the guide's own plan; None where the caller has one.
        scheduler: As for ``Schedule``.
    """
    if room is None:
        return None
    if tolerance is None and max_steps is not None:
        tolerance = TOLERANCE
    may_end_earlier = bool(tolerance) and scheduler == "flat_cosine"
    return Tolerance(room, ranks, tolerance, max_steps if may_end_earlier else None)


class Tolerance:
    """Watches the gap of a guide.

    Args:
        room: Of the guide.
        ranks: The processes that share the fit; the first decides.
        nats: The largest gap that may be left when the fit ends by itself; None never ends it.
        max_steps: Of the plan, whose rate falls from a fixed share of them on; None where it is not the guide's own.

    Attributes:
        is_met: Whether the last judgement found the gap below the tolerance.
        end: The number of steps to end at, where that is earlier than planned; else None.
    """

    def __init__(self, room: Room, ranks: Ranks, nats: float | None, max_steps: int | None) -> None:
        self._room, self._ranks, self._nats = room, ranks, nats
        self._max_steps = max_steps
        self._seen: list[float] = []
        self.is_met = False
        self.end: int | None = None

    def judge_start(self) -> float:
        """Estimates the gap before the first step (nats)."""
        return self._judged(0)

    def judge(self, step: int) -> float:
        """Estimates the gap after so many steps (nats)."""
        self._seen.append(self._judged(step))
        return self._seen[-1]

    def _judged(self, step: int) -> float:
        found = self._estimate(step)
        if self._nats is not None and found.upper <= self._nats:
            # by other draws: of many judgements some have luck
            self.is_met = all(
                self._estimate((1 + again) * OTHER_SEEDS + step, CONFIRMING_DRAWS).upper
                <= self._nats
                for again in range(NUM_CONFIRMING)
            )
        return found.nats

    def look_ahead(self, step: int) -> bool:
        """Whether the rate should begin to fall now, which moves the end."""
        if self._max_steps is None or step >= FLAT_SHARE * self._max_steps:
            return False
        before, recent = self._seen[-2 * SPAN : -SPAN], self._seen[-SPAN:]
        if len(before) < SPAN or not fmean(recent) > PROGRESS * fmean(before):
            return False
        self.end = self._max_steps = math.ceil(step / FLAT_SHARE)
        return True

    def at_the_end(self, step: int) -> float:
        """The gap of what the fit ends with (nats)."""
        return self._estimate(OTHER_SEEDS + step, CONFIRMING_DRAWS).nats

    def _estimate(self, seed: int, *num_draws: int) -> Gap:
        gap = self._room.gap(seed, *num_draws) if self._ranks.leads else None
        return self._ranks.share(gap)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self._seen), "end": self.end}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen, self.end = list(state["seen"]), state["end"]
        if self.end is not None:
            self._max_steps = self.end
