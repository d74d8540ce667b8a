"""From the command line to a trained VAE and its bounds."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import xarray as xr

from models.vae import report, storage
from models.vae.data import Prepared, prepare
from models.vae.model import VAE
from models.vae.options import parser
from models.vae.training import STEPS, refine_encoder, train, train_prior
from pyro_flowkit.training import FitResult

FAST_STEPS = 20
WARM_UP_SHARE = 0.9
WARM_UP_EPOCHS = 5
WARM_UP_TIME = 0.1


def main(argv: Sequence[str] | None = None) -> xr.Dataset:
    """Trains a VAE, or loads one, and prints its bounds on the test data; returns these per datum."""
    made = parser()
    args = made.parse_args(argv)
    if args.two_stage and args.prior == "standard":
        made.error("expected --prior flow for --two-stage, or another flow, got --prior standard")
    if args.resume and args.checkpoints is None:
        made.error("expected --checkpoints FOLDER for --resume, got none")
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    if args.evaluate:
        stored = storage.load(args.evaluate)
        data = _data_settings(args, stored.data)
        prepared = _prepared(args, data, stored.settings["likelihood"])
        vae, settings = stored.build(), stored.settings
        report.heading(settings, prepared)
    else:
        data = _data_settings(args, {})
        prepared = prepared_data(args)
        settings = vae_settings(args, prepared)
        report.heading(settings, prepared)
        vae = _trained(args, settings, prepared)
    if args.save:
        storage.save(args.save, vae, settings, data)
    bounds = report.bounds(vae, prepared, args)
    if args.gaps:
        report.gaps(vae, prepared, args)
    if args.pictures:
        report.pictures(vae, prepared, bounds, Path(args.pictures))
    return bounds


def _data_settings(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Which data, and how they are binarised; what the command line leaves open is as it was stored."""
    binarisation = stored.get("binarisation", "auto") if args.binarise == "auto" else args.binarise
    return {
        "name": args.data or stored.get("name", "digits"),
        "key": args.key or stored.get("key"),
        "binarisation": binarisation,
    }


def prepared_data(args: argparse.Namespace) -> Prepared:
    """The data that the command line names."""
    return _prepared(args, _data_settings(args, {}), args.likelihood)


def _prepared(args: argparse.Namespace, data: dict[str, Any], likelihood: str) -> Prepared:
    return prepare(
        **data, likelihood=likelihood, batch_size=args.batch_size, seed=args.seed, fast=args.fast
    )


def vae_settings(args: argparse.Namespace, prepared: Prepared) -> dict[str, Any]:
    """The arguments of the VAE."""
    return {
        "input_dim": prepared.test.shape[-1],
        "data_size": prepared.data_size,
        "latent_dim": args.latent_dim,
        "hidden_dims": list(args.hidden),
        "prior": args.prior,
        "posterior": args.posterior,
        "likelihood": prepared.likelihood,
        "levels": prepared.levels,
        "num_transforms": args.couplings,
        "flow_hidden_dims": list(args.flow_hidden),
        "count_bins": args.bins,
        "context_dim": args.context_dim,
        "path_gradient": args.path_gradient,
        "networks": args.networks,
        "image_shape": prepared.image_shape,
        "channels": args.channels,
        "dropout": args.dropout,
        "prior_dropout": args.prior_dropout,
    }


def _trained(args: argparse.Namespace, settings: dict[str, Any], prepared: Prepared) -> VAE:
    """The VAE after all stages of its training."""
    quiet = {"seed": args.seed, "progress": sys.stderr.isatty() and not args.fast}
    vae = VAE(**settings).standardize(prepared.reference, prepared.standardization)
    if args.start_from:
        storage.start_from(vae, storage.load(args.start_from).build("start"))
    trains = args.steps != 0
    if trains:
        report.warm_up(_warm_up(args, prepared))
    if args.two_stage:
        plain = VAE(**{**settings, "prior": "standard", "name": "plain"})
        plain.load_state_dict({name: vae.state_dict()[name] for name in plain.state_dict()})
        if trains:
            _stage(args, "standard prior", lambda: fitted(args, plain, prepared, quiet))
        storage.start_from(vae, plain)
        steps = FAST_STEPS if args.fast else args.two_stage
        _stage(
            args,
            "prior on frozen codes",
            lambda: train_prior(
                vae, prepared.batches, prepared.val, steps=steps, lr=args.lr, **quiet
            ),
        )
    elif trains:
        _stage(args, "training", lambda: fitted(args, vae, prepared, quiet))
    if args.refine_encoder:
        steps = FAST_STEPS if args.fast else args.refine_encoder
        _stage(
            args,
            "encoder on the model's samples",
            lambda: refine_encoder(
                vae, prepared.val, steps=steps, batch_size=args.batch_size, **quiet
            ),
        )
    return vae.eval()


def fitted(
    args: argparse.Namespace, vae: VAE, prepared: Prepared, quiet: dict[str, Any]
) -> FitResult:
    """Trains a VAE by the ELBO for the steps, at the rate and with the warm-up that the command line says."""
    return train(
        vae,
        prepared.batches,
        prepared.val,
        steps=_steps(args),
        lr=args.lr,
        kl_warm_up=_warm_up(args, prepared),
        free_bits=args.free_bits,
        average=args.average,
        max_seconds=args.max_seconds,
        checkpoint_dir=args.checkpoints,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        **quiet,
    )


def _steps(args: argparse.Namespace) -> int | None:
    """The number of steps; None for as many as the time allows."""
    if args.fast:
        return FAST_STEPS
    if args.steps is not None:
        return args.steps
    return None if args.max_seconds else STEPS


def _warm_up(args: argparse.Namespace, prepared: Prepared) -> float:
    """The share of the training over which the weight of the KL rises."""
    if args.kl_warm_up is not None:
        return args.kl_warm_up
    if args.start_from:
        return 0.0
    return warm_up_share(prepared, _steps(args))


def warm_up_share(prepared: Prepared, steps: int | None) -> float:
    """The share of so many steps, or of the time, over which the weight of the KL rises where nobody says.

    While it is low the decoder learns fast what codes can be good for. A model that has seen its data often has learnt
    it anyway, and overfits by the time the bound is the true one.
    """
    if steps is None:
        return WARM_UP_TIME
    return min(WARM_UP_SHARE, WARM_UP_EPOCHS * prepared.batches.per_epoch / steps)


def _stage(args: argparse.Namespace, name: str, fitted: Any) -> None:
    began = time.process_time()
    result = fitted()
    report.stage(name, result, time.process_time() - began)
