"""Several trainings of one guide: whether they end at the same place, and their draws as the chains of one tree.

What ArviZ does with chains it then does with restarts: R-hat says whether they ended at the same
posterior, and pictures draw them apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyro_flowkit.diagnostics.schema import schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict, with_verdict

Restart = xr.DataTree | xr.Dataset | float

_BY_RESTART = ("vi_diagnostics", "vi_pointwise")
_OF_ALL = ("observed_data", "constant_data")


def compare_restarts(
    restarts: Mapping[str, Restart] | Sequence[Restart],
    *,
    tolerance: float = 0.1,
    max_shift: float = 0.3,
) -> xr.DataTree:
    """Do several trainings of one model and guide end at the same place? And their trees as one, for ArviZ.

    ===================================================================  ======
    equally good ELBOs, but posteriors apart by more than ``max_shift``  bad
    some restarts behind the best by more than ``tolerance``             usable
    otherwise                                                            good
    ===================================================================  ======

    Args:
        restarts: for each restart the result of ``from_svi``, with equally many draws and the same
            data, or of ``evidence_bounds``, or its ELBO in nats; by name, or in a sequence.
        tolerance: the difference of ELBOs in nats that does not matter; what lies within two
            standard errors of zero does not, either.
        max_shift: the distance of posterior means that does not matter, in standard deviations of
            the best restart.

    Returns:
        A tree with the group ``vi_restarts``. Its variables along ``restart`` are ``elbo``,
        ``elbo_se`` (0 for a plain number), ``behind`` (nats below the best restart) and, if all are
        trees with draws, ``max_shift`` (the largest distance of the means of a latent from those of
        the best restart, in its standard deviations).

        If all are trees, it also has the groups that they all have: those with draws or steps are
        joined along ``chain`` (a shorter training ends in NaN), ``vi_diagnostics`` and
        ``vi_pointwise`` get that dimension, the data are those of the first.

        ``diagnose`` says whether they agree and judges the guide by its worst restart; the worse of
        the two counts.

    Raises:
        ValueError: for fewer than two restarts, none or no finite ELBO, or trees that differ in
            latents, number of draws or data.

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
        >>> tree = compare_restarts([from_svi(model, guide, num_samples=200, seed=seed) for seed in range(2)])
        >>> tree["posterior"].sizes["chain"], tree["vi_restarts"].sizes["restart"], bool(diagnose(tree))
        (2, 2, True)
    """
    named = dict(restarts) if isinstance(restarts, Mapping) else dict(enumerate(restarts))
    if len(named) < 2:
        raise ValueError(f"Expected at least two restarts, got {len(named)}")
    comparison = _compared(named, tolerance, max_shift)
    trees = [restart for restart in named.values() if isinstance(restart, xr.DataTree)]
    joined = _joined(trees) if len(trees) == len(named) else {}
    return xr.DataTree.from_dict({**joined, "vi_restarts": comparison})


def _compared(named: Mapping[Any, Restart], tolerance: float, max_shift: float) -> xr.Dataset:
    """ELBOs and places of the restarts, with a verdict."""
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


def _joined(trees: Sequence[xr.DataTree]) -> dict[str, xr.Dataset]:
    """The groups that all trees have, with the restarts as chains."""
    draws = [tree["posterior"].sizes["draw"] for tree in trees]
    if len(set(draws)) > 1:
        raise ValueError(f"Expected equally many draws in every tree, got {draws}")
    names = [name for name in trees[0].children if all(name in tree.children for tree in trees)]
    groups = {}
    for name in names:
        parts = [tree[name].to_dataset() for tree in trees]
        if name in _OF_ALL:
            differs = [i for i, part in enumerate(parts) if not part.equals(parts[0])]
            if differs:
                raise ValueError(f"Expected the same {name} in every tree, got others in {differs}")
            groups[name] = parts[0]
            continue
        join: Any = "exact" if name in _BY_RESTART else "outer"
        joined = xr.concat(parts, "chain", join=join, combine_attrs="override")
        groups[name] = joined.assign_coords(chain=np.arange(joined.sizes["chain"]))
    return groups


def _elbo(restart: Restart) -> tuple[float, float]:
    if isinstance(restart, xr.DataTree):
        if "vi_diagnostics" not in restart.children:
            raise ValueError(f"Expected a group vi_diagnostics, got {sorted(restart.children)}")
        restart = restart["vi_diagnostics"].to_dataset()
    if isinstance(restart, xr.Dataset):
        if "elbo" not in restart:
            raise ValueError(f"Expected restarts with an elbo, got {sorted(map(str, restart))}")
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
