r"""Posterior draws out of guide draws: importance resampling with Pareto-smoothed weights.

A draw of the guide has the weight ``w = p(x, z) / q(z)``. Drawing from the draws with probabilities
proportional to the smoothed weights gives draws of the posterior, as far as the guide reaches
(sampling importance resampling; Rubin 1988). Stratified resampling does so with the least noise: of
``n`` draws the one with the weight ``p_s`` (normalised) becomes ``floor`` or ``ceil`` of about
``n p_s`` copies,

    z_j = the draw s at which the sum of the p up to s first reaches (j + u_j) / n,   u_j ~ U(0, 1).

The copies of a draw stay next to each other. That is on purpose: to ESS and MCSE, which measure how
alike neighbours are, a draw with many copies then looks like the one draw that it is.
"""

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.schema import DRAWS, as_result
from pyro_flowkit.diagnostics.tails import Tail
from pyro_flowkit.ops.psis import error_factor
from pyro_flowkit.warning import warn

_RESAMPLED = (
    *("posterior", "sample_stats", "log_likelihood", "log_prior"),
    *("posterior_predictive", "predictions"),
)
_WEIGHTS = ("log_weight", "log_weight_psis")


def reweight(
    tree: xr.DataTree, *, num_samples: int | None = None, seed: int | None = None
) -> xr.DataTree:
    """The posterior that the weights make of a guide's draws, as a tree of its own.

    What ArviZ says of the result (``az.summary``, ``az.plot_posterior``, ``az.loo``) holds for the
    posterior, not for the guide. ESS and MCSE of its draws see that a draw is there many times.

    Args:
        tree: the result of ``from_svi``. The draws of all of its chains are one pool.
        num_samples: draws of the result; as many as in ``tree`` by default.
        seed: seed of the resampling, without effect on the generator of the caller.

    Returns:
        A tree with one chain. ``posterior``, ``log_likelihood``, ``log_prior``,
        ``posterior_predictive`` and ``predictions`` are resampled, with ``sample_stats``, in which
        ``guide_chain`` and ``guide_draw`` take the place of the weights: where in ``tree`` the draw
        comes from. The attributes of these groups say what was done: ``resampling``,
        ``num_guide_draws``, ``pareto_k`` of the weights, its ``pareto_k_threshold``, ``ess`` of the
        weights in draws, and ``mcse_factor``, by which MCSE of these draws must be multiplied
        (1 for weights without a heavy tail). The other groups are those of ``tree``, but for
        ``vi_diagnostics``: it judges the guide, whose draws these are no longer.

    Warns:
        UserWarning: if pareto k is not surely below the threshold (``tails.Tail.is_light``). The
            result may then be the posterior only as far as the guide reaches.

    Raises:
        ValueError: if ``tree`` has no posterior or no weights (it was reweighted before), if these
            groups differ in their draws, if ``num_samples`` is less than 1, or if pareto k is above
            1 or unknown: a few draws would be the posterior.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import from_svi, reweight
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.5, 1.0))
        >>> tree = from_svi(model, guide, num_samples=4000, seed=0)
        >>> means = [float(t["posterior"]["mu"].mean()) for t in (tree, reweight(tree, seed=0))]
        >>> [round(mean, 1) for mean in means]  # exact: 0.8
        [0.5, 0.8]
    """
    tree = as_result(tree)
    log_weight = guide_weights(tree)
    if "posterior" not in tree.children:
        raise ValueError(f"Expected a group posterior, got {sorted(tree.children)}")
    total = log_weight.numel()
    count = total if num_samples is None else num_samples
    if count < 1:
        raise ValueError(f"Expected num_samples >= 1, got {count}")
    smoothed, tail = Tail.of(log_weight.flatten())
    if tail.is_hopeless:
        raise ValueError(
            f"Expected weights with a pareto k of at most {tail.threshold:.2f} (at {total} draws), "
            f"got {tail.pareto_k:.2f}: no weights can make posterior draws of this guide's; use a "
            "more flexible guide, train longer, reparametrise the model, or run NUTS"
        )
    if not tail.is_light:
        warn(
            f"Pareto k of the weights is {tail.pareto_k:.2f} +- {tail.error:.2f}, not surely below "
            f"the {tail.threshold:.2f} that can be trusted at {total} draws: the guide may miss a "
            "part of the posterior, and then the resampled draws do, too, and their means are off "
            "by more than their standard errors. Take more draws, a more flexible guide, or NUTS"
        )
    probabilities = (smoothed - smoothed.logsumexp(-1)).exp()
    with evaluation(seed=seed):
        uniform = torch.rand(count, dtype=torch.float64)
    heights = (torch.arange(count, dtype=torch.float64) + uniform) / count
    cumulative = probabilities.cumsum(-1)
    index = torch.searchsorted(cumulative / cumulative[-1], heights).clamp(max=total - 1).numpy()
    attrs = {
        "resampling": "stratified, by Pareto-smoothed importance weights",
        "num_guide_draws": total,
        "pareto_k": tail.pareto_k,
        "pareto_k_threshold": tail.threshold,
        "ess": float(1.0 / probabilities.square().sum()),
        "mcse_factor": float(error_factor(torch.tensor(tail.pareto_k), total)),
    }
    groups = {}
    for name, node in tree.children.items():
        if name == "vi_diagnostics":
            continue
        dataset = node.to_dataset()
        if name in _RESAMPLED:
            shape = tuple(dataset.sizes.get(dim, 0) for dim in DRAWS)
            if shape != tuple(log_weight.shape):
                raise ValueError(
                    f"Expected (chain, draw) of {tuple(log_weight.shape)} in the group {name}, as "
                    f"in sample_stats, got {shape}"
                )
            if name == "sample_stats":
                dataset = _with_origin(dataset)
            dataset = _take(dataset, index).assign_attrs(attrs)
        groups[name] = dataset
    return xr.DataTree.from_dict(groups)


def guide_weights(tree: xr.DataTree) -> Tensor:
    """The log weights of the draws of a tree of ``from_svi``, (chain, draw), float64, in nats."""
    stats = tree["sample_stats"].to_dataset() if "sample_stats" in tree.children else xr.Dataset()
    if "log_weight" not in stats:
        hint = ""
        if "resampling" in stats.attrs:
            hint = ": these draws were reweighted before and have equal weights"
        elif "lp" in stats:
            hint = ": a point estimate (Delta) of all latents has no weights"
        raise ValueError(
            "Expected log_weight in the group sample_stats, as from_svi leaves it, got "
            f"{sorted(map(str, stats.data_vars)) or sorted(tree.children)}{hint}"
        )
    values = stats["log_weight"].transpose(*DRAWS).to_numpy()
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def _with_origin(stats: xr.Dataset) -> xr.Dataset:
    shape = tuple(stats.sizes[dim] for dim in DRAWS)
    chain, draw = (np.broadcast_to(index, shape) for index in np.indices(shape, sparse=True))
    stats = stats.drop_vars([name for name in _WEIGHTS if name in stats])
    return stats.assign(guide_chain=(DRAWS, chain), guide_draw=(DRAWS, draw))


def _take(dataset: xr.Dataset, index: np.ndarray) -> xr.Dataset:
    """The draws at ``index`` into the pool of all chains, as one chain."""
    chain, draw = np.unravel_index(index, tuple(dataset.sizes[dim] for dim in DRAWS))
    taken = dataset.isel(
        chain=xr.DataArray(chain, dims="new_draw"), draw=xr.DataArray(draw, dims="new_draw")
    )
    taken = taken.drop_vars(DRAWS, errors="ignore").rename(new_draw="draw")
    taken = taken.expand_dims(chain=[0]).assign_coords(draw=np.arange(len(index)))
    return taken.transpose(*DRAWS, ...)
