"""What is trained, on which images and for how long. Nothing here loads PyTorch: the command speaks within a second."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """One comparison.

    Attributes:
        title: of the images, in text and figure.
        vae_options: of ``python -m models.vae``; prior, posterior and seed come to them.
        has_densities: whether a Gaussian and a spline flow stand beside the VAEs, which binary pixels do not allow.
        seeds: trainings of every model.
        bound_rows: test images at most.
        gap_rows: test images, and training images, whose posteriors are optimised one by one.
        prior_steps: for a flow fitted to the frozen codes of the plain VAE.
        core_minutes: of one core for everything.
        stem: of the names of the files.
    """

    title: str
    vae_options: tuple[str, ...]
    has_densities: bool
    seeds: int
    bound_rows: int
    gap_rows: int
    prior_steps: int
    core_minutes: float
    stem: str

    @property
    def command(self) -> str:
        """How to train one of the VAEs alone."""
        shown = list(self.vae_options)
        if "--data" in shown:
            shown[shown.index("--data") + 1] = "PATH"
        return " ".join(["python -m models.vae", *shown])


DIGITS = Recipe(
    title="the digits",
    vae_options=(
        *("--likelihood", "normal", "--binarise", "none", "--latent-dim", "16"),
        *("--context-dim", "16", "--flow-hidden", "32", "32", "--dropout", "0.1"),
        *("--steps", "2500", "--kl-warm-up", "0.3"),
    ),
    has_densities=True,
    seeds=3,
    bound_rows=179,
    gap_rows=60,
    prior_steps=600,
    core_minutes=12.0,
    stem="compare",
)
# the defaults of models.vae: 32 latents, 256x256 hidden units, 3,000 steps, the KL raised over the first half of them
IMAGES = Recipe(
    title="",
    vae_options=(),
    has_densities=False,
    seeds=2,
    bound_rows=500,
    gap_rows=30,
    prior_steps=1000,
    core_minutes=12.0,
    stem="compare_mnist",
)


@dataclass(frozen=True)
class Request:
    """A comparison as it was asked for.

    Attributes:
        recipe: what is trained.
        output: folder of the figure and the netCDF file.
        processes: models trained at a time.
        fast: a rehearsal of seconds on few rows.
    """

    recipe: Recipe
    output: Path
    processes: int
    fast: bool

    @property
    def seeds(self) -> range:
        return range(self.recipe.seeds)


def parse(argv: Sequence[str] | None = None) -> Request:
    """From the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.data is not None and not Path(args.data).exists():
        parser.error(f"expected --data to be a file or a folder, got {args.data!r}")
    recipe = DIGITS if args.data is None else images(args.data)
    seeds = 2 if args.seeds is None and args.fast else args.seeds
    if seeds is not None:
        share = seeds / recipe.seeds
        recipe = replace(recipe, seeds=seeds, core_minutes=recipe.core_minutes * share)
    if args.fast:
        recipe = replace(recipe, gap_rows=3, core_minutes=0.0)
    if min(recipe.seeds, 1 if args.processes is None else args.processes) < 1:
        parser.error(
            f"expected positive numbers, got {args.seeds} seeds, {args.processes} processes"
        )
    processes = args.processes or (1 if args.fast else min(2, available_cores()))
    return Request(recipe, Path(args.output), processes, args.fast)


def images(path: str) -> Recipe:
    """The recipe for MNIST's relatives in a file or a folder, whose path says which one it is."""
    location = str(Path(path).resolve()).lower()
    known = {"fashion": "Fashion-MNIST", "mnist": "MNIST"}
    title = next((name for word, name in known.items() if word in location), Path(path).name)
    return replace(IMAGES, title=title, vae_options=("--data", path, *IMAGES.vae_options))


def announcement(request: Request) -> str:
    """What will happen, how long it takes and what is left at the end."""
    recipe = request.recipe
    seeds = f"{recipe.seeds} seed{'s' * (recipe.seeds > 1)} each"
    beside = ", beside a Gaussian and a spline flow whose log p is exact" * recipe.has_densities
    cores = f"{request.processes} at a time"
    duration = "a rehearsal of seconds, whose numbers mean nothing"
    if not request.fast:
        minutes = recipe.core_minutes / request.processes
        duration = f"about {minutes:.0f} minutes on as many free cores"
    return (
        f"What do flows buy in a VAE? Four VAEs of {recipe.title}, {seeds}{beside}.\n"
        f"Trained {cores}: {duration}. Then a table, what it says, a figure and a netCDF file in "
        f"{request.output}/."
    )


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.compare",
        description="What flows buy in a VAE: four VAEs over several seeds, and why.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="MNIST or Fashion-MNIST: an npz file, an idx file or a folder of them (without: the digits)",
    )
    parser.add_argument("--output", default="output", help="folder of figure and netCDF file")
    parser.add_argument(
        "--seeds", type=int, help="trainings of every model (default: 3, of MNIST 2)"
    )
    parser.add_argument(
        "--processes", type=int, help="models trained at a time (default: 2, or 1 on one core)"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a rehearsal of seconds on few rows; the numbers mean nothing",
    )
    return parser
