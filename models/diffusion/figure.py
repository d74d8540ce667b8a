"""What ``python -m models.diffusion --figure PATH`` draws."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from models.data import Dataset
from models.diffusion import report
from models.diffusion.bounds import Terms
from models.diffusion.model import Diffusion, angles_like
from pyro_flowkit.pictures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMES = (0.0, 0.2, 0.4, 0.6, 1.0)
MOMENTS = 40  # of a drawn path
NUM_POINTS, NUM_PATHS, NUM_IMAGES = 1500, 12, 4
GRID = 17


def draw(
    diffusion: Diffusion,
    dataset: Dataset,
    terms: Mapping[tuple[int | None, bool], Terms],
    scores: Mapping[str, xr.Dataset],
    path: Path,
) -> None:
    """Save the figure: draws along the flow and its field above, the ladder of bounds and its steps below.

    Args:
        diffusion: the trained model.
        dataset: its data, points of the plane or square images.
        terms: of the ELBOs by number of levels and whether the scales were fitted.
        scores: of all models.
        path: of the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 6.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.0, 1.35))
    panels = above.subplots(1, len(TIMES))
    torch.manual_seed(0)
    z = torch.randn(NUM_POINTS, dataset.event_size)
    places = along(diffusion, z, TIMES)
    if dataset.event_size == 2:
        moments = [i / MOMENTS for i in range(MOMENTS + 1)]
        paths = torch.stack(along(diffusion, z[:NUM_PATHS], moments))
        for ax, time, place in zip(panels, TIMES, places, strict=True):
            _points(ax, diffusion, time, place, paths[: round(MOMENTS * time) + 1])
        above.suptitle("Draws along the probability-flow equation, and its field")
    else:
        for ax, time, place in zip(panels, TIMES, places, strict=True):
            images = diffusion.standardization(place[: NUM_IMAGES**2]).detach()
            _images(ax, time, images, dataset.levels)
        above.suptitle("Draws along the probability-flow equation, from noise to digits")
    left, right = below.subplots(1, 2)
    _ladder(left, terms, scores)
    _steps(right, terms)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def along(diffusion: Diffusion, z: Tensor, times: Sequence[float]) -> list[Tensor]:
    """Where the flow has taken draws of the base, at times from 0 on; standardised, shape ``(n, D)`` each."""
    places = [z]
    for start, end in zip(times, times[1:], strict=False):
        places.append(diffusion.ode.move(places[-1], None, start, end))
    return places


def _points(ax: "Axes", diffusion: Diffusion, time: float, place: Tensor, paths: Tensor) -> None:
    """Draws, the paths of some of them up to now, and the field as arrows."""
    reach = 2.6
    axis = torch.linspace(-reach, reach, GRID)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        velocity: Any = diffusion.ode.velocity
        arrows = velocity(grid, angles_like(time, grid))
    ax.quiver(*grid.T.numpy(), *arrows.T.numpy(), color="0.6", angles="xy", width=0.004)
    ax.scatter(*place.T.numpy(), s=2, color="#0072B2", alpha=0.5, linewidths=0)
    for path in paths.unbind(1):
        ax.plot(*path.T.numpy(), color="#D55E00", linewidth=0.9)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=(), yticks=(), aspect="equal")
    ax.set_title(f"t = {time:g}", fontsize="medium")


def _images(ax: "Axes", time: float, images: Tensor, levels: int | None) -> None:
    """A square of images."""
    side = math.isqrt(images.shape[-1])
    tiles = images.reshape(NUM_IMAGES, NUM_IMAGES, side, side).permute(0, 2, 1, 3)
    ax.imshow(tiles.reshape(NUM_IMAGES * side, -1).numpy(), cmap="gray_r", vmin=0, vmax=levels)
    for edge in range(side, NUM_IMAGES * side, side):
        ax.axhline(edge - 0.5, color="white", linewidth=1.5)
        ax.axvline(edge - 0.5, color="white", linewidth=1.5)
    ax.set_axis_off()
    ax.set_title(f"t = {time:g}", fontsize="medium")


def _ladder(
    ax: "Axes",
    terms: Mapping[tuple[int | None, bool], Terms],
    scores: Mapping[str, xr.Dataset],
) -> None:
    """ELBOs over the number of levels, with exact values as lines."""
    exact = scores[report.ITS_FLOW]["log_prob"].to_numpy()
    levels = sorted({levels for levels, _ in terms if levels})
    end = levels[-1] * (levels[-1] / levels[0]) ** 0.5
    lows = []
    for index, fitted in enumerate((True, False)):
        color, marker, line = style(index)
        shown = [terms[count, fitted].elbo.numpy() for count in levels]
        shown.append(terms[None, True].elbo.numpy())
        means = [values.mean() for values in shown]
        errors = [2 * (values - exact).std() / math.sqrt(len(values)) for values in shown]
        lows.append(means[0])
        label = "ELBO, " + ("fitted scales" if fitted else "fixed scales")
        options: dict[str, Any] = {"marker": marker, "linestyle": line, "capsize": 3}
        ax.errorbar([*levels, end], means, errors, color=color, label=label, **options)
    exacts = (report.ITS_FLOW, report.MATCHED, report.SPLINE, report.GAUSSIAN)
    lines = [name for name in exacts if name in scores]
    heights = [float(scores[name]["log_prob"].mean()) for name in lines]
    for index, (name, height) in enumerate(zip(lines, heights, strict=True)):
        color, _, line = style(index + 2)
        ax.axhline(height, color=color, linestyle=line, linewidth=1.2, label=f"{name}, log p")
    top, low = max(heights) + 0.05, min(lows[0], *heights) - 0.05
    ax.set_ylim(low - 0.15 * (top - low), top + 0.1 * (top - low))
    ax.set_xscale("log")
    ax.set_xticks([*levels, end], [*map(str, levels), "limit"])
    ax.minorticks_off()
    ax.set_xlabel("levels of the hierarchical VAE")
    ax.set_ylabel("nats per datum")
    ax.set_title("One network: bounds of its levels, and exact densities", fontsize="medium")
    ax.legend(fontsize="small", frameon=False)


def _steps(ax: "Axes", terms: Mapping[tuple[int | None, bool], Terms]) -> None:
    """By how much the KL of each step is above what the limit has there."""
    limit = terms[None, True]
    so_far = np.concatenate([[0.0], limit.steps.mean(0).cumsum(0).numpy()])
    levels = sorted({levels for levels, _ in terms if levels})[:2]
    for index, count in enumerate(levels):
        own = terms[count, True]
        ends = own.log_snr.numpy()
        whole = np.interp(-ends, -limit.log_snr.numpy(), so_far)
        excess = own.steps.mean(0).numpy() - np.diff(whole)
        color, _, line = style(index)
        label = f"{count} levels, fitted scales: {excess.sum():.2f} nats in all"
        widths = -np.diff(ends)
        ax.stairs((excess / widths)[::-1], ends[::-1], color=color, linestyle=line, label=label)
    ax.axhline(0.0, color="0.6", linewidth=0.8)
    ax.set_xlabel("log of the ratio of signal and noise (data at the right)")
    ax.set_ylabel("nats per unit of it")
    ax.set_title("KL of the steps, less that of the limit", fontsize="medium")
    ax.legend(fontsize="small", frameon=False)
