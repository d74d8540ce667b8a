"""The command line of ``python -m models.vae``."""

import argparse

from models.vae.data import BINARISATIONS
from models.vae.model import LIKELIHOODS, NETWORKS, POSTERIORS, PRIORS
from models.vae.training import LR, STEPS


def parser() -> argparse.ArgumentParser:
    """All options, by the room that reads them."""
    made = argparse.ArgumentParser(
        prog="python -m models.vae",
        description="A VAE with a standard or flow prior and a normal or flow posterior.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_data(made.add_argument_group("data"))
    _add_model(made.add_argument_group("model"))
    _add_training(made.add_argument_group("training"))
    _add_report(made.add_argument_group("evaluation and files"))
    return made


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="digits (the default), a table's name, a csv, npy, npz or idx file, or a folder of idx files",
    )
    group.add_argument(
        "--key", help="array of an npz file; x_train and x_test are found by themselves"
    )
    group.add_argument(
        "--binarise",
        choices=BINARISATIONS,
        default="auto",
        help="grey pixels to binary ones; auto: dynamic for images that are nearly black and white",
    )
    group.add_argument(
        "--likelihood",
        choices=("auto", *LIKELIHOODS),
        default="auto",
        help="auto: bernoulli for binary pixels, logistic (discretised) for grey ones, else normal",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prior",
        choices=PRIORS,
        default="standard",
        help="continuous: with --two-stage, by flow matching; its bounds are slow, choose few particles",
    )
    group.add_argument("--posterior", choices=POSTERIORS, default="normal")
    group.add_argument("--latent-dim", type=int, default=32)
    group.add_argument("--networks", choices=NETWORKS, default="mlp")
    group.add_argument("--hidden", type=int, nargs="+", default=[256, 256], metavar="WIDTH")
    group.add_argument("--channels", type=int, default=16, help="of the first stage of conv")
    group.add_argument("--couplings", type=int, default=2, help="of each flow")
    group.add_argument("--flow-hidden", type=int, nargs="+", default=[64, 64], metavar="WIDTH")
    group.add_argument("--bins", type=int, default=8, help="of the flows' splines")
    group.add_argument("--context-dim", type=int, default=64, help="of a flow posterior")
    group.add_argument(
        "--path-gradient",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of the posterior, normal or flow (Roeder et al. 2017)",
    )
    group.add_argument("--dropout", type=float, default=0.0, help="in encoder and decoder")
    group.add_argument("--prior-dropout", type=float, default=0.0)


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps",
        type=int,
        help=f"number of steps (default: {STEPS}, with --max-seconds as many as it allows)",
    )
    group.add_argument(
        "--max-seconds", type=float, help="of wall-clock time; the learning rate falls by then"
    )
    group.add_argument("--batch-size", type=int, default=128)
    group.add_argument("--lr", type=float, default=LR)
    group.add_argument(
        "--kl-warm-up",
        type=float,
        metavar="SHARE",
        help="share of the training over which the weight of the KL rises to 1 (default: 0.9, at most five passes "
        "through the data; of the time alone 0.1; none with --start-from)",
    )
    group.add_argument(
        "--free-bits", type=float, default=0.0, metavar="NATS", help="KL that costs nothing"
    )
    group.add_argument(
        "--average", type=float, metavar="DECAY", help="keep a moving average of the parameters"
    )
    group.add_argument(
        "--start-from", metavar="PATH", help="a saved VAE, whose networks and flows are taken over"
    )
    group.add_argument(
        "--two-stage",
        type=int,
        default=0,
        metavar="STEPS",
        help="train with the standard prior, then a flow prior alone on the codes, for so many steps",
    )
    group.add_argument(
        "--refine-encoder",
        type=int,
        default=0,
        metavar="STEPS",
        help="at the end tune the encoder on the model's own samples",
    )
    group.add_argument("--checkpoints", metavar="FOLDER", help="where checkpoints are written")
    group.add_argument("--checkpoint-every", type=float, default=600.0, metavar="SECONDS")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--fast", action="store_true", help="a few steps on a few rows, to try it")


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save", metavar="PATH", help="write the trained VAE")
    group.add_argument("--evaluate", metavar="PATH", help="a saved VAE: no training, only bounds")
    group.add_argument(
        "--eval-rows", type=int, default=500, help="test rows for the ladder of bounds"
    )
    group.add_argument("--num-samples", type=int, default=1000, help="importance draws per datum")
    group.add_argument(
        "--gaps", type=int, default=0, metavar="ROWS", help="test rows whose gap is split"
    )
    group.add_argument(
        "--pictures",
        metavar="FOLDER",
        help="draw samples, reconstructions, interpolations and the ladder of bounds",
    )
