"""The main job: densities with exact log p and VAEs with bounds, side by side on real digits.

Six models of the 1,797 8x8 digits of scikit-learn: a full-covariance Gaussian as the floor, a spline
flow, and four VAEs (standard or flow prior, normal or flow posterior). All are scored on the same
test images and the same scale: pixels have the 17 levels 0 to 16 and uniform noise on top, x + u,
so a log-density in nats is on average over u a lower bound of the log-probability of the integers.

    python -m models.compare

prints the table and what it shows, and saves a figure and a netCDF file that ArviZ opens.
"""

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import xarray as xr

from models._compare_figure import draw
from models._compare_jobs import (
    JOBS,
    Outcome,
    Settings,
    available_cores,
    digits,
    in_order,
    run_all,
)
from models._compare_report import sentences, table_frame, table_rows, table_text
from models.data import Dataset


@dataclass(frozen=True)
class Comparison:
    """What `main` returns.

    Attributes:
        table: the printed table, index (name, quantity).
        text: the three sentences.
        scores: test scores by model.
        figure: path of the figure.
        netcdf: path of the netCDF file.
    """

    table: pd.DataFrame
    text: list[str]
    scores: dict[str, xr.Dataset]
    figure: Path
    netcdf: Path


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Train, score, print and save."""
    args = _parser().parse_args(argv)
    settings = Settings(seed=args.seed, fast=args.fast)
    processes = args.processes or (1 if args.fast else min(2, available_cores()))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    dataset = digits(settings)
    print(
        f"Training {len(JOBS)} models on the digits ({len(dataset.train)} noisy training rows, "
        f"{len(dataset.val)} validation, {len(dataset.test)} test images), "
        f"{processes} at a time" + (" ..." if args.fast else ": a few minutes ...")
    )
    outcomes = _train(settings, processes)

    scores = {outcome.job.name: outcome.scores for outcome in outcomes}
    rows = table_rows(scores, {outcome.job.name: outcome.seconds for outcome in outcomes})
    text = sentences(scores)
    print(
        f"\nTest set, {len(dataset.test)} images; nats per image and bits per dimension of x + u on "
        f"the scale 0 to {dataset.levels}.\n"
        "s.e.: over test images; MC s.e.: its part that comes from the importance draws; gap: of the\n"
        "row's bound and the same model's ELBO; train s: wall-clock seconds.\n"
    )
    print(table_text(rows))
    print("\n" + "\n".join(textwrap.fill(sentence, 100) for sentence in text) + "\n")

    figure, netcdf = output / "compare.png", output / "compare.nc"
    draw(outcomes, dataset.test.numpy(), figure)
    tree(outcomes, dataset).to_netcdf(netcdf, engine="h5netcdf")
    print(f"Figure: {figure}\nArviZ data: {netcdf} (arviz.from_netcdf opens it)")
    return Comparison(table_frame(rows), text, scores, figure, netcdf)


def _train(settings: Settings, processes: int) -> list[Outcome]:
    start = time.perf_counter()
    outcomes = []
    for outcome in run_all(settings, processes=processes):
        outcomes.append(outcome)
        steps = len(outcome.history.get("step", ()))
        how = f"{steps} steps in {outcome.seconds:.0f} s" if steps else "closed form"
        seconds = time.perf_counter() - start
        print(
            f"[{len(outcomes)}/{len(JOBS)}, {seconds:.0f} s] {outcome.job.name}: {how}",
            file=sys.stderr,
            flush=True,
        )
    return in_order(outcomes)


def tree(outcomes: Sequence[Outcome], dataset: Dataset) -> xr.DataTree:
    """All numbers as a DataTree with flat groups.

    ``observed_data`` has the test images; a group per model has its scores per image; another,
    ``training_`` and the model's name, its objective per step and on the validation images.
    """
    pixels = xr.Dataset({"x": (("obs_id", "pixel"), dataset.test.numpy())})
    groups = {"observed_data": pixels.assign_coords(obs_id=range(len(dataset.test)))}
    for outcome in outcomes:
        groups[outcome.job.group] = outcome.scores.assign_attrs(
            model=outcome.job.name, training_seconds=outcome.seconds
        )
        if outcome.history:
            groups[f"training_{outcome.job.group}"] = _training(outcome)
    return xr.DataTree.from_dict(groups)


def _training(outcome: Outcome) -> xr.Dataset:
    history, validation = dict(outcome.history), outcome.validation
    coords = {"step": history.pop("step"), "validation_step": validation["step"]}
    curves = {key: ("step", values) for key, values in history.items()}
    curves |= {"validation_elbo": ("validation_step", validation["elbo"])}
    curves = xr.Dataset(curves, coords, {"model": outcome.job.name})
    for name in ("elbo", "validation_elbo"):
        curves[name].attrs["units"] = "nats per image"
    return curves


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.compare",
        description="Gaussian, spline flow and four VAEs on the digits: exact values and bounds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", default="output", help="folder of the figure and the netCDF file"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, help="models trained at a time (default: 2, or 1 on one core)"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a rehearsal of seconds on few rows; the numbers mean nothing",
    )
    return parser


if __name__ == "__main__":
    main()
