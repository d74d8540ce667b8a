"""What pictures of draws are made of: styles that can be told apart in grey, and a triangle of panels.

matplotlib is imported when something is drawn. Series differ in marker, line style and lightness, not in colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours in the order of their lightness, dark to light.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
MOST_VARIABLES = 8

_REGIONS = (0.9, 0.5)
_GRID = 60
_MOST_DRAWS = 2000
_TALLEST = 4.0  # times the lowest peak


def style(index: int) -> tuple[str, str, str]:
    """Colour, marker and line style of a series."""
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)]


def new_axes() -> "Axes":
    """The Axes of a new figure, which makes room for labels and legends wherever they stand."""
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def columns_of(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The draws of every scalar by its label, from arrays of shape ``(draws, *event)``."""
    return {
        f"{site}[{', '.join(map(str, index))}]" if index else site: values[(slice(None), *index)]
        for site, values in draws.items()
        for index in np.ndindex(values.shape[1:])
    }


def first_variables(names: Sequence[str]) -> tuple[list[str], str]:
    """As many as there is room for, and a word about those that are left out."""
    if len(names) <= MOST_VARIABLES:
        return list(names), ""
    return list(names[:MOST_VARIABLES]), f"the first {MOST_VARIABLES} of {len(names)} variables"


def draw_panels(
    columns: Mapping[str, dict[str, np.ndarray]],
    names: Sequence[str],
    *,
    reference: str | None = None,
    axes: Any = None,
    note: str = "",
) -> np.ndarray:
    """Marginals on the diagonal, pairs below it.

    Args:
        columns: draws of every scalar, by the name of the series.
        names: the scalars to show.
        reference: the series that is drawn as a grey area; the others are lines.
        axes: where to draw, an ``(n, n)`` array of Axes or a single one; a new figure by default.
        note: to be said in the legend.

    Returns:
        The ``(n, n)`` array of Axes.
    """
    panels = _panels(axes, len(names))
    limits = {name: _limits([own[name] for own in columns.values()]) for name in names}
    styles = {name: style(i) for i, name in enumerate(n for n in columns if n != reference)}
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
    _legend(panels, reference, styles, note)
    return panels


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
    note: str,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [] if reference_label is None else [Patch(color="0.8")]
    for color, marker, line in styles.values():
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line}
        handles.append(Line2D([], [], markeredgecolor="white", **style))
    labels = [*([] if reference_label is None else [reference_label]), *styles]
    single = len(panels) == 1
    legend = panels[0, -1].legend(
        handles,
        labels,
        frameon=False,
        loc="best" if single else "upper right",
        handlelength=3.5,
        title="\n".join(
            filter(None, ["" if single else "50 % and 90 % of\nthe draws, and means", note])
        ),
        title_fontsize="small",
        alignment="left",
    )
    legend.set_in_layout(len(panels) < 3)  # there is room for it beside the diagonal
