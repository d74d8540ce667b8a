"""The settings of a spline: bins, bound, tails and the smallest sizes, checked once where they are made."""

import math
from dataclasses import dataclass, field
from typing import Literal

Tails = Literal["linear", "circular"] | None

MIN_BIN_WIDTH = 1e-3
MIN_BIN_HEIGHT = 1e-3
MIN_SLOPE = 1e-3

# in the order in which the kernel counts them
TAILS: tuple[Tails, ...] = ("linear", "circular", None)


def num_spline_params(count_bins: int, tails: Tails = "linear") -> int:
    """Length of the raw parameter vector of one scalar spline.

    Linear tails fix the slope 1 at both bounds (``3 K - 1``); circular tails share one slope between the two bounds
    (``3 K``); without tails both are free (``3 K + 1``).

    Example:
        >>> from pyro_flowkit.ops import num_spline_params
        >>> num_spline_params(8), num_spline_params(8, "circular"), num_spline_params(8, None)
        (23, 24, 25)
    """
    free_slopes = {"linear": count_bins - 1, "circular": count_bins, None: count_bins + 1}
    return 2 * count_bins + free_slopes[tails]


@dataclass(frozen=True)
class SplineSettings:
    """What all splines of one transform have in common.

    Args:
        count_bins: number of bins, at least 1.
        bound: half the side of the box, positive and finite.
        tails: "linear", "circular" or None; see :func:`~pyro_flowkit.ops.rational_quadratic_forward`.
        min_bin_width, min_bin_height: smallest share of the box's side that a bin may shrink to; ``count_bins`` times
            it must stay below 1.
        min_slope: smallest slope at a knot, in (0, 1), so that slope 1 can be reached.

    Raises:
        ValueError: naming the setting, what was expected and what came.

    Example:
        >>> from pyro_flowkit.ops import SplineSettings
        >>> SplineSettings(count_bins=8, bound=3.0).num_params
        23
    """

    count_bins: int
    bound: float
    tails: Tails = "linear"
    min_bin_width: float = MIN_BIN_WIDTH
    min_bin_height: float = MIN_BIN_HEIGHT
    min_slope: float = MIN_SLOPE
    num_params: int = field(init=False, repr=False, compare=False)
    """Length of the raw parameter vector of one scalar spline."""
    packed: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """As the kernel reads them."""

    def __post_init__(self) -> None:
        count_bins = self.count_bins
        if isinstance(count_bins, bool) or not isinstance(count_bins, int) or count_bins < 1:
            raise ValueError(f"Expected count_bins to be an integer >= 1, got {count_bins!r}.")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"Expected bound to be positive and finite, got {self.bound!r}.")
        if self.tails not in TAILS:
            raise ValueError(
                f'Expected tails to be "linear", "circular" or None, got {self.tails!r}.'
            )
        for name in ("min_bin_width", "min_bin_height"):
            minimum = getattr(self, name)
            if not (minimum > 0 and count_bins * minimum < 1):
                raise ValueError(
                    f"Expected count_bins * {name} < 1 and {name} > 0, got {count_bins} * {minimum} = "
                    f"{count_bins * minimum:g}: use fewer bins or a smaller {name}."
                )
        if not 0 < self.min_slope < 1:
            raise ValueError(f"Expected min_slope in (0, 1), got {self.min_slope!r}.")

        object.__setattr__(self, "num_params", num_spline_params(count_bins, self.tails))
        numbers = (self.bound, self.min_bin_width, self.min_bin_height, self.min_slope)
        sizes = (count_bins, self.num_params, TAILS.index(self.tails))
        object.__setattr__(self, "packed", sizes + numbers)
