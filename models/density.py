r"""A spline flow as the density of data, by maximum likelihood.

The model is one Pyro site, and its log-density is exact, so there is no guide and no bound:

    with pyro.plate("data", len(x)):
        pyro.sample("x", flow(), obs=x)

    NLL = -(1/N) sum_i log p(x_i)          nats per datum, on rows that training never saw

    python -m models.density two-moons
    python -m models.density --table digits --hidden 128 128 --dropout 0.2 --steps 1000

2-D targets give fresh samples at every step. Images get uniform noise, x + u on the scale of their
integer levels, and bits per dimension, NLL / (D ln 2). Tables are scored as multiples of the
standard deviations of their training columns, the scale on which densities of tables are published.

Reference:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor, nn

from models import data
from models._prepare import FAST_ROWS, dequantized, load
from models.data import Dataset
from pyro_flowkit import SplineFlow
from pyro_flowkit.diagnostics import compare_densities, heldout_log_prob
from pyro_flowkit.training import FitResult, fit

FAST_STEPS = 20
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class DensityResult:
    """What ``main`` returns.

    Attributes:
        nll: mean -log p of the test rows (nats).
        nll_se: its standard error over the test rows.
        bits_per_dim: ``nll / (D ln 2)`` for images, None otherwise.
        gaussian_nll: that of the full-covariance Gaussian of the training rows.
        scores: exact log p per test row.
        flow: the trained flow.
        fit: the course of the training.
    """

    nll: float
    nll_se: float
    bits_per_dim: float | None
    gaussian_nll: float
    scores: xr.Dataset
    flow: SplineFlow
    fit: FitResult


class Density:
    """The Pyro model of independent rows with a flow as their distribution.

    Args:
        flow: the distribution of a row.
        data_size: number of training rows, which a minibatch stands for.
    """

    def __init__(self, flow: SplineFlow, data_size: int):
        self.flow, self.data_size = flow, data_size

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", max(self.data_size, len(x)), subsample=x):
            pyro.sample("x", self.flow(), obs=x)


def target_rows(name: str, *, steps: int, batch_size: int, seed: int) -> Dataset:
    """A 2-D target with so many training rows that one epoch lasts for all steps."""
    return data.target(name, sizes=(steps * batch_size, 2_000, 100_000), seed=seed)


def table_rows(dataset: Dataset, *, copies: int, seed: int) -> Dataset:
    """Images with noise; tables in units of the standard deviation of the training columns."""
    if dataset.levels is not None:
        return dequantized(dataset, copies=copies, seed=seed)
    mean, std = dataset.train.mean(0), dataset.train.std(0)
    constant = (std <= 0).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(f"Expected every column to vary, got constant columns {constant}")
    train, val, test = ((part - mean) / std for part in (dataset.train, dataset.val, dataset.test))
    return replace(dataset, train=train, val=val, test=test)


def gaussian(rows: Tensor) -> dist.MultivariateNormal:
    """The full-covariance Gaussian of maximum likelihood, in closed form, in float64.

    Raises:
        ValueError: if the rows' covariance is singular.
    """
    rows = rows.double()
    covariance = rows.mT.cov(correction=0)
    scale_tril, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise ValueError(
            f"Expected rows with a positive definite covariance, got a singular one of {len(rows)} "
            f"rows with {rows.shape[-1]} columns"
        )
    return dist.MultivariateNormal(rows.mean(0), scale_tril=scale_tril)


def main(argv: Sequence[str] | None = None) -> DensityResult:
    """Train a flow, print its held-out negative log-likelihood beside a Gaussian's."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.target is None) == (args.table is None):
        parser.error("expected a 2-D target or --table, got " + ("both" if args.table else "none"))
    steps = FAST_STEPS if args.fast else args.steps
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    if args.target:
        dataset = target_rows(args.target, steps=steps, batch_size=args.batch_size, seed=args.seed)
    else:
        loaded = load(
            args.table,
            key=args.key,
            min_distinct=args.min_distinct,
            rows=FAST_ROWS if args.fast else None,
        )
        copies = 1 if args.fast else args.copies
        dataset = table_rows(loaded, copies=copies, seed=args.seed)

    flow = SplineFlow(
        dataset.event_size,
        num_transforms=args.couplings,
        hidden_dims=args.hidden,
        count_bins=args.bins,
        bound=args.bound,
        mixing=None if args.mixing == "none" else args.mixing,
        activation=ACTIVATIONS[args.activation],
        residual=args.residual,
        dropout=args.dropout,
        seed=args.seed,
    )
    standardize = args.standardize or ("full" if args.table else "none")
    if standardize != "none":
        flow.standardize(dataset.train, standardize)
    result = fit(
        flow,
        data=dataset.train,
        val_data=dataset.val if args.table else None,
        max_steps=steps,
        batch_size=min(args.batch_size, len(dataset.train)),
        lr=args.lr,
        scheduler="cosine",
        clip_norm=args.clip_norm,
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.fast,
    )
    return _report(args, dataset, flow, result)


def _report(
    args: argparse.Namespace, dataset: Dataset, flow: SplineFlow, result: FitResult
) -> DensityResult:
    name = f"spline flow, {args.couplings} couplings"
    scores = heldout_log_prob(flow, dataset.test)
    floor = heldout_log_prob(gaussian(dataset.train), dataset.test.double())
    table = compare_densities({name: scores, "Gaussian": floor})
    own, other = table.loc[(name, "log p")], table.loc[("Gaussian", "log p")]
    is_image = dataset.levels is not None
    scale = "the target's own scale"
    if args.table:
        scale = "columns with standard deviation 1"
    if is_image:
        scale = f"x + u on the scale 0 to {dataset.levels}"
    print(
        f"{dataset.name}: {len(dataset.test)} held-out rows, D = {dataset.event_size}, {scale}; "
        f"{len(result.history['step'])} steps in {result.history['seconds'][-1]:.1f} s"
    )
    for label, row in ((name, own), ("full-covariance Gaussian", other)):
        bits = f", {row['bits_per_dim']:.3f} bits per dimension" if is_image else ""
        print(f"{label}: NLL {-row['nats']:.4f} nats (s.e. {row['se']:.4f}){bits}")
    if args.figure:
        draw(dataset, flow, result, Path(args.figure))
        print(f"Figure: {args.figure}")
    return DensityResult(
        nll=-float(own["nats"]),
        nll_se=float(own["se"]),
        bits_per_dim=float(own["bits_per_dim"]) if is_image else None,
        gaussian_nll=-float(other["nats"]),
        scores=scores,
        flow=flow,
        fit=result,
    )


def draw(dataset: Dataset, flow: SplineFlow, result: FitResult, path: Path) -> None:
    """Save a figure: data and draws in the first two dimensions, and the training curve."""
    from matplotlib.figure import Figure

    from pyro_flowkit.diagnostics import plot_elbo

    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = dataset.test[:2000]
    for ax, points, title in (
        (left, rows, f"{dataset.name}, held out"),
        (middle, flow.sample(len(rows)), "draws of the flow"),
    ):
        ax.scatter(points[:, 0], points[:, -1], s=2, color="black", alpha=0.4, linewidths=0)
        ax.set_title(title)
        ax.set_xlabel("first dimension")
        ax.set_ylabel("last dimension")
    middle.set_xlim(left.get_xlim())
    middle.set_ylim(left.get_ylim())
    plot_elbo(result, right)
    right.set_ylabel("log p per datum (nats)")
    right.set_title("training")
    figure.savefig(path, dpi=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.density",
        description="A spline flow as the exact density of a 2-D target, a table or images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("target", nargs="?", choices=tuple(data.TARGETS), help="a 2-D target")
    parser.add_argument("--table", metavar="NAME|PATH", help="digits, a table's name, or a file")
    parser.add_argument("--key", help="array to take from an npz file that holds several")
    parser.add_argument(
        "--min-distinct",
        type=float,
        default=0.05,
        help="leave out columns of a file with fewer distinct values than this share of its rows",
    )
    parser.add_argument("--couplings", type=int, default=6)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--bound", type=float, default=3.0)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 32], metavar="WIDTH")
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), default="relu")
    parser.add_argument("--mixing", choices=("lu", "permute", "none"), default="lu")
    parser.add_argument(
        "--residual", action="store_true", help="residual networks in the couplings"
    )
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--standardize",
        choices=("none", "diagonal", "full"),
        help="outermost layer, fitted to the data (default: full for tables, none for targets)",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip-norm", type=float, default=None)
    parser.add_argument(
        "--copies", type=int, default=16, help="noisy copies of each training image"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", metavar="PATH", help="save a picture of data and draws")
    parser.add_argument("--fast", action="store_true", help="a few steps on a few rows, to try it")
    return parser


if __name__ == "__main__":
    main()
