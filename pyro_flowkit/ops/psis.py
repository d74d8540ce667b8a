r"""Pareto smoothed importance sampling (PSIS).

Importance weights ``w_s = p(z_s) / q(z_s)`` of a guide that is too narrow have a heavy right tail,
and a few draws then carry the whole estimate. PSIS (Vehtari, Simpson, Gelman, Yao and Gabry 2024,
JMLR 25(72), Algorithm 1) does two things about that: it fits a generalised Pareto distribution to
the exceedances of the ``M`` largest weights over the next one,

    M = floor(3 sqrt(S))  if S > 225,  else  floor(S / 5),

whose shape, the pareto k, says how heavy the tail is (all moments below order 1/k exist), and it
replaces the tail by the quantiles of the fit,

    w_(S-M+j)  <-  w_(S-M) + sigma / k ((1 - (j - 1/2) / M)^(-k) - 1),   j = 1, ..., M,

truncated at the largest raw weight.

Standard errors by the delta method take the variance of the weights to be finite and seen, which is
so below a pareto k of 0.5. Above, errors of PSIS estimates fall with the number S of draws only like
``S^(-rate / 2)`` (Vehtari, Simpson, Gelman, Yao and Gabry 2024, JMLR 25(72), appendix B),

    rate(k, S) = (2 (k - 1) S^(2k+1) + (1 - 2k) S^(2k) + S^2) / ((S - 1) (S - S^(2k))),

so that they are larger than the delta method says by ``S^((1 - rate) / 2)``: for 4,000 draws 1.02 at
k = 0.2, 1.6 at 0.5, 3.9 at 0.65.

Why another one: ArviZ 0.23 takes log weights, ArviZ 1 takes their negative (log-likelihoods), and
both return normalised weights, from which the evidence cannot be had. This one takes
``log p - log q`` as it is, works on tensors, and keeps the normalisation. ``M`` follows ArviZ 1;
ArviZ 0.23 rounds up instead of down, and the two agree where ``3 sqrt(S)`` is a whole number.
"""

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_flowkit.warning import warn

MIN_DRAWS = 25
"""The fewest draws whose tail, a fifth of them, can be fitted."""

_MIN_TAIL = 5
_HEAVIEST_K = 0.9  # of a tail that goes on


def psis(log_weights: Tensor, *, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Smooths the right tail of importance weights and measures how heavy it is.

    Cases that have no tail to fit are returned unchanged and said:

    - fewer than 25 draws: pareto k is ``inf`` (unknown, so not to be trusted), with a warning;
    - a tail whose weights are all equal up to rounding (the guide is the posterior, or the weights
      are bounded): pareto k is 0;
    - ``-inf`` (a draw outside of the target's support) is a weight of zero: it counts as a draw and
      stays ``-inf``. Where fewer than 5 draws of the tail exceed the largest weight outside of it,
      because nearly all weights are zero beside them, or where the fit fails, pareto k is ``inf``.

    Args:
        log_weights: ``log p - log q`` in nats, any floating dtype and shape, draws along ``dim``.
            Computed in float64 whatever the dtype. Gradients are not followed.
        dim: the dimension of the draws; the last one by default. All others are batch dimensions,
            each smoothed by itself.

    Returns:
        The smoothed log weights, of the shape and dtype of ``log_weights`` and **not normalised**
        (``logsumexp(out, dim) - log(S)`` is the PSIS estimate of the log evidence, in nats), and
        the pareto k, of that shape without ``dim``. Below ``min(1 - 1 / log10(S), 0.7)`` the
        estimates made from ``S`` draws can be trusted (Vehtari et al. 2024, section 3.2).

    Raises:
        ValueError: if ``log_weights`` is not floating point, has no dimension or no draw, or holds
            NaN or ``+inf``.

    Example:
        >>> import torch
        >>> from pyro_flowkit.diagnostics import psis
        >>> log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> smoothed, pareto_k = psis(log_weights)
        >>> smoothed.shape, bool(pareto_k < 0.7)
        (torch.Size([1000]), True)
    """
    if not log_weights.is_floating_point() or log_weights.dim() == 0:
        raise ValueError(
            "Expected floating point log_weights with at least one dimension, got "
            f"{log_weights.dtype} of shape {tuple(log_weights.shape)}"
        )
    dim = -1 if dim is None else dim
    rows = log_weights.detach().movedim(dim, -1)
    batch_shape, num_draws = rows.shape[:-1], rows.shape[-1]
    if num_draws == 0:
        raise ValueError(f"Expected at least 1 draw along dim {dim}, got 0")
    num_bad = int((rows.isnan() | (rows == math.inf)).sum())
    if num_bad:
        raise ValueError(
            f"Expected log_weights that are finite or -inf, got {num_bad} of {rows.numel()} "
            "that are NaN or +inf"
        )
    if num_draws < MIN_DRAWS:
        warn(
            f"Expected at least {MIN_DRAWS} draws for Pareto smoothing, got {num_draws}: "
            "the weights are left as they are and pareto k is inf"
        )
        return log_weights.detach().clone(), log_weights.new_full(batch_shape, math.inf)

    # The fit is a loop over small vectors: the CPU is the place for it.
    smoothed = rows.reshape(-1, num_draws).to("cpu", torch.float64, copy=True)
    resolution = torch.finfo(log_weights.dtype).eps
    pareto_k = torch.tensor(
        [_smooth_(row, resolution) for row in smoothed], dtype=torch.float64
    ).reshape(batch_shape)
    smoothed = smoothed.reshape(rows.shape).movedim(-1, dim)
    return smoothed.to(log_weights), pareto_k.to(log_weights)


def pareto_k_threshold(num_samples: int) -> float:
    """The pareto k up to which estimates from ``num_samples`` draws can be trusted.

    ``min(1 - 1 / log10(S), 0.7)``, Vehtari et al. 2024, section 3.2.4.

    Example:
        >>> from pyro_flowkit.diagnostics import pareto_k_threshold
        >>> round(pareto_k_threshold(1000), 3), pareto_k_threshold(10_000)
        (0.667, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def log_mean_error(log_weights: Tensor, log_mean: Tensor) -> Tensor:
    """Standard error of ``log mean w`` over the last dimension, in nats, by the delta method.

    NaN for a single draw, ``inf`` where all weights are zero.
    """
    count = log_weights.shape[-1]
    if count == 1:
        return torch.full_like(log_mean, math.nan)
    relative = (log_weights - log_mean.unsqueeze(-1)).exp()
    error = relative.var(-1).div(count).sqrt()
    return error.masked_fill(log_mean == -math.inf, math.inf)


def gap_error(log_weights: Tensor, kept: Tensor) -> Tensor:
    """Standard error of the gap between the evidence and the ELBO, from raw and smoothed log weights.

    That of ``w_s / mean(w) - log w_s``: both come from one pool, and errors of both cancel.
    """
    count = log_weights.shape[-1]
    mean = kept.logsumexp(-1, keepdim=True) - math.log(count)
    error = ((kept - mean).exp() - log_weights).std(-1) / math.sqrt(count)
    return error.nan_to_num(nan=math.inf)


def error_factor(pareto_k: Tensor, num_samples: int) -> Tensor:
    """How many times larger than by the delta method the errors of PSIS estimates are.

    Args:
        pareto_k: of the weights, any shape.
        num_samples: the number S of draws, at least 2.

    Returns:
        From 1 (k up to 0) to ``sqrt(S)`` (k from 1 on, where more draws do not help), float64, of
        the shape of ``pareto_k``.
    """
    s = float(num_samples)
    k = pareto_k.double().nan_to_num(nan=math.inf).clamp(0.0, 1.0)
    k = torch.where((k - 0.5).abs() < 1e-4, 0.5 - 1e-4, k)  # a removable singularity
    power = s ** (2 * k)
    rate = (2 * (k - 1) * s * power + (1 - 2 * k) * power + s**2) / ((s - 1) * (s - power))
    return s ** ((1 - rate.clamp(0.0, 1.0)) / 2)


def unseen_share(largest_weight: float, pareto_k: float) -> float:
    """The share of the mean of the weights that may lie beyond the draws.

    Pareto k has no scale: weights of 1 +- 0.04 may have one of 0.9, and hide nothing. With p the largest of the
    normalised weights, a tail of that k which goes on adds to their mean the share ``p / (1 - min(k, 0.9))``:
    the k of a tail that goes on for ever is below 1, as the mean is finite.

    Args:
        largest_weight: of the normalised, smoothed weights.
        pareto_k: of the weights; ``inf`` where it is unknown.
    """
    return min(largest_weight / (1.0 - min(pareto_k, _HEAVIEST_K)), 1.0)


def _smooth_(log_weights: Tensor, resolution: float) -> float:
    """Smooths one float64 row in place and returns its pareto k."""
    num_draws = len(log_weights)
    num_tail = math.floor(3 * math.sqrt(num_draws)) if num_draws > 225 else num_draws // 5
    values, order = log_weights.topk(num_tail + 1)  # descending; the last one is the cutoff
    largest = values[0].item()
    if largest == -math.inf:
        return math.inf
    if largest - values[-2].item() <= 8 * resolution * max(1.0, abs(largest)):
        return 0.0
    weights = (values - largest).exp()
    cutoff = weights[-1].item()
    exceeding = int((weights > cutoff).sum())
    if exceeding < _MIN_TAIL:
        return math.inf
    tail = weights[:exceeding].flip(0) - cutoff
    try:
        k, sigma = fit_generalized_pareto(tail)
    except ZeroDivisionError:  # weights that differ by hundreds of nats leave the fit no scale
        return math.inf
    if not math.isfinite(k) or sigma <= 0:
        return math.inf
    log_survival = -(torch.arange(0.5, exceeding, dtype=torch.float64) / exceeding).neg().log1p()
    quantiles = torch.expm1(k * log_survival) / k if abs(k) > 1e-15 else log_survival
    smooth_tail = (cutoff + sigma * quantiles).log().clamp(max=0.0) + largest
    log_weights[order[:exceeding].flip(0)] = smooth_tail
    return k
