"""Standard errors of what log weights say, beside those of the bounds themselves."""

import math

import torch
from torch import Tensor

from pyro_flowkit.ops.psis import MIN_DRAWS, psis

_NUM_SPLITS = 8


def log_ess_error(smoothed: Tensor) -> Tensor:
    """Standard error of the log of the ESS by the delta method."""
    count = smoothed.shape[-1]
    weights = (smoothed - smoothed.logsumexp(-1, keepdim=True)).exp() * count
    squares = weights.square()
    influence = squares / squares.mean(-1, keepdim=True) - 2 * weights
    return (influence.std(-1) / math.sqrt(count)).nan_to_num(nan=math.inf)


def pareto_k_spread(log_weights: Tensor) -> Tensor:
    """Standard deviation of pareto k, from 8 disjoint splits of the draws.

    The tail that is fitted grows as the root of the number of draws, and the variance falls with
    the tail: the spread over splits is divided by the fourth root of their number.
    """
    size = log_weights.shape[-1] // _NUM_SPLITS
    if size < MIN_DRAWS:
        return torch.full_like(log_weights[..., 0], math.nan)
    splits = log_weights[..., : size * _NUM_SPLITS].unflatten(-1, (_NUM_SPLITS, size))
    spread = psis(splits)[1].std(-1) / _NUM_SPLITS**0.25
    return spread.nan_to_num(nan=math.inf)
