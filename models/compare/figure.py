"""The comparison in one picture: what flows buy, why, where all models stand, and what they draw."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from models.compare.jobs import BOTH, FLOW_POSTERIOR, FLOW_PRIOR, GAUSSIAN, PLAIN, SPLINE_FLOW
from models.compare.report import difference, headline, tightest
from models.compare.statistics import by_seed, mean_and_error

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

COLUMNS, ROWS = 4, 4
NAMES = {
    PLAIN: "plain VAE",
    FLOW_POSTERIOR: "flow posterior",
    FLOW_PRIOR: "flow prior",
    BOTH: "both",
    SPLINE_FLOW: "spline flow",
    GAUSSIAN: "Gaussian",
}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.45"


def draw(
    scores: Mapping[str, xr.Dataset],
    reasons: xr.Dataset,
    pictures: Mapping[str, np.ndarray],
    title: str,
    path: "Path",
) -> None:
    """Save the figure.

    Args:
        scores: by the name of the model, with the dimensions seed and obs_id.
        reasons: what of the plain VAE a flow could mend.
        pictures: images by what they are, the real ones first, each of shape ``(n, height, width)``.
        title: of the data.
        path: a file whose suffix says the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 9.0), layout="constrained")
    seeds = scores[PLAIN].sizes["seed"]
    together, alone = headline(scores).split("; ")
    figure.suptitle(
        f"What flows buy in a VAE of {title}: {together}\n{alone}\n",
        fontsize=15,
        fontweight="bold",
    )
    above, middle, below = figure.subfigures(3, 1, height_ratios=[1.0, 0.8, 0.95])
    buys, why = above.subplots(1, 2)
    over = "± standard error over " + ("seeds and images" if seeds > 1 else "images")
    _differences(buys, scores, over)
    _reasons(why, reasons, over)
    _levels(middle.subplots(), scores)
    below.suptitle(
        "Real images, and draws (of VAEs the mean given the code that was drawn)", fontsize=12
    )
    brightest = float(next(iter(pictures.values())).max())
    for ax, (name, images) in zip(below.subplots(1, len(pictures)), pictures.items(), strict=True):
        ax.imshow(mosaic(images), cmap="gray_r", vmin=0.0, vmax=brightest)
        ax.set_title(NAMES.get(name, name), fontsize=11)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_color("0.7")
    figure.savefig(path, dpi=160)


def _differences(ax: "Axes", scores: Mapping[str, xr.Dataset], over: str) -> None:
    rows = (FLOW_POSTERIOR, FLOW_PRIOR, BOTH)
    for i, name in enumerate(rows):
        values = difference(scores, name)
        mean, error = mean_and_error(values)
        ax.errorbar(mean, i, xerr=error, fmt="o", color=BLUE, markersize=9, capsize=4, linewidth=2)
        ax.plot(
            by_seed(values), np.full(values.sizes["seed"], i + 0.2), "|", color=GREY, markersize=8
        )
        ax.annotate(
            f"{mean:+.2f} ± {error:.2f}",
            (mean, i),
            (0, -19),
            textcoords="offset points",
            ha="center",
            fontsize=11,
            color=BLUE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    ax.axvline(0.0, color="0.2", linewidth=1.0)
    ax.set_yticks(range(len(rows)), [NAMES[name] for name in rows], fontsize=12)
    ax.set_ylim(-0.7, len(rows) - 0.4)
    ax.margins(x=0.25)
    particles = int(scores[PLAIN]["n_particles"].max())
    ax.set_title("Over the plain VAE", fontsize=12)
    ax.set_xlabel(
        f"nats of IWAE-{particles} per test image\n{over}; | a seed",
        fontsize=11,
    )
    _bare(ax)


def _reasons(ax: "Axes", reasons: xr.Dataset, over: str) -> None:
    rows = {
        "encoder: misses\nthe best normal": ("amortization_gap", GREY),
        "posterior: is\nnot normal": ("approximation_gap", ORANGE),
        "prior: codes are\nnot standard normal": ("prior_gain", BLUE),
    }
    for i, (name, color) in enumerate(rows.values()):
        mean, error = mean_and_error(reasons[name])
        ax.barh(i, mean, color=color, height=0.55, xerr=error, error_kw={"capsize": 4})
        ax.annotate(
            f"{mean:.2f}",
            (mean + error, i),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
        )
    ax.set_yticks(range(len(rows)), list(rows), fontsize=11)
    ax.margins(x=0.2)
    ax.set_title("Why: what its parts cost the plain VAE", fontsize=12)
    ax.set_xlabel(f"nats of ELBO per test image\n{over}", fontsize=11)
    _bare(ax)


def _levels(ax: "Axes", scores: Mapping[str, xr.Dataset]) -> None:
    names = sorted(scores, key=lambda name: float(tightest(scores[name]).mean()))
    for i, name in enumerate(names):
        own = scores[name]
        if "log_prob" in own:
            ax.plot(float(own["log_prob"].mean()), i, "D", color=ORANGE, markersize=8)
            continue
        elbo, iwae = float(own["elbo"].mean()), float(tightest(own).mean())
        ax.plot([elbo, iwae], [i, i], "-", color=BLUE, linewidth=2, zorder=1)
        ax.plot(elbo, i, "o", markerfacecolor="white", color=BLUE, markersize=8)
        ax.plot(iwae, i, "o", color=BLUE, markersize=8)
    for style, color, face, label in (
        ("o", BLUE, "white", "ELBO"),
        ("o", BLUE, BLUE, f"IWAE-{int(scores[PLAIN]['n_particles'].max())}"),
        ("D", ORANGE, ORANGE, "log p, exact"),
    ):
        if label != "log p, exact" or SPLINE_FLOW in scores:
            ax.plot([], [], style, color=color, markerfacecolor=face, markersize=8, label=label)
    ax.set_yticks(range(len(names)), [NAMES[name] for name in names], fontsize=12)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.legend(loc="lower right", fontsize=11, frameon=False)
    ax.set_title(
        "Where the models stand: a VAE's own log p is at or beyond its right end", fontsize=12
    )
    ax.set_xlabel("nats per test image", fontsize=11)
    _bare(ax)


def _bare(ax: "Axes") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)


def mosaic(images: np.ndarray) -> np.ndarray:
    """The first images side by side, with a line of zeros between them, as one picture."""
    height, width = images.shape[1:]
    tiles = np.zeros((ROWS, height + 1, COLUMNS, width + 1))
    for i, image in enumerate(images[: ROWS * COLUMNS]):
        tiles[i // COLUMNS, :height, i % COLUMNS, :width] = image
    return tiles.reshape(ROWS * (height + 1), COLUMNS * (width + 1))[:-1, :-1]
