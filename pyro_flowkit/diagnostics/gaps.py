r"""What a VAE's gap is made of: a family that is too poor, and an encoder that is not its best.

For a datum x with the encoder's posterior q and the best one q* of the same family,

    log p(x) - ELBO(q) = (log p(x) - ELBO(q*)) + (ELBO(q*) - ELBO(q))
      inference gap    =   approximation gap   +   amortisation gap

(Cremer, Li and Duvenaud 2018). q* is found by optimising the numbers that the encoder sets, for
every datum by itself, from what the encoder says. Whether it is kept is decided for every datum by
draws of their own; both ELBOs are then estimated from fresh draws with common random numbers, so
that nothing is selected by the numbers that are reported.

An encoder that has learnt too little has the same amortisation gap on all rows; one that overfits has
a larger one on rows that it was not trained on.

References:
    Chris Cremer, Xuechen Li, David Duvenaud. Inference Suboptimality in Variational Autoencoders.
    ICML 2018.
    Mingtian Zhang, Peter Hayes, David Barber. Generalization Gap in Amortized Inference. NeurIPS 2022.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.bounds import as_exact
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.local_optimum import ROUNDS, LocalProblem, new_seed
from pyro_flowkit.diagnostics.particles import Particles
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
_CLEAR = 2.0  # standard errors


def inference_gaps(
    model: Callable,
    guide: Callable,
    data: Tensor | tuple[Tensor, ...],
    *,
    train_data: Tensor | tuple[Tensor, ...] | None = None,
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
    are. Where a site follows the draw of another one, as z1 of ``q(z2 | x) q(z1 | z2, x)``, what the
    encoder says of it given that draw is moved and widened as a whole, by numbers of the datum.

    An optimised posterior that is no better, by draws of its own, is dropped for the encoder's. An
    amortisation gap below zero is noise within its standard error. Where the optimisation stopped
    short, the approximation gap is too large and the amortisation gap too small by what was
    missing; ``late_gain`` says what the last sixth of the steps still found (0 where it found
    nothing better).

    Memory: as ``pointwise_bounds``, beside ``batch_size * num_particles`` rows with their gradients.
    250 binary images of 784 pixels take about a minute on one core (``python -m
    benchmarks.diagnostics``).

    Args:
        model: a Pyro model with one plate over the data, such as a VAE.
        guide: its guide, inside of the same plate.
        data: a tensor whose first dimension is the datum, or a tuple of such tensors; rows that the
            guide was not trained on say what the encoder is worth.
        train_data: rows that the guide was trained on, likewise. Where the amortisation gap of data
            exceeds theirs by more than two standard errors of the difference, over rows and draws,
            and by 0.01 nats, the encoder overfits. Without them nothing is said of why it is not
            its best.
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
        vectorize: as in ``evidence_bounds``.
        seed: seed of all draws, without effect on the generator of the caller.

    Returns:
        A Dataset over ``obs_id`` in nats per datum: ``elbo`` and ``elbo_optimized`` (lower bounds),
        ``log_evidence`` (exact where it was given, otherwise the PSIS estimate from the optimised
        posterior, whose ``pareto_k`` says whether it can be trusted: where not, it is too small, and
        with it the inference and the approximation gap), ``inference_gap``, ``approximation_gap``,
        ``amortization_gap``, a standard error ``NAME_se`` of each, and ``late_gain``. With train_data
        the same over ``train_id``, as ``train_elbo``, ..., and the scalars ``overfit``, the amortisation
        gap of data less that of training rows in the mean, and ``overfit_se``. The attribute
        ``message`` says it in a sentence, and what to do.

    Raises:
        ValueError: as ``pointwise_bounds``; if a site cannot be reparametrised or freed, if the
            encoder is random, or if a log weight is NaN.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import inference_gaps
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> gaps = inference_gaps(model, guide, torch.randn(4), num_samples=100, num_steps=60, seed=0)
        >>> float(gaps["amortization_gap"].mean()) > 0  # the best scale is 0.707
        True
    """
    _check_settings(num_samples, num_steps, num_particles, lr)
    tensors = check_data(data)
    train = None if train_data is None else check_data(train_data)
    exact = None
    if exact_log_evidence is not None:
        exact = as_exact(exact_log_evidence, [len(tensors[0])])

    like: Particles | None = None

    def log_weights(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal plate, like
        parts: list[tuple[Tensor, ...]] = []
        for rows in batches(tensors, batch_size or 256):
            problem = LocalProblem.of(
                model, guide, rows, args, kwargs or {}, plate, vectorize, like
            )
            # Settled by the first batch: a last batch of one row would fit any plate.
            plate, like = problem.plate, problem.like
            local, late_gain = problem.optimize(num_steps, lr, num_particles)
            few, own_seed = max(_MIN_CHOICE, num_samples // 4), new_seed()
            gain = problem.log_weights(local, few, own_seed)
            gain = gain - problem.log_weights(guide, few, own_seed)
            own_seed = new_seed()
            encoder = problem.log_weights(guide, num_samples, own_seed)
            optimized = problem.log_weights(local, num_samples, own_seed)
            better = (gain.mean(-1) > 0) & ~optimized.isnan().any(-1)
            optimized = torch.where(better[:, None], optimized, encoder)
            parts.append((encoder, optimized, late_gain.where(better, 0.0)))
        encoder, optimized, late_gain = map(torch.cat, zip(*parts, strict=True))
        return encoder, optimized, late_gain

    with evaluation(model, guide, seed=seed):
        gaps = _dataset(*log_weights(tensors), exact)
        if train is not None:
            gaps = _with_training_rows(gaps, _dataset(*log_weights(train), None))
    return gaps.assign_attrs(message=_message(gaps))


def _with_training_rows(gaps: xr.Dataset, train: xr.Dataset) -> xr.Dataset:
    """Both in one Dataset, and how much larger the amortisation gap is where nothing was learnt."""

    def mean_and_square(gap: xr.DataArray) -> tuple[float, float]:
        count = gap.size
        # the spread over rows holds the noise of their draws
        return float(gap.mean()), float(gap.var(ddof=1)) / count if count > 1 else math.inf

    new, square = mean_and_square(gaps["amortization_gap"])
    old, old_square = mean_and_square(train["amortization_gap"])
    units = {"units": "nats"}
    train = train.rename(
        {"obs_id": "train_id"} | {name: f"train_{name}" for name in train.data_vars}
    )
    return gaps.merge(train).assign(
        overfit=((), new - old, {"kind": ESTIMATE, **units}),
        overfit_se=((), math.sqrt(square + old_square), {"kind": STANDARD_ERROR, **units}),
    )


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
    return gaps


def _message(gaps: xr.Dataset) -> str:
    """The means over data in a sentence, and what to do about the larger part."""

    family = float(gaps["approximation_gap"].mean())
    encoder = float(gaps["amortization_gap"].mean())
    late = float(gaps["late_gain"].mean())
    above = int((gaps["pareto_k"] > gaps.attrs["pareto_k_threshold"]).sum())
    parts = [
        f"The gap is {_mean(gaps, 'inference_gap')} nats per datum: "
        f"{_mean(gaps, 'approximation_gap')} are the family's (approximation) and "
        f"{_mean(gaps, 'amortization_gap')} the encoder's (amortisation); {_advice(gaps, family, encoder)}."
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


def _mean(gaps: xr.Dataset, name: str) -> str:
    """A mean over data and its error by draws."""
    error = np.sqrt(np.square(gaps[f"{name}_se"].to_numpy()).sum()) / gaps[name].size
    return f"{float(gaps[name].mean()):.3f} +- {error:.3f}"


def _advice(gaps: xr.Dataset, family: float, encoder: float) -> str:
    """Which part is the larger one, whether the encoder overfits, and what to do about it."""
    richer = "the family is the larger part: take a richer one, such as a flow"
    if "overfit" not in gaps:
        if max(encoder, family) < _SMALL:
            return "both are small"
        return (
            "the encoder is the larger part: training rows, as train_data=, say whether it overfits or "
            "has learnt too little"
            if encoder > family
            else richer
        )
    more, error = float(gaps["overfit"]), float(gaps["overfit_se"])
    on_training = f"on training rows its gap is {_mean(gaps, 'train_amortization_gap')}"
    difference = f"a difference of {more:.3f} +- {error:.3f} over rows"
    if more > max(_CLEAR * error, _SMALL):
        overfits = (
            f"the encoder overfits: {on_training}, {difference}. Take dropout or fresh noise in the "
            "data, stop earlier, take more data, or refine the encoder on the model's own samples "
            "(Zhang et al. 2022)"
        )
        return overfits if encoder > family else f"{richer}; {overfits}"
    if max(encoder, family) < _SMALL:
        return "both are small"
    if not math.isfinite(more) or not math.isfinite(error):
        seen = f"{on_training}, and these rows do not say whether it overfits"
        return (
            f"the encoder is the larger part ({seen})" if encoder > family else f"{richer} ({seen})"
        )
    seen = f"{on_training}, {difference}: no sign that it overfits"
    if encoder > family:
        return f"the encoder is the larger part ({seen}): train it longer or make it larger"
    return f"{richer} (of the encoder: {seen})"


def _check_settings(num_samples: int, num_steps: int, num_particles: int, lr: float) -> None:
    if num_samples < 2 or num_steps < ROUNDS or num_particles < 1 or not lr > 0:
        raise ValueError(
            f"Expected num_samples >= 2, num_steps >= {ROUNDS}, num_particles >= 1 and lr > 0, got "
            f"{num_samples}, {num_steps}, {num_particles} and {lr}"
        )
