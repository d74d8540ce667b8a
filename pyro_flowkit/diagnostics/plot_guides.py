"""Several guides over one reference: where do they differ from the posterior, and from each other?

A lower triangle of panels: marginal densities on the diagonal, below it the regions that hold 50 %
and 90 % of the draws of every pair of latents. The reference (draws of NUTS, of the exact posterior,
or of ``reweight``) is a grey area, every guide a line of its own colour, style and marker, so that the
picture can be read in grey and by colour-blind readers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from pyro_flowkit.diagnostics.plots import _style
from pyro_flowkit.diagnostics.schema import as_tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draws = xr.DataTree | xr.Dataset | Mapping[str, Any]

_REGIONS = (0.9, 0.5)
_MOST_VARIABLES = 8
_GRID = 60
_MOST_DRAWS = 2000
_TALLEST = 4.0  # times the lowest peak
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
            ``"theta[Choate]"`` where the Dataset has such coordinates); by default all that all
            of the draws have.
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
        ValueError: if there is no guide, a variable is missing or not finite, no variable or more
            than 8 are left, or ``axes`` have another shape.
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
    names = _names(columns, var_names)
    panels = _panels(axes, len(names))
    limits = {name: _limits([c[name] for c in columns.values()]) for name in names}
    shown = columns if reference is None else {n: c for n, c in columns.items() if n in guides}
    styles = {guide: _style(i) for i, guide in enumerate(shown)}
    for row, y in enumerate(names):
        _marginal(panels[row, row], columns, y, limits[y], styles)
        for column, x in enumerate(names[:row]):
            _pair(panels[row, column], columns, (x, y), (limits[x], limits[y]), styles)
    for row, y in enumerate(names):
        for column, x in enumerate(names[: row + 1]):
            last = row == len(names) - 1
            panels[row, column].set_xlabel(x if last else "")
            panels[row, column].tick_params(
                labelbottom=last, labelleft=column == 0, labelsize="small"
            )
            panels[row, column].locator_params(nbins=4)
        if row:
            panels[row, 0].set_ylabel(y)
    _legend(panels, None if reference is None else reference_label, styles)
    return panels


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
) -> list[str]:
    everywhere = [
        name for name in next(iter(columns.values())) if all(name in c for c in columns.values())
    ]
    if var_names is None:
        names = everywhere
    else:
        names = []
        for wanted in [var_names] if isinstance(var_names, str) else var_names:
            found = [name for name in everywhere if wanted in (name, name.split("[")[0])]
            if not found:
                raise ValueError(f"Expected var_names among {everywhere}, got '{wanted}'")
            names += [name for name in found if name not in names]
    if not 1 <= len(names) <= _MOST_VARIABLES:
        raise ValueError(
            f"Expected 1 to {_MOST_VARIABLES} variables that all draws have, got {len(names)} "
            f"({', '.join(names[: _MOST_VARIABLES + 1]) or 'none'}): choose with var_names"
        )
    for source, own in columns.items():
        for name in names:
            if own[name].size == 0 or not np.isfinite(own[name]).all():
                raise ValueError(f"Expected finite draws of '{name}' in '{source}', got others")
    return names


def _panels(axes: Any, count: int) -> np.ndarray:
    if axes is None:
        import matplotlib.pyplot as plt

        size = 3.6 if count == 1 else 1.0 + 1.9 * count
        _, axes = plt.subplots(
            count, count, figsize=(size, size), squeeze=False, layout="constrained"
        )
    panels = np.atleast_2d(axes)
    if panels.shape != (count, count):
        raise ValueError(f"Expected axes of shape {(count, count)}, got {panels.shape}")
    for row in range(count):
        for column in range(row + 1, count):
            panels[row, column].set_axis_off()
    return panels


def _limits(values: Sequence[np.ndarray], margin: float = 0.05) -> tuple[float, float]:
    ends = np.array([np.quantile(value, [0.005, 0.995]) for value in values])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    width = margin * (high - low) or 0.5
    return low - width, high + width


def _marginal(
    ax: "Axes",
    columns: Mapping[str, dict[str, np.ndarray]],
    name: str,
    limits: tuple[float, float],
    styles: Mapping[str, tuple[str, str, str]],
) -> None:
    drawn = {}
    for source, own in columns.items():
        values = _thinned(own[name])
        # Where a guide is much narrower than the others, the grid of all has no point in it.
        ends = (limits, _limits([own[name]]))
        grid = np.unique(np.concatenate([np.linspace(*end, 4 * _GRID) for end in ends]))
        drawn[source] = (grid, _density([values], grid[None]))
    peaks = [float(density.max()) for _, density in drawn.values() if density is not None] or [1.0]
    top = min(max(peaks), _TALLEST * min(peaks))
    for source, (grid, density) in drawn.items():
        mean = float(columns[source][name].mean())
        if source not in styles:
            if density is not None:
                ax.fill_between(grid, density, color="0.85", linewidth=0)
                ax.plot(grid, density, color="0.6", linewidth=0.8)
            continue
        color, marker, line = styles[source]
        if density is None:
            ax.axvline(mean, color=color, linestyle=line, linewidth=1.4)
            continue
        ax.plot(grid, density, color=color, linestyle=line, linewidth=1.4)
        height = min(top, float(np.interp(mean, grid, density)))
        ax.plot(mean, height, marker, color=color, markersize=5, markeredgecolor="white")
    ax.set_xlim(limits)
    ax.set_ylim(0, 1.08 * top)
    ax.set_yticks([])
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)


def _pair(
    ax: "Axes",
    columns: Mapping[str, dict[str, np.ndarray]],
    names: tuple[str, str],
    limits: tuple[tuple[float, float], tuple[float, float]],
    styles: Mapping[str, tuple[str, str, str]],
) -> None:
    for source, own in columns.items():
        x, y = own[names[0]], own[names[1]]
        grids = [np.linspace(*_limits([draws], 0.2), _GRID) for draws in (x, y)]
        points = np.stack(np.meshgrid(*grids)).reshape(2, -1)
        density = _density([_thinned(x), _thinned(y)], points)
        if density is not None:
            density = density.reshape(_GRID, _GRID)
        levels = [] if density is None else _levels(density)
        if source not in styles:
            if density is not None:
                ax.contourf(
                    *grids, density, levels=[*levels, density.max()], colors=["0.88", "0.72"]
                )
            continue
        color, marker, line = styles[source]
        if density is not None:
            ax.contour(
                *grids, density, levels=levels, colors=color, linestyles=line, linewidths=1.2
            )
        ax.plot(x.mean(), y.mean(), marker, color=color, markersize=5, markeredgecolor="white")
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def _thinned(values: np.ndarray) -> np.ndarray:
    step = -(-len(values) // _MOST_DRAWS)
    return values[::step].astype(np.float64)


def _support(values: np.ndarray) -> list[float]:
    """The least and the largest draw where a density seems to end there, else infinities."""
    from scipy.stats import gaussian_kde  # changes the filters of warnings

    ends = np.array([values.min(), values.max()])
    estimate = gaussian_kde(values)
    peak = estimate(np.linspace(ends[0], ends[1], _GRID)).max()
    return np.where(estimate(ends) > 0.1 * peak, ends, [-np.inf, np.inf]).tolist()


def _density(values: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray | None:
    """A kernel estimate that is reflected where the support ends, so that it does not leak.

    None where the draws lie on a point or on a line.
    """
    from scipy.stats import gaussian_kde  # changes the filters of warnings

    if any(np.ptp(value) == 0 for value in values):
        return None
    try:
        estimate = gaussian_kde(np.stack(values))
        supports = [_support(value) for value in values]
    except np.linalg.LinAlgError:
        return None
    density = estimate(points)
    for dim, support in enumerate(supports):
        reach = 4 * math.sqrt(estimate.covariance[dim, dim])
        for end in support:
            near = np.abs(points[dim] - end) < reach
            mirrored = points[:, near]
            mirrored[dim] = 2 * end - mirrored[dim]
            density[near] += estimate(mirrored) if near.any() else 0.0
        density[(points[dim] < support[0]) | (points[dim] > support[1])] = 0.0
    return density


def _levels(density: np.ndarray) -> list[float]:
    """The densities that the regions of highest density end at."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = ordered.cumsum() / ordered.sum()
    return [float(ordered[np.searchsorted(mass, region)]) for region in _REGIONS]


def _legend(
    panels: np.ndarray,
    reference_label: str | None,
    styles: Mapping[str, tuple[str, str, str]],
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [] if reference_label is None else [Patch(color="0.8")]
    for color, marker, line in styles.values():
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line}
        handles.append(Line2D([], [], markeredgecolor="white", **style))
    labels = [*([] if reference_label is None else [reference_label]), *styles]
    single = len(panels) == 1
    panels[0, -1].legend(
        handles,
        labels,
        frameon=False,
        loc="best" if single else "upper right",
        handlelength=3.5,
        title=None if single else "50 % and 90 % of the draws, and means",
        title_fontsize="small",
        alignment="left",
    )
