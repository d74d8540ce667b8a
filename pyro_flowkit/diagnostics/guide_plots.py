"""Several guides over one reference: where do they differ from the posterior, and from each other?

A lower triangle of panels: marginal densities on the diagonal, below it the regions that hold 50 %
and 90 % of the draws of every pair of latents. The reference (draws of NUTS, of the exact posterior,
or of ``reweight``) is a grey area, every guide a line of its own colour, style and marker, so that the
picture can be read in grey and by colour-blind readers.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from pyro_flowkit.diagnostics.schema import as_tree
from pyro_flowkit.pictures import MOST_VARIABLES, draw_panels, first_variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draws = xr.DataTree | xr.Dataset | Mapping[str, Any]

_SAMPLE_DIMS = ("chain", "draw", "sample")


def plot_guides(
    guides: Mapping[str, Draws],
    reference: Draws | None = None,
    *,
    var_names: str | Sequence[str] | None = None,
    axes: "Axes | np.ndarray | None" = None,
    reference_label: str = "reference",
) -> "np.ndarray":
    """Marginals and pairs of the draws of several guides, over those of a reference.

    Args:
        guides: draws by the name of the guide: a tree with a ``posterior`` (the result of
            ``from_svi`` or ``reweight``), a Dataset with any of the dimensions chain, draw and sample,
            or a mapping of names to arrays of shape ``(draws, *event)``.
        reference: draws of the posterior, in any of these forms.
        var_names: latents to show, or single elements of them, such as ``"theta[2]"`` (or
            ``"theta[Choate]"`` where the Dataset has such coordinates); by default the first
            8 that all of the draws have; the legend says so where there are more.
        axes: where to draw: the ``(n, n)`` Axes of a figure for ``n`` variables, or one for a
            single variable; a new figure by default. The legend takes the upper right one.
        reference_label: the name of the reference.

    Returns:
        The ``(n, n)`` array of Axes; those above the diagonal are empty. On the diagonal densities,
        cut at four times the height of the lowest of them, with a marker at the mean (a vertical
        line for draws that do not vary, as of a point estimate), below it contours around 50 % and
        90 % of the draws with a marker at the mean. Axes end at the 0.5 % and 99.5 % quantiles of
        whatever reaches farthest. Densities are kernel estimates from at most 2,000 draws, evenly
        spaced among all.

    Raises:
        ValueError: if there is no guide, a variable is missing or not finite, no variable is
            left or more than 8 are asked for, or ``axes`` have another shape.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import from_svi, plot_guides
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> tree = from_svi(model, guide, num_samples=200, seed=0)
        >>> axes = plot_guides({"exact": tree})
    """
    if isinstance(guides, xr.DataTree | xr.Dataset):
        raise ValueError(
            f"Expected guides by name, such as {{'guide': tree}}, got a {type(guides).__name__}"
        )
    if not guides:
        raise ValueError("Expected at least one guide, got none")
    sources = dict(guides) if reference is None else {reference_label: reference, **guides}
    if reference is not None and reference_label in guides:
        raise ValueError(f"Expected reference_label to be no guide, got '{reference_label}'")
    columns = {name: _columns(name, draws) for name, draws in sources.items()}
    names, note = _names(columns, var_names)
    return draw_panels(
        columns,
        names,
        reference=None if reference is None else reference_label,
        axes=axes,
        note=note,
    )


def _columns(name: str, draws: Draws) -> dict[str, np.ndarray]:
    """The draws of every scalar by its label."""
    draws = as_tree(draws)
    if isinstance(draws, xr.DataTree):
        if "posterior" not in draws.children:
            raise ValueError(
                f"Expected a group posterior in '{name}', got {sorted(draws.children)}"
            )
        draws = draws["posterior"].to_dataset()
    columns: dict[str, np.ndarray] = {}
    for site in map(str, draws):
        array = draws[site]
        labels: Sequence[Any] = ()
        if isinstance(array, xr.DataArray):
            sample_dims = [dim for dim in array.dims if dim in _SAMPLE_DIMS]
            event_dims = [dim for dim in array.dims if dim not in _SAMPLE_DIMS]
            labels = [array[dim].to_numpy() for dim in event_dims]
            array = array.transpose(*sample_dims, *event_dims)
            values = array.to_numpy().reshape(-1, *(array.sizes[dim] for dim in event_dims))
        else:
            values = np.asarray(array.detach().cpu() if isinstance(array, torch.Tensor) else array)
            if values.ndim == 0:
                raise ValueError(f"Expected draws of '{site}' in '{name}', got a single number")
            labels = [np.arange(size) for size in values.shape[1:]]
        for index in np.ndindex(values.shape[1:]):
            place = ", ".join(str(labels[dim][i]) for dim, i in enumerate(index))
            columns[f"{site}[{place}]" if index else site] = values[(slice(None), *index)]
    return columns


def _names(
    columns: Mapping[str, dict[str, np.ndarray]], var_names: str | Sequence[str] | None
) -> tuple[list[str], str]:
    everywhere = [
        name for name in next(iter(columns.values())) if all(name in c for c in columns.values())
    ]
    if var_names is None:
        names, note = first_variables(everywhere)
    else:
        names, note = [], ""
        for wanted in [var_names] if isinstance(var_names, str) else var_names:
            found = [name for name in everywhere if wanted in (name, name.split("[")[0])]
            if not found:
                raise ValueError(f"Expected var_names among {everywhere}, got '{wanted}'")
            names += [name for name in found if name not in names]
    if not 1 <= len(names) <= MOST_VARIABLES:
        raise ValueError(
            f"Expected 1 to {MOST_VARIABLES} variables that all draws have, got {len(names)} "
            f"({', '.join(names[: MOST_VARIABLES + 1]) or 'none'}): choose with var_names"
        )
    for source, own in columns.items():
        for name in names:
            if own[name].size == 0 or not np.isfinite(own[name]).all():
                raise ValueError(f"Expected finite draws of '{name}' in '{source}', got others")
    return names, note
