"""Several trainings of one guide as one tree, in which each is a chain.

What ArviZ does with chains it then does with restarts: R-hat says whether they ended at the same
posterior, and pictures draw them apart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

_BY_RESTART = ("vi_diagnostics", "vi_pointwise")
_OF_ALL = ("observed_data", "constant_data")


def join_restarts(trees: Sequence[xr.DataTree]) -> xr.DataTree:
    """Joins the trees of several restarts, whose chains follow one another.

    Args:
        trees: results of ``from_svi`` for one model and its data, of equally many draws.

    Returns:
        A tree with the groups that all have: those with draws or steps are joined along ``chain``
        (a shorter training ends in NaN), ``vi_diagnostics`` and ``vi_pointwise`` get that dimension,
        the data are those of the first. ``diagnose`` judges it by its worst restart.

    Raises:
        ValueError: if there are no trees, or they differ in draws or data.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import from_svi, join_restarts
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> trees = [from_svi(model, guide, num_samples=200, seed=seed) for seed in range(2)]
        >>> join_restarts(trees)["posterior"].sizes["chain"]
        2
    """
    if not trees:
        raise ValueError("Expected at least one tree, got none")
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
    return xr.DataTree.from_dict(groups)
