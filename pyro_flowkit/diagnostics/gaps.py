r"""What a VAE's gap is made of: a family that is too poor, and an encoder that is not its best.

For a datum x with the encoder's posterior q and the best one q* of the same family,

    log p(x) - ELBO(q) = (log p(x) - ELBO(q*)) + (ELBO(q*) - ELBO(q))
      inference gap    =   approximation gap   +   amortisation gap

(Cremer, Li and Duvenaud 2018). q* is found by optimising the numbers that the encoder sets, for
every datum by itself, from what the encoder says. Whether it is kept is decided for every datum by
draws of their own; both ELBOs are then estimated from fresh draws with common random numbers, so
that nothing is selected by the numbers that are reported.

Reference:
    Chris Cremer, Xuechen Li, David Duvenaud. Inference Suboptimality in Variational Autoencoders.
    ICML 2018.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.bounds import as_exact
from pyro_flowkit.diagnostics.local_optimum import ROUNDS, LocalProblem, new_seed
from pyro_flowkit.diagnostics.particles import evaluation
from pyro_flowkit.diagnostics.pointwise import batches, check_data
from pyro_flowkit.diagnostics.schema import (
    DIAGNOSTIC,
    ESTIMATE,
    EXACT,
    LOWER_BOUND,
    STANDARD_ERROR,
    schema_attrs,
)
from pyro_flowkit.ops.psis import pareto_k_threshold, psis

_MIN_CHOICE = 100  # draws that choose between a posterior and the encoder's, at least
_SMALL = 0.01  # nats


def inference_gaps(
    model: Callable,
    guide: Callable,
    data: Tensor | tuple[Tensor, ...],
    *,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 1000,
    num_steps: int = 300,
    lr: float = 0.2,
    num_particles: int = 8,
    batch_size: int | None = None,
    plate: str | None = None,
    exact_log_evidence: Tensor | np.ndarray | None = None,
    vectorize: bool | None = None,
    seed: int | None = None,
) -> xr.Dataset:
    """Splits the gap of every datum into an approximation and an amortisation gap.

    The family, within which the posterior of every datum is optimised, is that of the guide's own
    sites: for a plain distribution (Normal, MultivariateNormal, Gamma, ..., also under ``to_event``
    and ``mask``) all its parameters, for every datum by itself; for a flow its context, and the
    parameters of its base where these differ by datum, while the weights of its layers stay as they
    are. Several sites must not depend on each other's draws.

    An optimised posterior that is no better, by draws of its own, is dropped for the encoder's. An
    amortisation gap below zero is noise within its standard error. Where the optimisation stopped
    short, the approximation gap is too large and the amortisation gap too small by what was
    missing; ``late_gain`` says what the last sixth of the steps still found (0 where it found
    nothing better).

    Memory: as `pointwise_bounds`, beside ``batch_size * num_particles`` rows with their gradients.
    250 binary images of 784 pixels take about a minute on one core (``python -m
    benchmarks.diagnostics``).

    Args:
        model: a Pyro model with one plate over the data, such as a VAE.
        guide: its guide, inside of the same plate.
        data: a tensor whose first dimension is the datum, or a tuple of such tensors.
        args: further positional arguments of both.
        kwargs: keyword arguments of both.
        num_samples: draws per datum for the numbers that are reported.
        num_steps: steps of Adam, in six rounds.
        lr: learning rate at the start of the first round, in standard deviations of the encoder's
            posterior. Each round anneals its own to zero, begins with 0.6 times that of the round
            before, and measures in standard deviations of the posteriors found so far.
        num_particles: draws per datum in a step.
        batch_size: data per batch, 256 by default.
        plate: the name of the plate of the data, where another has the same size.
        exact_log_evidence: exact ``log p(x_i)`` of shape ``(N,)``, where it is known.
        vectorize: as in `evidence_bounds`.
        seed: seed of all draws, without effect on the generator of the caller.

    Returns:
        A Dataset over ``obs_id`` in nats per datum: ``elbo`` and ``elbo_optimized`` (lower bounds),
        ``log_evidence`` (exact where it was given, otherwise the PSIS estimate from the optimised
        posterior, whose ``pareto_k`` says whether it can be trusted: where not, it is too small, and
        with it the inference and the approximation gap), ``inference_gap``, ``approximation_gap``,
        ``amortization_gap``, a standard error ``NAME_se`` of each, and ``late_gain``. The attribute
        ``message`` says it in a sentence.

    Raises:
        ValueError: as `pointwise_bounds`; if a site cannot be reparametrised or freed, if sites
            depend on each other, or if a log weight is NaN.
    """
    _check_settings(num_samples, num_steps, num_particles, lr)
    tensors = check_data(data)
    exact = None
    if exact_log_evidence is not None:
        exact = as_exact(exact_log_evidence, [len(tensors[0])])
    parts: list[tuple[Tensor, ...]] = []
    with evaluation(model, guide, seed=seed):
        for rows in batches(tensors, batch_size or 256):
            problem = LocalProblem.of(model, guide, rows, args, kwargs or {}, plate, vectorize)
            # Settled by the first batch: a last batch of one row would fit any plate.
            plate, vectorize = problem.plate, problem.like.stacked
            local, late_gain = problem.optimize(num_steps, lr, num_particles)
            few, seed = max(_MIN_CHOICE, num_samples // 4), new_seed()
            gain = problem.log_weights(local, few, seed) - problem.log_weights(guide, few, seed)
            seed = new_seed()
            encoder = problem.log_weights(guide, num_samples, seed)
            optimized = problem.log_weights(local, num_samples, seed)
            better = (gain.mean(-1) > 0) & ~optimized.isnan().any(-1)
            optimized = torch.where(better[:, None], optimized, encoder)
            parts.append((encoder, optimized, late_gain.where(better, 0.0)))
    encoder, optimized, late_gain = map(torch.cat, zip(*parts, strict=True))
    return _dataset(encoder, optimized, late_gain, exact)


def _dataset(
    encoder: Tensor, optimized: Tensor, late_gain: Tensor, exact: Tensor | None
) -> xr.Dataset:
    """All numbers from log weights ``(data, draws)`` that are paired by their draws."""
    num_data, num_samples = encoder.shape
    bad = int((encoder.isnan() | (encoder == math.inf)).any(-1).sum())
    if bad:
        raise ValueError(
            f"Expected log weights that are finite or -inf, got NaN or +inf in {bad} of {num_data} rows"
        )
    smoothed, pareto_k = psis(optimized)
    evidence = smoothed.logsumexp(-1) - math.log(num_samples)
    noise = (smoothed - evidence[:, None]).exp() - 1.0
    kind = ESTIMATE
    if exact is not None:
        evidence, noise, kind = exact, torch.zeros_like(noise), EXACT
    elbo, elbo_optimized = encoder.mean(-1), optimized.mean(-1)
    # Both are -inf where a datum is kept as it was and a draw is outside of the support.
    gained = torch.where(optimized == encoder, 0.0, optimized - encoder)
    # value, what each draw adds to it, kind
    rows = {
        "elbo": (elbo, encoder, LOWER_BOUND),
        "elbo_optimized": (elbo_optimized, optimized, LOWER_BOUND),
        "log_evidence": (evidence, noise, kind),
        "inference_gap": (evidence - elbo, noise - encoder, ESTIMATE),
        "approximation_gap": (evidence - elbo_optimized, noise - optimized, ESTIMATE),
        "amortization_gap": (gained.mean(-1), gained, ESTIMATE),
    }
    variables: dict[str, Any] = {}
    for name, (value, draws, kind) in rows.items():
        error = (draws.std(-1) / math.sqrt(num_samples)).nan_to_num(nan=math.inf)
        variables[name] = (value, kind)
        variables[f"{name}_se"] = (error, STANDARD_ERROR)
    variables["late_gain"] = (late_gain, DIAGNOSTIC)
    variables["pareto_k"] = (pareto_k, DIAGNOSTIC)
    gaps = xr.Dataset(
        {
            name: (
                "obs_id",
                value.numpy(),
                {"kind": kind} | ({} if name == "pareto_k" else {"units": "nats"}),
            )
            for name, (value, kind) in variables.items()
        },
        {"obs_id": np.arange(num_data)},
        schema_attrs(
            num_samples=num_samples,
            pareto_k_threshold=pareto_k_threshold(num_samples),
            **{f"kind_{name}": kind for name, (_, kind) in variables.items()},
        ),
    )
    return gaps.assign_attrs(message=_message(gaps))


def _message(gaps: xr.Dataset) -> str:
    """The means over data in a sentence, and what to do about the larger part."""

    def mean(name: str) -> str:
        error = np.sqrt(np.square(gaps[f"{name}_se"].to_numpy()).sum()) / gaps.sizes["obs_id"]
        return f"{float(gaps[name].mean()):.3f} +- {error:.3f}"

    family = float(gaps["approximation_gap"].mean())
    encoder = float(gaps["amortization_gap"].mean())
    late = float(gaps["late_gain"].mean())
    above = int((gaps["pareto_k"] > gaps.attrs["pareto_k_threshold"]).sum())
    advice = (
        "the encoder is the larger part: train it longer or make it larger"
        if encoder > family
        else "the family is the larger part: take a richer one, such as a flow"
    )
    if max(encoder, family) < _SMALL:
        advice = "both are small"
    parts = [
        f"The gap is {mean('inference_gap')} nats per datum: {mean('approximation_gap')} are the "
        f"family's (approximation) and {mean('amortization_gap')} the encoder's (amortisation); {advice}."
    ]
    if late > max(_SMALL, _SMALL * (encoder + family)):
        parts.append(
            f"The optimisation stopped short: its last sixth still gained {late:.3f} nats, which "
            "are missing from the amortisation gap. Take more num_steps."
        )
    exceeded = int((gaps["approximation_gap"] + 4 * gaps["approximation_gap_se"] < -_SMALL).sum())
    if gaps["log_evidence"].attrs["kind"] == EXACT and exceeded:
        parts.append(
            f"For {exceeded} of {gaps.sizes['obs_id']} data the ELBO is above exact_log_evidence, "
            "which no bound can be: check that it is that of this model."
        )
    if gaps["log_evidence"].attrs["kind"] != EXACT and above:
        parts.append(
            f"Pareto k is above {gaps.attrs['pareto_k_threshold']:.2f} for {above} of "
            f"{gaps.sizes['obs_id']} data, whose log evidence and approximation gap are at least "
            "what is said here."
        )
    return " ".join(parts)


def _check_settings(num_samples: int, num_steps: int, num_particles: int, lr: float) -> None:
    if num_samples < 2 or num_steps < ROUNDS or num_particles < 1 or not lr > 0:
        raise ValueError(
            f"Expected num_samples >= 2, num_steps >= {ROUNDS}, num_particles >= 1 and lr > 0, got "
            f"{num_samples}, {num_steps}, {num_particles} and {lr}"
        )
