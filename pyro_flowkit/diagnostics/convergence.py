r"""Has the training settled, and do several trainings agree?

Under a constant learning rate the iterates of stochastic optimisation end in a stationary process
around the optimum. Dhaka et al. (2020) treat them as the draws of Markov chains: split R-hat of
their last part says whether they have settled, and the Monte Carlo standard error says how well
their mean, the averaged iterate, is known,

    R-hat = sqrt(((n - 1) / n W + B) / W),   MCSE = sd / sqrt(ESS),

with W the variance within and B that of the means between the halves of the chains, of n iterates.
These are numbers on the optimisation. Whether the optimum is any good, they do not say: that is the
business of pareto k and the gap.

References:
    Akash Kumar Dhaka, Alejandro Catalina, Michael Riis Andersen, Mans Magnusson, Jonathan Huggins,
    Aki Vehtari. Robust, Accurate Stochastic Optimization for Variational Inference. NeurIPS 2020.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_flowkit.diagnostics.schema import schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict, with_verdict

Restart = xr.DataTree | xr.Dataset | float


def iterate_convergence(
    iterates: np.ndarray | Tensor,
    *,
    names: Sequence[str] | None = None,
    last: float = 0.5,
    scale: np.ndarray | Tensor | Sequence[float] | None = None,
    max_rhat: float = 1.1,
    max_mcse: float = 0.1,
) -> xr.Dataset:
    """Split R-hat and Monte Carlo standard error of the iterates of a fit.

    ===================================================================  ======
    R-hat above ``max_rhat`` for some parameter                          bad
    MCSE above ``max_mcse`` times ``scale``, where that is given         usable
    otherwise                                                            good
    ===================================================================  ======

    Args:
        iterates: parameters after every step, or every few, at one learning rate: shape
            ``(iterate, parameter)``, or ``(chain, iterate, parameter)`` for several trainings whose
            parameters have the same meaning.
        names: names of the parameters; "0", "1", ... by default.
        last: the part of the iterates that counts, in (0, 1]: the first ones are the way there.
        scale: what an error of each parameter is compared with, such as the guide's standard
            deviation for its location; shape ``(parameter,)`` or a number.
        max_rhat: the largest R-hat of a settled parameter.
        max_mcse: the largest standard error of the mean of the iterates, in units of ``scale``.

    Returns:
        Variables along ``parameter``: ``mean`` (the averaged iterate), ``rhat``, ``ess``, ``mcse``
        (in the units of the parameter). A parameter that does not move has R-hat 1, MCSE 0 and an
        ESS that is NaN.
        ``diagnose`` reads the verdict from the attributes.

    Raises:
        ValueError: if the shapes or settings do not fit, fewer than 8 iterates are left, or they are
            not finite.

    Example:
        >>> import torch
        >>> from pyro_flowkit.diagnostics import iterate_convergence, verdict_of
        >>> drifting = torch.linspace(0.0, 1.0, 400)[:, None] + 0.01 * torch.randn(400, 1)
        >>> bool(verdict_of(iterate_convergence(drifting)))
        False
    """
    kept = _kept(iterates, last)
    chains, n, count = kept.shape
    names = [str(i) for i in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"Expected {count} names, got {len(names)}")
    halves = torch.cat([kept[:, : n // 2], kept[:, -(n // 2) :]])
    within = halves.var(1).mean(0)
    spread = halves.reshape(-1, count).std(0)
    moves = (within > 0).numpy()
    stuck = np.where(spread.numpy() > 0, np.inf, 1.0)  # chains at rest, apart or together
    rhat = np.where(moves, split_gelman_rubin(kept).reshape(-1).numpy(), stuck)
    ess = effective_sample_size(halves).reshape(-1).clamp(1.0, float(chains * n)).numpy()
    ess = np.where(moves, ess, np.nan)
    mcse = np.where(moves, spread.numpy() / np.sqrt(ess), 0.0)
    dataset = xr.Dataset(
        {
            "mean": ("parameter", kept.mean((0, 1)).numpy()),
            "rhat": ("parameter", rhat),
            "ess": ("parameter", ess),
            "mcse": ("parameter", mcse),
        },
        {"parameter": names},
        schema_attrs(num_chains=chains, num_iterates=n, max_rhat=max_rhat),
    )
    error = None
    if scale is not None:
        unit = np.broadcast_to(np.asarray(scale, dtype=np.float64), (count,))
        if not (unit > 0).all():
            raise ValueError(f"Expected a scale > 0, got {unit.min()}")
        error = mcse / unit
    verdict = _iterate_verdict(names, rhat, error, max_rhat, max_mcse, n)
    return with_verdict(dataset, verdict)


def compare_restarts(
    restarts: Mapping[str, Restart] | Sequence[Restart],
    *,
    tolerance: float = 0.1,
    max_shift: float = 0.3,
) -> xr.Dataset:
    """Do several trainings of one model and guide end at the same place?

    ===================================================================  ======
    equally good ELBOs, but posteriors apart by more than ``max_shift``  bad
    some restarts behind the best by more than ``tolerance``             usable
    otherwise                                                            good
    ===================================================================  ======

    Args:
        restarts: for each restart the result of ``from_svi`` or ``evidence_bounds``, or its ELBO in
            nats; by name, or in a sequence.
        tolerance: the difference of ELBOs in nats that does not matter; what lies within two
            standard errors of zero does not, either.
        max_shift: the distance of posterior means that does not matter, in standard deviations of
            the best restart.

    Returns:
        Variables along ``restart``: ``elbo``, ``elbo_se`` (0 for a plain number), ``behind`` (nats
        below the best restart) and, if all are trees with draws, ``max_shift`` (the largest
        distance of the means of a latent from those of the best restart, in its standard
        deviations).
        ``diagnose`` reads the verdict from the attributes.

    Raises:
        ValueError: for fewer than two restarts, no finite ELBO, or trees of different latents.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import compare_restarts, diagnose, from_svi
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> trees = [from_svi(model, guide, num_samples=200, seed=seed) for seed in range(2)]
        >>> bool(diagnose(compare_restarts(trees)))
        True
    """
    named = dict(restarts) if isinstance(restarts, Mapping) else dict(enumerate(restarts))
    if len(named) < 2:
        raise ValueError(f"Expected at least two restarts, got {len(named)}")
    labels = [str(name) for name in named]
    elbo, error = np.array([_elbo(restart) for restart in named.values()]).T
    if not np.isfinite(elbo).any():
        raise ValueError(f"Expected a finite ELBO, got {elbo.tolist()}")
    elbo = np.where(np.isnan(elbo), -np.inf, elbo)
    best = int(np.argmax(elbo))
    behind = elbo[best] - elbo
    variables: dict[str, Any] = {"elbo": elbo, "elbo_se": error, "behind": behind}
    level_with_best = behind <= np.maximum(tolerance, 2 * np.hypot(error, error[best]))
    posteriors = [
        restart["posterior"].to_dataset()
        for restart in named.values()
        if isinstance(restart, xr.DataTree) and "posterior" in restart.children
    ]
    apart = np.zeros(len(named))
    if len(posteriors) == len(named):
        apart = np.array([_shift(posterior, posteriors[best]) for posterior in posteriors])
        variables["max_shift"] = apart
    dataset = xr.Dataset(
        {name: ("restart", value) for name, value in variables.items()},
        {"restart": labels},
        schema_attrs(best=labels[best], tolerance=tolerance),
    )
    worst = int(np.argmax(behind))
    others = np.flatnonzero(level_with_best & (apart > max_shift))
    if len(others):
        far = others[np.argmax(apart[others])]
        verdict = Verdict(
            "bad",
            f"restart {labels[far]} is as good as {labels[best]} (ELBO {elbo[far]:.2f} and "
            f"{elbo[best]:.2f}) with means up to {apart[far]:.2f} standard deviations apart",
            "The posterior has several modes, or labels that can be exchanged: order the labels, or "
            "use a guide with a component for each mode (AutoSplineFlow(model, num_components=2)).",
        )
    elif not level_with_best.all():
        verdict = Verdict(
            "usable",
            f"{int((~level_with_best).sum())} of {len(named)} restarts end below the best, "
            f"{labels[best]}; {labels[worst]} by {behind[worst]:.2f} nats",
            f"Use restart {labels[best]}, and train longer or restart more often to see whether "
            "there is a better one.",
        )
    else:
        verdict = Verdict(
            "good",
            f"all {len(named)} restarts agree: ELBOs within {behind[worst]:.2f} nats"
            + (f", means within {apart.max():.2f} sd" if "max_shift" in variables else ""),
            f"Use restart {labels[best]}.",
            "Agreement says that the training is reliable, not that the guide is good, and starts "
            "that are alike end in one mode: see diagnose and probe_modes.",
        )
    return with_verdict(dataset, verdict)


def _kept(iterates: np.ndarray | Tensor, last: float) -> Tensor:
    """The last part of the iterates in double precision, as (chain, iterate, parameter)."""
    values = torch.as_tensor(iterates).detach().double().cpu()
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or not values.numel():
        raise ValueError(
            "Expected iterates of shape (iterate, parameter) or (chain, iterate, parameter), got "
            f"{tuple(torch.as_tensor(iterates).shape)}"
        )
    if not 0 < last <= 1:
        raise ValueError(f"Expected 0 < last <= 1, got {last}")
    values = values[:, -max(1, round(last * values.shape[1])) :]
    if values.shape[1] < 8:
        raise ValueError(f"Expected at least 8 iterates in the last part, got {values.shape[1]}")
    if not torch.isfinite(values).all():
        raise ValueError(
            f"Expected finite iterates, got {int((~torch.isfinite(values)).sum())} others"
        )
    return values


def _iterate_verdict(
    names: Sequence[str],
    rhat: np.ndarray,
    error: np.ndarray | None,
    max_rhat: float,
    max_mcse: float,
    n: int,
) -> Verdict:
    worst, wrong = int(np.argmax(rhat)), int((rhat > max_rhat).sum())
    reason = f"R-hat of the last {n} iterates is at most {rhat[worst]:.3f} ({names[worst]})"
    if wrong:
        return Verdict(
            "bad",
            f"{wrong} of {len(names)} parameters have not settled: {reason}, above {max_rhat:g}",
            "Train longer, or at a smaller learning rate; if several chains disagree, compare "
            "them by compare_restarts.",
        )
    if error is not None and error.max() > max_mcse:
        loose = int(np.argmax(error))
        return Verdict(
            "usable",
            f"{reason}, but the mean of {names[loose]} is known to {error[loose]:.2g} of its scale "
            f"only, against {max_mcse:g}",
            "Average more iterates, or lower the learning rate.",
        )
    return Verdict(
        "good",
        reason,
        "The iterates have settled; use their mean.",
        "That does not say that the guide is good: see diagnose.",
    )


def _elbo(restart: Restart) -> tuple[float, float]:
    if isinstance(restart, xr.DataTree):
        if "vi_diagnostics" not in restart.children:
            raise ValueError(f"Expected a group vi_diagnostics, got {sorted(restart.children)}")
        restart = restart["vi_diagnostics"].to_dataset()
    if isinstance(restart, xr.Dataset):
        return float(restart["elbo"]), float(restart["elbo_se"])
    return float(restart), 0.0


def _shift(posterior: xr.Dataset, best: xr.Dataset) -> float:
    """The largest distance of the means of any latent, in standard deviations of the best."""
    if set(posterior.data_vars) != set(best.data_vars):
        raise ValueError(
            f"Expected restarts with the latents {sorted(map(str, best.data_vars))}, got "
            f"{sorted(map(str, posterior.data_vars))}"
        )
    dims = ("chain", "draw")
    distances = []
    for name, draws in best.data_vars.items():
        distance = np.abs((posterior[name].mean(dims) - draws.mean(dims)).to_numpy())
        spread = draws.std(dims).to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            distances.append(np.where(distance > 0, distance / spread, 0.0).max())
    return float(max(distances))
