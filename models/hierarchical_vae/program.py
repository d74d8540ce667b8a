"""From the command line to a trained hierarchical VAE, and to a flat one beside it."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import pyro
import xarray as xr
from torch import nn

from models.hierarchical_vae import report
from models.hierarchical_vae.model import HierarchicalVAE
from models.vae.data import BINARISATIONS, Prepared, prepare
from models.vae.model import NETWORKS, VAE
from models.vae.program import FAST_STEPS, warm_up_share
from models.vae.report import FAST_SAMPLES, parts_of_gap, stage
from models.vae.training import LR, train

FREE_BITS = 3.0


def main(argv: Sequence[str] | None = None) -> xr.Dataset:
    """Trains a hierarchical VAE, and a flat one on request, and prints their bounds; returns the former's per datum."""
    args = _parser().parse_args(argv)
    prepared = prepare(
        args.data,
        key=args.key,
        binarisation=args.binarise,
        batch_size=args.batch_size,
        seed=args.seed,
        fast=args.fast,
    )
    settings = _settings(args, prepared)
    dims = [max(1, args.latent_dim // 2**level) for level in range(args.levels)]
    _seed(args.seed)
    vae = HierarchicalVAE(**settings, latent_dims=dims, hidden_dims=args.hidden)
    size = _count(vae)
    print(
        f"Hierarchical VAE, {' + '.join(map(str, dims))} latents, {size} parameters, {prepared.likelihood} likelihood, "
        f"on {prepared.data_size} training rows of {prepared.name}: {prepared.unit}"
    )
    _train(args, vae, prepared)
    samples = FAST_SAMPLES if args.fast else args.num_samples
    found = report.bounds(
        vae, prepared, num_rows=args.eval_rows, num_samples=samples, seed=args.seed
    )
    report.levels(vae, prepared, seed=args.seed)
    if args.gaps:
        options = {"num_steps": FAST_STEPS} if args.fast else {}
        parts_of_gap(
            vae, prepared, num_rows=args.gaps, num_samples=samples, seed=args.seed, **options
        )
    if args.compare_flat:
        settings.update(latent_dim=sum(dims), prior="flow", posterior="flow", name="flat_vae")
        widths = flat_widths(size, args.hidden, settings)
        _seed(args.seed)
        flat = VAE(**settings, hidden_dims=widths)
        print(f"Flat VAE, {sum(dims)} latents, {_count(flat)} parameters, hidden widths {widths}")
        _train(args, flat, prepared)
        of_flat = report.bounds(
            flat, prepared, num_rows=args.eval_rows, num_samples=samples, seed=args.seed
        )
        report.difference(found, of_flat)
    return found.bounds


def flat_widths(size: int, hidden_dims: Sequence[int], settings: dict[str, Any]) -> list[int]:
    """Widths of hidden layers, all by one factor, with which a flat VAE has about so many parameters.

    Args:
        size: the number of parameters.
        hidden_dims: the widths to multiply.
        settings: all other arguments of the VAE.
    """

    def widths(factor: float) -> list[int]:
        return [max(1, round(factor * width)) for width in hidden_dims]

    def excess(factor: float) -> int:
        return _count(VAE(**settings, hidden_dims=widths(factor))) - size

    low, high = 0.0, 8.0
    while widths(low) != widths(high) and high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return widths(min(low, high, key=lambda factor: abs(excess(factor))))


def _count(vae: nn.Module) -> int:
    return sum(parameter.numel() for parameter in vae.parameters())


def _seed(seed: int) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def _settings(args: argparse.Namespace, prepared: Prepared) -> dict[str, Any]:
    """The arguments that hierarchical and flat VAE have in common."""
    return {
        "input_dim": prepared.test.shape[-1],
        "data_size": prepared.data_size,
        "likelihood": prepared.likelihood,
        "levels": prepared.levels,
        "networks": args.networks,
        "image_shape": prepared.image_shape,
        "channels": args.channels,
        "num_transforms": args.couplings,
        "flow_hidden_dims": args.flow_hidden,
        "context_dim": args.context_dim,
        "count_bins": args.bins,
        "path_gradient": args.path_gradient,
        "dropout": args.dropout,
    }


def _train(args: argparse.Namespace, vae: HierarchicalVAE | VAE, prepared: Prepared) -> None:
    vae.standardize(prepared.reference, prepared.standardization)
    began = time.process_time()
    steps = FAST_STEPS if args.fast else args.steps
    share = warm_up_share(prepared, steps)
    result = train(
        vae,
        prepared.batches,
        prepared.val,
        steps=steps,
        lr=args.lr,
        kl_warm_up=share if args.kl_warm_up is None else args.kl_warm_up,
        free_bits=args.free_bits,
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.fast,
    )
    stage("training", result, time.process_time() - began)
    vae.eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.hierarchical_vae",
        description="A VAE with levels of latents and flows between them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", metavar="NAME|PATH", help="as python -m models.vae has it")
    add("--key", help="array of an npz file; x_train and x_test are found by themselves")
    add("--binarise", choices=BINARISATIONS, default="auto")
    add("--levels", type=int, default=2, help="of latents")
    add(
        "--latent-dim",
        type=int,
        default=32,
        help="of the lowest level; each has half of the one below",
    )
    add("--networks", choices=NETWORKS, default="mlp", help="between data and the lowest level")
    add("--hidden", type=int, nargs="+", default=[256, 256], metavar="WIDTH")
    add("--channels", type=int, default=16, help="of the first stage of conv")
    add("--couplings", type=int, default=2, help="of each flow")
    add("--flow-hidden", type=int, nargs="+", default=[64, 64], metavar="WIDTH")
    add("--bins", type=int, default=8, help="of the flows' splines")
    add("--context-dim", type=int, default=64, help="of conditional flows")
    add(
        "--path-gradient",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of the posterior (Roeder et al. 2017)",
    )
    add("--dropout", type=float, default=0.0, help="in encoder and decoder")
    add("--steps", type=int, default=3000)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=LR)
    add(
        "--kl-warm-up",
        type=float,
        metavar="SHARE",
        help="of the training, over which the weight of the KL rises to 1 (default: as python -m models.vae)",
    )
    add(
        "--free-bits",
        type=float,
        default=FREE_BITS,
        metavar="NATS",
        help="KL of each level that costs nothing: without them the upper levels are never used",
    )
    add("--seed", type=int, default=0)
    add("--fast", action="store_true", help="a few steps on a few rows, to try it")
    add("--eval-rows", type=int, default=500, help="test rows for the ladder of bounds")
    add("--num-samples", type=int, default=1000, help="importance draws per datum")
    add("--gaps", type=int, default=0, metavar="ROWS", help="test rows whose gap is split")
    add("--compare-flat", action="store_true", help="train a flat VAE of as many parameters, too")
    return parser
