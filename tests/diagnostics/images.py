"""Every picture of the package as a thumbnail of digits, which can be compared with a tolerance and read in a diff.

    python -m tests.diagnostics.images FOLDER    # new thumbnails; the pictures go into the folder: look at them

A digit is how dark its cell is, on a scale of square roots, so that a thin line counts.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_flowkit import SplineFlow
from pyro_flowkit.diagnostics import plot_bounds, plot_elbo, plot_gap, plot_guides, plot_pareto_k

THUMBNAILS = Path(__file__).parent / "data" / "pictures.txt"
ROWS, COLUMNS = 24, 32
DPI = 64


def bounds(shift: float) -> xr.Dataset:
    n_particles = np.array([1, 10, 1000])
    iwae = shift + np.log10(n_particles) + np.zeros((4, 3))
    return xr.Dataset(
        {
            "elbo": ("obs_id", iwae[:, 0]),
            "elbo_se": ("obs_id", np.full(4, 0.2)),
            "iwae": (("obs_id", "n_particles"), iwae),
            "iwae_se": (("obs_id", "n_particles"), np.full((4, 3), 0.2)),
            "pareto_k": ("obs_id", np.array([0.1, 0.4, 0.8, np.inf])),
        },
        {"obs_id": np.arange(4), "n_particles": n_particles},
        {"num_samples": 1000},
    )


def exact(value: float) -> xr.Dataset:
    return xr.Dataset({"log_prob": ("obs_id", np.full(4, value))}, {"obs_id": np.arange(4)})


def gaps(approximation: Any, amortization: Any) -> xr.Dataset:
    return xr.Dataset(
        {
            "approximation_gap": ("obs_id", np.asarray(approximation)),
            "amortization_gap": ("obs_id", np.asarray(amortization)),
        }
    )


def draws(num_columns: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "mu": shift + rng.normal(size=400),
        "theta": rng.normal(size=(400, num_columns - 1)) + np.arange(num_columns - 1),
    }


def flow() -> Any:
    torch.manual_seed(0)
    data = torch.randn(300, 2) + 5.0
    return SplineFlow(2).standardize(data).plot(data, num_samples=300)


PICTURES: dict[str, Callable[[], Any]] = {
    "plot_elbo": lambda: plot_elbo(
        {"step": np.arange(200), "elbo": -1.0 / np.arange(1, 201)}, label="a run"
    ),
    "plot_bounds": lambda: plot_bounds({"a": bounds(-5.0), "a flow of some name": exact(-1.0)}),
    "plot_pareto_k": lambda: plot_pareto_k(bounds(0.0)),
    "plot_gap": lambda: plot_gap(gaps(np.linspace(0.0, 0.4, 30), np.linspace(0.3, 1.3, 30))),
    "plot_guides": lambda: plot_guides({"flow": draws(3), "normal": draws(3, 1.0)}, draws(3, 0.5)),
    "plot_guides, many": lambda: plot_guides({"a guide with a name": draws(10)}),
    "flow.plot": flow,
}


def figure_of(name: str) -> Any:
    """A picture's figure, drawn."""
    axes = np.asarray(PICTURES[name](), dtype=object).flat[0]
    axes.figure.set_dpi(DPI)
    axes.figure.canvas.draw()
    return axes.figure


def thumbnail(figure: Any) -> np.ndarray:
    """How dark the cells of a figure are, from 0 to 9, of shape ``(ROWS, COLUMNS)``."""
    figure.canvas.draw()
    ink = 1 - np.asarray(figure.canvas.buffer_rgba())[..., :3].mean(-1) / 255
    rows = np.array_split(ink, ROWS)
    cells = [[cell.mean() for cell in np.array_split(row, COLUMNS, axis=1)] for row in rows]
    return 9 * np.sqrt(np.array(cells))


def committed() -> dict[str, np.ndarray]:
    """The thumbnails in the file, by the names of the pictures."""
    blocks = THUMBNAILS.read_text(encoding="utf-8").strip().split("\n\n")
    read = (block.split("\n") for block in blocks)
    return {name: np.array([[int(d) for d in row] for row in rows]) for name, *rows in read}


def lines(folder: Path) -> Iterator[str]:
    """The file of thumbnails, while the pictures are saved."""
    for name in PICTURES:
        figure = figure_of(name)
        figure.savefig(folder / f"{name}.png")
        yield name
        yield from ("".join(map(str, row)) for row in thumbnail(figure).round().astype(int))
        yield ""


if __name__ == "__main__":
    THUMBNAILS.write_text("\n".join(lines(Path(sys.argv[1]))), encoding="utf-8")
