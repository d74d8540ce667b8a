"""From the command line to a trained diffusion, its ELBOs, its exact density, and other flows beside it."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pyro
import torch
import xarray as xr
from torch import Tensor, nn

from models import data, density
from models._prepare import FAST_ROWS, load
from models.data import Dataset
from models.diffusion import report
from models.diffusion.bounds import STRETCHES, Terms, elbo_terms
from models.diffusion.model import AngleField, Diffusion, StraightFlow
from pyro_flowkit import ContinuousFlow, SplineFlow
from pyro_flowkit.diagnostics import heldout_log_prob, pointwise_bounds
from pyro_flowkit.training import fit

FAST_STEPS = 20
SCALE_ROWS = 1000
DRAWS = 800


@dataclass(frozen=True)
class Recipe:
    """What suits the data.

    Attributes:
        hidden: widths of the network.
        dropout: of the network.
        steps: of the trainings by matching.
        batch_size: of all trainings.
        least_width: below which no column counts as narrower: one that hardly ever varies would have values of many
            standard deviations where it does, far from all that the network has seen.
        spline: arguments of the spline flow.
        spline_steps: of its training.
        rows: test rows.
        num_steps: of the solver.
    """

    hidden: tuple[int, ...]
    dropout: float
    steps: int
    batch_size: int
    least_width: float
    spline: dict[str, object]
    spline_steps: int
    rows: int
    num_steps: int


DIGITS = Recipe(
    hidden=(256, 256),
    dropout=0.5,
    steps=4000,
    batch_size=128,
    least_width=2.0,
    spline={"num_transforms": 4, "hidden_dims": [128, 128], "dropout": 0.2},
    spline_steps=800,
    rows=179,
    num_steps=10,
)
POINTS = Recipe(
    hidden=(64, 64),
    dropout=0.0,
    steps=6000,
    batch_size=256,
    least_width=0.0,
    spline={"num_transforms": 6, "hidden_dims": [64, 64], "bound": 4.0},
    spline_steps=1500,
    rows=2000,
    num_steps=32,
)


@dataclass(frozen=True)
class Result:
    """What ``main`` returns.

    Attributes:
        diffusion: the trained one.
        scores: of every model and quantity, per test row.
        terms: of the ELBO with so many levels (None: the limit), by the number and whether the scales were fitted.
        table: as it was printed.
    """

    diffusion: Diffusion
    scores: dict[str, xr.Dataset]
    terms: dict[tuple[int | None, bool], Terms]
    table: pd.DataFrame


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains a diffusion and two flows, and prints their log-densities and bounds on the same test rows."""
    args = _parser().parse_args(argv)
    recipe = _recipe(args)
    dataset = _rows(args, recipe)
    test = dataset.test[: recipe.rows]
    print(
        f"{dataset.name}: {len(test)} held-out rows, D = {dataset.event_size}"
        + (f", x + u on the scale 0 to {dataset.levels}" if dataset.levels else "")
    )
    size = dataset.event_size

    def network() -> AngleField:
        return AngleField(size, recipe.hidden, dropout=recipe.dropout)

    diffusion = _trained(
        "diffusion",
        args,
        recipe,
        dataset,
        lambda: Diffusion(
            size, network(), num_steps=recipe.num_steps, small_angles=args.small_angles
        ),
    )
    assert isinstance(diffusion, Diffusion)
    diffusion.fit_scales(dataset.val[:SCALE_ROWS])
    scores = {report.ITS_FLOW: heldout_log_prob(diffusion, test)}
    terms = _terms(args, diffusion, test)
    scores |= {report.name_of(*key): found.dataset(size) for key, found in terms.items()}
    chain = min(args.levels)
    scores[report.chain_name(chain)] = pointwise_bounds(
        diffusion.model,
        diffusion.guide,
        test,
        args=(chain,),
        num_samples=30 if args.fast else 100,
        seed=args.seed,
    )
    if not args.alone:
        flow = _trained(
            report.MATCHED,
            args,
            recipe,
            dataset,
            lambda: ContinuousFlow(
                size, velocity=StraightFlow(network()), num_steps=recipe.num_steps
            ),
        )
        scores[report.MATCHED] = heldout_log_prob(flow, test)
        scores[report.SPLINE] = heldout_log_prob(_spline_flow(args, recipe, dataset), test)
        scores[report.GAUSSIAN] = heldout_log_prob(density.gaussian(dataset.train), test.double())
    table = report.table(scores, size if dataset.levels else None)
    report.show(table)
    if args.figure:
        from models.diffusion.figure import draw

        draw(diffusion, dataset, terms, scores, Path(args.figure))
        print(f"Figure: {args.figure}")
    return Result(diffusion, scores, terms, table)


def _terms(
    args: argparse.Namespace, diffusion: Diffusion, test: Tensor
) -> dict[tuple[int | None, bool], Terms]:
    """Of all ELBOs, by the number of levels (None: the limit) and whether the steps' scales are fitted."""
    terms = {}
    for levels in (*args.levels, None):
        draws = max(2, DRAWS // (levels or STRETCHES))
        for fitted in (True, False) if levels else (True,):
            terms[levels, fitted] = elbo_terms(
                diffusion, test, levels, fitted_scales=fitted, draws=draws
            )
    return terms


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = DIGITS if args.data == "digits" else POINTS
    names = ("hidden", "dropout", "steps")
    changed = {name: value for name in names if (value := getattr(args, name)) is not None}
    recipe = replace(recipe, **changed)
    if not args.fast:
        return recipe
    few = {"steps": FAST_STEPS, "spline_steps": FAST_STEPS, "rows": 20, "num_steps": 2}
    return replace(recipe, hidden=(16, 16), **few)


def _rows(args: argparse.Namespace, recipe: Recipe) -> Dataset:
    if args.data != "digits":
        return density.target_rows(
            args.data, steps=recipe.steps, batch_size=recipe.batch_size, seed=args.seed
        )
    rows = FAST_ROWS if args.fast else None
    copies = 1 if args.fast else args.copies
    return density.table_rows(load("digits", rows=rows), copies=copies, seed=args.seed)


def _trained(
    name: str,
    args: argparse.Namespace,
    recipe: Recipe,
    dataset: Dataset,
    construct: Callable[[], ContinuousFlow],
) -> ContinuousFlow:
    """A flow after its training by matching."""
    _seed(args.seed)
    widened = dataset.train + recipe.least_width * torch.randn_like(dataset.train)
    flow = construct().standardize(widened)
    began = time.process_time()
    fit(
        flow,
        data=dataset.train,
        max_steps=recipe.steps,
        batch_size=min(recipe.batch_size, len(dataset.train)),
        lr=args.lr,
        scheduler="cosine",
        clip_norm=10.0,
        average=0.999,
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.fast,
    )
    print(f"{name}: {recipe.steps} steps in {time.process_time() - began:.0f} CPU s", flush=True)
    return flow.eval()


def _spline_flow(args: argparse.Namespace, recipe: Recipe, dataset: Dataset) -> nn.Module:
    _seed(args.seed)
    flow = SplineFlow(dataset.event_size, seed=args.seed, **recipe.spline)
    flow.standardize(dataset.train, "full")
    began = time.process_time()
    fit(
        flow,
        data=dataset.train,
        val_data=None if args.fast else dataset.val,
        max_steps=recipe.spline_steps,
        batch_size=min(256, len(dataset.train)),
        lr=3e-3,
        scheduler="cosine",
        clip_norm=10.0,
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.fast,
    )
    print(
        f"{report.SPLINE}: {recipe.spline_steps} steps in {time.process_time() - began:.0f} CPU s"
    )
    return flow.eval()


def _seed(seed: int) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.diffusion",
        description="A diffusion as a hierarchical VAE and as a flow: ELBOs and exact log-densities of one network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", nargs="?", default="digits", choices=("digits", *data.TARGETS))
    add("--levels", type=int, nargs="+", default=[10, 100, 1000], help="of the hierarchical VAEs")
    add("--hidden", type=int, nargs="+", metavar="WIDTH", help="(default: as the data want it)")
    add("--dropout", type=float, help="(default: as the data want it)")
    add("--steps", type=int, help="of the matching (default: as the data want it)")
    add("--lr", type=float, default=2e-3)
    add("--copies", type=int, default=16, help="noisy copies of each training image")
    add(
        "--small-angles",
        action="store_true",
        help="train the diffusion for its bound: small angles more often",
    )
    add("--alone", action="store_true", help="without the other flows")
    add("--seed", type=int, default=0)
    add("--figure", metavar="PATH", help="save a picture of the flow and of the ladder of bounds")
    add("--fast", action="store_true", help="a few steps on a few rows, to try it")
    return parser
