"""The comparison in one picture: what each model draws, its bounds, and its training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models._compare_jobs import Outcome
from pyro_flowkit.diagnostics import plot_bounds, plot_elbo

COLUMNS, ROWS = 5, 4
SIDE = 8
BRIGHTEST = 17.0


def draw(outcomes: Sequence[Outcome], real: np.ndarray, path: Path) -> None:
    """Save the figure.

    Args:
        outcomes: of all models, in the order of the table.
        real: test images, shape ``(n, 64)``.
        path: a file whose suffix says the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.0, 8.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.0, 2.1])
    mosaics = {"real test digits": real} | {o.job.name: o.samples for o in outcomes}
    above.suptitle("Draws of each model beside real digits (8x8 pixels, 17 grey levels with noise)")
    for ax, (name, images) in zip(above.subplots(1, len(mosaics)), mosaics.items(), strict=True):
        ax.imshow(mosaic(images), cmap="gray_r", vmin=0.0, vmax=BRIGHTEST)
        ax.set_title(name.replace(", ", "\n"), fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_color("0.7")

    ladder, course = below.subplots(1, 2)
    plot_bounds({o.job.name: o.scores for o in outcomes}, ladder)
    ladder.set_title("Test images: each VAE's own ladder of lower bounds, up to its unknown log p")
    ladder.set_xlabel("bound (importance draws per image)")
    ladder.set_ylabel("nats per image")
    # VAEs first: curves and ladders of one model then have the same colour and line
    trained = sorted((o for o in outcomes if o.history), key=lambda o: not o.job.prior)
    for outcome in trained:
        plot_elbo(outcome.history, course, label=outcome.job.name)
    course.set_title("Training images: ELBO of the VAEs, log p of the flow")
    course.set_ylabel("nats per image")
    below.legend(*course.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    ladder.get_legend().remove()
    course.get_legend().remove()
    for ax in (ladder, course):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def mosaic(images: np.ndarray) -> np.ndarray:
    """The first images side by side, with a white line between them, as one picture."""
    tiles = np.zeros((ROWS, SIDE + 1, COLUMNS, SIDE + 1))
    few = images[: ROWS * COLUMNS].reshape(-1, SIDE, SIDE)
    for i, image in enumerate(few):
        tiles[i // COLUMNS, :SIDE, i % COLUMNS, :SIDE] = image
    return tiles.reshape(ROWS * (SIDE + 1), COLUMNS * (SIDE + 1))[:-1, :-1]
