"""From the variables of ``evidence_bounds`` to the numbers that a guide is judged by."""

import math
from typing import Any

import numpy as np
import xarray as xr

from pyro_flowkit.diagnostics.rule import Marginal, Numbers
from pyro_flowkit.diagnostics.tails import pareto_k_error


def numbers_of(bounds: xr.Dataset) -> Numbers:
    """The numbers of one guide.

    Args:
        bounds: the variables of ``evidence_bounds``, or of ``pointwise_bounds`` for one datum.

    Raises:
        ValueError: if the exact log evidence is not finite.
    """
    exact = "exact_log_evidence" in bounds
    evidence = float(bounds["exact_log_evidence" if exact else "log_evidence"])
    if exact and not math.isfinite(evidence):
        raise ValueError(f"Expected a finite exact_log_evidence, got {evidence}")
    elbo, num_draws = float(bounds["elbo"]), int(bounds["num_draws"])
    pareto_k = float(bounds["pareto_k"])
    return Numbers(
        num_draws=num_draws,
        elbo=elbo,
        gap=evidence - elbo,
        gap_error=float(bounds["gap_se"]),
        exact=exact,
        pareto_k=pareto_k,
        pareto_k_error=pareto_k_error(pareto_k, num_draws),
        largest_weight=float(bounds["largest_weight"]),
        ess=float(bounds["ess"]),
        spread_error=float(bounds["log_ess_se"]),
        **_marginals(bounds),
    )


def _marginals(bounds: xr.Dataset) -> dict[str, Any]:
    if "shift" not in bounds:
        return {}
    names = bounds["latent"].to_numpy()
    shift, ratio = bounds["shift"].to_numpy(), bounds["scale_ratio"].to_numpy()
    errors = bounds["shift_se"].to_numpy(), bounds["scale_ratio_se"].to_numpy()
    with np.errstate(divide="ignore"):
        sizes = np.abs(shift), np.abs(np.log(ratio))
    return {
        "shift": _largest(names, shift, sizes[0], errors[0]),
        "scale": _largest(names, ratio, sizes[1], errors[1]),
    }


def _largest(
    names: np.ndarray, values: np.ndarray, sizes: np.ndarray, errors: np.ndarray
) -> Marginal:
    """The latent that moves most beyond its noise, and two standard errors' worth for the largest of all."""
    import scipy.special

    count = scipy.special.ndtri(1 - 0.025 / len(names))
    without_noise = np.sqrt(np.maximum(sizes**2 - errors**2, 0.0))
    largest = int(np.argmax(without_noise))
    return Marginal(
        latent=str(names[largest]),
        value=float(values[largest]),
        size=float(without_noise[largest]),
        low=float(np.maximum(sizes - count * errors, 0.0).max()),
        high=float((sizes + count * errors).max()),
    )
