"""Whether an objective has fallen far below its best: what training that diverges, or overfits, looks like.

A judgement y is far below the best one b of the earlier ones if

    b - y > max(1 nat, 3 (b - m), 5 d, 3 s)

with the median m of the earlier judgements (half of them were not as far from the best as a third of this fall), the
median d of how far each of them was below the best before it (the noise of judgements), and the typical spread s of the
steps in a window (interquartile range / 1.35; 0 for validations, whose noise is fixed). Windows are judged by their
medians, so that single outliers are none of it. What is far below does not join the earlier judgements of the next. One
alone may be a spike: two in a row are said, and the last one of a fit.

A fit that falls at once has no such best. It is below where it began if no step after the first window, of five at
least, came within max(1 nat, 3 s) of the first step, or of the median of the first five, with the least spread s of ten
steps or more: the first step of an objective that stays where it is may be the luckiest one. A spread larger than the
first step is itself is none of such an objective, and counts as large as that. A fit that began with another weight of
the KL, so that its first steps do not count, has no such beginning.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

LIMIT = 5  # judgements in a row, after which it will not come back
_LEAST = 1.0  # nats
_EARLIER = 3  # judgements, at least
_OF_MEDIAN, _OF_NOISE, _OF_SPREAD = 3.0, 5.0, 3.0
_SAID = 2  # in a row
_FIRST, _CHUNK = 5, 10  # steps
_NORMAL_IQR = 1.349


def level_and_spread(values: list[float]) -> tuple[float, float]:
    """Median of steps, and the standard deviation of normal ones with their interquartile range."""
    if len(values) < 2:
        return values[0], 0.0
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, (upper - lower) / _NORMAL_IQR


class Series:
    """The judgements of one objective.

    Attributes:
        best: The step and the value of the best one.
        last: The step and the value of the last one.
        in_a_row: How many of the last were far below the best.
        deepest: The step of the lowest of those that ever were, its value and the best before it; or None.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []
        self._falls: list[float] = []
        self._spreads: list[float] = []
        self._start = -math.inf
        self._highest = -math.inf  # step after the first window
        self._later = 0  # steps after the first window
        self._chunk: list[float] = []  # steps in a row whose spread is not known yet
        self._noise = math.inf  # the least spread of steps in a row
        self.best = (0, -math.inf)
        self.last = (0, -math.inf)
        self.in_a_row = 0
        self.deepest: tuple[int, float, float] | None = None

    def see(self, steps: list[float], *, began: bool) -> None:
        """Takes in the steps of a window, before it is judged; whether the fit began with those of the first one."""
        self._chunk += steps
        if len(self._chunk) >= _CHUNK:
            self._noise = min(self._noise, level_and_spread(self._chunk)[1])
            self._chunk = []
        if self.last[0] == 0:
            self._start = max(steps[0], statistics.median(steps[:_FIRST])) if began else -math.inf
        else:
            self._highest = max([self._highest, *steps])
            self._later += len(steps)

    def add(self, step: int, level: float, spread: float = 0.0) -> None:
        """Takes in a judgement after so many steps."""
        self.last = (step, level)
        if len(self._levels) >= _EARLIER and not self.best[1] - level <= self._far():
            self.in_a_row += 1
            if self.deepest is None or level < self.deepest[1]:
                self.deepest = (step, level, self.best[1])
            return
        self.in_a_row = 0
        self.best = max(self.best, (step, level), key=lambda judged: judged[1])
        self._levels.append(level)
        self._falls.append(self.best[1] - level)
        self._spreads.append(spread)

    def _far(self) -> float:
        median = statistics.median
        return max(
            _LEAST,
            _OF_MEDIAN * (self.best[1] - median(self._levels)),
            _OF_NOISE * median(self._falls),
            _OF_SPREAD * median(self._spreads),
        )

    @property
    def below_start(self) -> float:
        """By how much the last judgement is below where the fit began, if all that followed was; else 0."""
        noise = _OF_SPREAD * min(self._noise, abs(self._start))
        near = not self._start - self._highest > max(_LEAST, noise) or self._later < _FIRST
        return 0.0 if near else self._start - self.last[1]

    def state_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            is_list = name in ("_levels", "_falls", "_spreads", "_chunk")
            copy = list(value) if is_list else tuple(value) if isinstance(value, list) else value
            setattr(self, name, copy)


class Divergence:
    """Watches the objective of training, and that of validation where there is one.

    Args:
        validated: Whether there is one.
    """

    def __init__(self, validated: bool) -> None:
        self.training, self._validation = Series(), Series() if validated else None
        self._said = False

    @property
    def _judged(self) -> Series:
        return self.training if self._validation is None else self._validation

    def add(
        self, step: int, steps: list[float], validation: float | None, *, began: bool = True
    ) -> None:
        """Takes in the objective of the steps of a window, and the validation after it.

        NaN says nothing, and a density of 0 nothing of a fall where there was never another.

        Args:
            step: After which it is.
            steps: The objectives of the window's steps.
            validation: The objective on held-out rows, or None.
            began: Whether the fit began with this objective.
        """
        self.training.see(steps, began=began)
        self.training.add(step, *level_and_spread(steps))
        if self._validation is None or validation is None or math.isnan(validation):
            return
        if math.isfinite(validation) or math.isfinite(self._validation.best[1]):
            self._validation.add(step, validation)

    @property
    def is_lost(self) -> bool:
        """Whether so many judgements in a row were far below the best that it will not come back."""
        return self._judged.in_a_row >= LIMIT

    @property
    def is_far(self) -> bool:
        """Whether the last judgement is far below the best, or below where the fit began."""
        return self._judged.in_a_row > 0 or self.training.below_start > 0

    def news(self) -> str:
        """What is to be said in the course of the fit, once; else empty."""
        if self._said or self._judged.in_a_row < _SAID:
            return ""
        self._said = True
        return f"{self._fall()}. {self._advice()}"

    def conclusion(self, kept: int) -> tuple[str, bool]:
        """What is to be said at the end, empty if nothing; and whether it has not been said before.

        Args:
            kept: The step whose parameters are kept.
        """
        deepest, said = self._judged.deepest, self._said
        if self.is_far:
            self._said = True
            text = f"{self._fall()}; the parameters are those of step {kept}. {self._advice()}"
            return text, not said
        if deepest is None or not said:
            return "", False
        step, level, best = deepest
        return (
            f"the {self._name()} was {best - level:.4g} nats below its best, {best:.6g}, at step {step}, and has come "
            f"back to {self._judged.last[1]:.6g}"
        ), False

    def _name(self) -> str:
        return (
            "training objective" if self._validation is None else "validation objective per datum"
        )

    def _fall(self) -> str:
        judged = self._judged
        if not judged.in_a_row:
            step, level = self.training.last
            return (
                f"the training objective ended at {level:.6g} at step {step}, {self.training.below_start:.4g} nats "
                "below where it began"
            )
        (step, level), (best_step, best) = judged.last, judged.best
        return (
            f"the {self._name()} has fallen to {level:.6g} at step {step}, {best - level:.4g} nats below its best, "
            f"{best:.6g} at step {best_step}"
        )

    def _advice(self) -> str:
        judged = self._judged
        fall = judged.best[1] - judged.last[1]
        trained = self.training.best[1] - self.training.last[1]
        if judged.in_a_row and self._validation is not None and not trained > 0.5 * fall:
            return (
                "Training itself has not fallen: the model overfits. Stop earlier (patience=), or take more data, "
                "dropout or a smaller model"
            )
        return "Training diverges: lower lr, set clip_norm, or build flows with path_gradient=False"

    def state_dict(self) -> dict[str, Any]:
        validation = None if self._validation is None else self._validation.state_dict()
        return {
            "training": self.training.state_dict(),
            "validation": validation,
            "said": self._said,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.training.load_state_dict(state["training"])
        if self._validation is not None and state["validation"] is not None:
            self._validation.load_state_dict(state["validation"])
        self._said = state["said"]
