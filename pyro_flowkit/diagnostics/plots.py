"""Pictures that ArviZ does not have: training curve, ladder of bounds, pareto k, parts of the gap.

matplotlib Axes in, Axes out; matplotlib is imported when a plot is drawn. Series differ in marker,
line style and lightness, not in colour alone: they can be told apart in grey and by colour-blind
readers.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_flowkit.diagnostics.compare import compare_densities
from pyro_flowkit.diagnostics.tree import history_arrays
from pyro_flowkit.ops.psis import pareto_k_threshold
from pyro_flowkit.pictures import COLORS, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_BINS = 40
_K_LINES = {
    0.5: (":", "finite variance below"),
    0.7: ("--", "smoothing helps below"),
    1.0: ("-", "finite mean below"),
}


def plot_elbo(
    history: Any, ax: "Axes | None" = None, *, label: str | None = None, smooth: float = 0.02
) -> "Axes":
    """The ELBO over the steps of the training: raw in light grey, smoothed on top.

    Args:
        history: a ``FitResult``, its ``history`` dict, or a tree of ``from_svi`` with ``vi_trace``.
        ax: where to draw; a new figure by default.
        label: the name of the run, for several in one picture.
        smooth: the width of the running mean as a part of the whole run.

    Returns:
        The Axes. The y axis leaves out the first tenth of the run, whose ELBO dwarfs the rest.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow, fit
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> from pyro_flowkit.diagnostics import plot_elbo
        >>> result = fit(SplineFlow(2), data=x, max_steps=20, seed=0, progress=False)
        >>> plot_elbo(result, label="moons").get_ylabel()
        'ELBO (nats)'
    """
    ax = new_axes() if ax is None else ax
    if isinstance(history, xr.DataTree):
        if "vi_trace" not in history.children:
            raise ValueError(f"Expected a group vi_trace, got {sorted(history.children)}")
        trace = history["vi_trace"].to_dataset().isel(chain=0)
        step, elbo = trace["step"].to_numpy(), trace["elbo"].to_numpy()
    else:
        arrays = history_arrays(history)
        step, elbo = arrays["step"], arrays["elbo"]
    color, _, line = style(sum(1 for drawn in ax.lines if drawn.get_gid() == "smoothed"))
    width = max(1, int(smooth * len(elbo)))
    ax.plot(step, elbo, color="0.8", linewidth=0.6, zorder=1)
    smoothed = np.convolve(elbo, np.full(width, 1 / width), mode="valid")
    ax.plot(
        step[width - 1 :], smoothed, line, color=color, label=label, linewidth=1.5, gid="smoothed"
    )
    late = elbo[len(elbo) // 10 :]
    late = late[np.isfinite(late)]
    if late.size and late.min() < late.max():
        low, high = np.quantile(late, [0.005, 1.0])
        margin = 0.05 * (high - low)
        previous = ax.get_ylim() if len(ax.lines) > 2 else (np.inf, -np.inf)
        ax.set_ylim(min(previous[0], low - margin), max(previous[1], high + margin))
    ax.set_xlabel("step")
    is_point = getattr(history, "is_point", False)
    ax.set_ylabel("log p(x, z) at the point (nats)" if is_point else "ELBO (nats)")
    if label:
        ax.legend(frameon=False)
    return ax


def plot_bounds(datasets: Mapping[str, xr.Dataset], ax: "Axes | None" = None) -> "Axes":
    """Every VAE's ladder ELBO <= IWAE-K over K, and exact densities as lines across.

    A ladder rises towards the exact value of *its own* model, which is not in the picture; the
    lines are the exact values of *other* models on the same data.

    Args:
        datasets: as for ``compare_densities``.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes; nats per datum with one standard error of the draws at every rung (K = 1 is the
        ELBO), and a dotted line with a label at its right end for each exact value.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> from pyro_flowkit.diagnostics import heldout_log_prob, plot_bounds
        >>> plot_bounds({"flow": heldout_log_prob(SplineFlow(2), x)}).get_ylabel()
        'nats per datum'
    """
    ax = new_axes() if ax is None else ax
    table = compare_densities(datasets)
    lines = [name for name in datasets if "log_prob" in datasets[name]]
    ladders = [name for name in datasets if name not in lines]
    for i, name in enumerate(ladders):
        color, marker, line = style(i)
        rungs = table.loc[name]
        particles = [1 if q == "ELBO" else int(q.removeprefix("IWAE-")) for q in rungs.index]
        ax.errorbar(
            particles,
            rungs["nats"].to_numpy(float),
            yerr=rungs["mc_se"].to_numpy(float),
            color=color,
            marker=marker,
            linestyle=line,
            markersize=5,
            capsize=2,
            label=f"{name} (lower bounds)",
        )
    for name in lines:
        value = float(table["nats"][(name, "log p")])
        ax.axhline(value, color="0.35", linestyle=":", linewidth=1.2)
        _name_line(ax, value, f"{name} (exact)")
    if ladders:
        ax.set_xscale("log")
        counts = sorted({1, *(int(k) for n in ladders for k in datasets[n]["n_particles"])})
        ax.set_xticks(counts, ["ELBO", *(f"IWAE-{k}" for k in counts[1:])])
        ax.minorticks_off()
        # below the axes: wherever a legend went inside, a ladder could be
        ax.legend(
            frameon=False,
            fontsize="small",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            ncols=2,
        )
    else:
        ax.set_xticks([])
    ax.set_ylabel("nats per datum")
    return ax


def plot_pareto_k(dataset: xr.Dataset, ax: "Axes | None" = None) -> "Axes":
    """Pareto k of every datum with the named lines 0.5, 0.7 and 1, and the threshold of the draws.

    Args:
        dataset: the result of ``pointwise_bounds``, or of ``evidence_bounds`` for a single point.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes; data above the threshold ``min(1 - 1 / log10(S), 0.7)`` are crosses
        (triangles at the top where pareto k is ``inf``), the others dots.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import evidence_bounds, plot_pareto_k
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> plot_pareto_k(evidence_bounds(model, guide, num_samples=200, seed=0)).get_ylabel()
        'pareto k'
    """
    ax = new_axes() if ax is None else ax
    if "pareto_k" not in dataset:
        raise ValueError(f"Expected a variable pareto_k, got {sorted(map(str, dataset.data_vars))}")
    k = np.atleast_1d(dataset["pareto_k"].to_numpy())
    ids = dataset["obs_id"].to_numpy() if "obs_id" in dataset.coords else np.arange(len(k))
    num_samples = int(dataset.attrs["num_samples"])
    threshold = pareto_k_threshold(num_samples)
    above = ~(k <= threshold)
    finite = np.isfinite(k)
    top = 1.1 * max(1.0, k[finite].max(initial=1.0))
    ax.scatter(ids[~above], k[~above], s=10, color=COLORS[1], marker="o")
    ax.scatter(ids[above & finite], k[above & finite], s=25, color=COLORS[2], marker="x")
    ax.scatter(ids[~finite], np.full((~finite).sum(), top), s=25, color=COLORS[2], marker="^")
    for value, (line, name) in _K_LINES.items():
        ax.axhline(value, color="0.5", linestyle=line, linewidth=0.8)
        _name_line(ax, value, f"{value:g}: {name}")
    ax.axhline(threshold, color=COLORS[2], linestyle="-.", linewidth=1.0)
    ax.set_title(
        f"{int(above.sum())} of {len(k)} above {threshold:.2f}, the most for {num_samples:,} draws",
        fontsize="medium",
    )
    ax.set_xlabel("obs_id")
    ax.set_ylabel("pareto k")
    return ax


def plot_gap(dataset: xr.Dataset, ax: "Axes | None" = None) -> "Axes":
    """What the gap of every datum is made of: histograms of its two parts, with their means.

    Args:
        dataset: the result of ``inference_gaps``.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes: data per bin of nats, the approximation gap (the family's) filled, the
        amortisation gap (the encoder's) as a hatched outline, the mean of each a vertical line with
        its number in the legend. Data whose gap is infinite are counted in the legend.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import inference_gaps, plot_gap
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> gaps = inference_gaps(model, guide, torch.randn(4), num_samples=100, num_steps=6, seed=0)
        >>> ax = plot_gap(gaps)
    """
    ax = new_axes() if ax is None else ax
    parts: dict[str, tuple[str, dict[str, Any], str]] = {
        "approximation_gap": ("approximation (family)", {"color": COLORS[6], "alpha": 0.8}, "-"),
        "amortization_gap": (
            "amortisation (encoder)",
            {"facecolor": "none", "edgecolor": COLORS[0], "hatch": "////"},
            "--",
        ),
    }
    missing = [name for name in parts if name not in dataset]
    if missing:
        raise ValueError(f"Expected {missing}, got {sorted(map(str, dataset.data_vars))}")
    values = {name: np.atleast_1d(dataset[name].to_numpy()) for name in parts}
    finite = {name: value[np.isfinite(value)] for name, value in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins="auto")
    if len(edges) > _MAX_BINS + 1:
        edges = np.linspace(edges[0], edges[-1], _MAX_BINS + 1)
    for name, (label, fill, line) in parts.items():
        mean = values[name].mean()
        infinite = len(values[name]) - len(finite[name])
        outside = f", {infinite} not finite" if infinite else ""
        ax.hist(
            finite[name],
            bins=edges.tolist(),
            histtype="stepfilled",
            label=f"{label}: mean {mean:.3g}{outside}",
            **fill,
        )
        if np.isfinite(mean):
            color = COLORS[1] if line == "-" else COLORS[0]
            ax.axvline(mean, color=color, linestyle=line, linewidth=1.5)
    ax.axvline(0.0, color="0.5", linestyle=":", linewidth=0.8)
    ax.set_xlabel("gap (nats per datum)")
    ax.set_ylabel("data")
    # below the axes: wherever a legend went inside, a histogram could be
    ax.legend(
        frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2
    )
    return ax


def _name_line(ax: "Axes", value: float, name: str) -> None:
    """A label at the right end of a line across."""
    ax.annotate(
        name,
        (1.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
