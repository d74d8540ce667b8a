r"""A Bayesian factor model of the handwritten digits: a few non-negative factors for every image.

    loadings ~ N(0, 1/2)^(64 x K),   offset ~ N(0, 1)^64,   noise_j ~ LogNormal(-1.5, 0.5)
    z_i ~ Exponential(1)^K,   x_i ~ N(offset + loadings z_i, noise)

of 8 x 8 pixels between 0 and 1. The posterior of an image's factors is a normal cut off at zero in many directions,
which no mean-field normal follows. Two guides learn it from minibatches: ``AmortizedSplineFlow``, with an encoder and
one conditional flow for all images, and Pyro's ``AutoNormal``, with parameters of its own for every image. Only the
first can say anything of images that it has not seen.

    python -m models.factor
    python -m models.factor --factors 4 --steps 1000

Printed are bounds of the log-density per image, in nats: of the training images with everything (ELBO divided by their
number), and of the test images given draws of loadings, offset and noise.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_mean
from torch import Tensor, nn

from models.data import digits
from pyro_flowkit.guides import AmortizedSplineFlow
from pyro_flowkit.training import fit

PIXELS = 64
LEVELS = 16.0
FAST_STEPS = 10
FAST_ROWS = 200


@dataclass(frozen=True)
class FactorResult:
    """What ``main`` returns, in nats per image.

    Attributes:
        amortised: ELBO of the training images with ``AmortizedSplineFlow``.
        auto_normal: the same with ``AutoNormal``.
        heldout: bound of the test images, by ``AmortizedSplineFlow`` and importance weighting.
    """

    amortised: float
    auto_normal: float
    heldout: float


def make_model(size: int, factors: int) -> Callable[[Tensor, Tensor], None]:
    """The model of ``size`` images, for rows ``x`` with numbers ``rows``."""

    def model(x: Tensor, rows: Tensor) -> None:
        shape = (PIXELS, factors)
        loadings = pyro.sample("loadings", dist.Normal(x.new_zeros(shape), 0.5**0.5).to_event(2))
        offset = pyro.sample("offset", dist.Normal(x.new_zeros(PIXELS), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(x.new_full((PIXELS,), -1.5), 0.5).to_event(1))
        with pyro.plate("image", max(size, len(x)), subsample=rows):
            z = pyro.sample("z", dist.Exponential(x.new_ones(factors)).to_event(1))
            mean = offset + (loadings @ z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)

    return model


class Encoder(nn.Module):
    """Features of an image."""

    def __init__(self, features: int = 32):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(PIXELS, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, features),
        )

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.network(x)


def amortised_guide(model: Callable[..., None]) -> AmortizedSplineFlow:
    """The guide with an encoder; the 640 global latents need no more than a mean-field normal of their own."""
    overall = AutoNormal(poutine.block(model, hide=["z"]), init_loc_fn=init_to_mean)
    return AmortizedSplineFlow(
        model, Encoder(), context_dim=32, global_guide=overall, init_loc_fn=init_to_mean
    )


def normal_guide(model: Callable[..., None], size: int) -> AutoNormal:
    """Pyro's guide, with the rows that each minibatch is given."""

    def create_plates(x: Tensor, rows: Tensor) -> pyro.plate:
        return pyro.plate("image", size, subsample=rows)

    return AutoNormal(model, init_loc_fn=init_to_mean, create_plates=create_plates)


@torch.no_grad()
def heldout_bound(model: Callable[..., None], guide: Any, x: Tensor, particles: int) -> float:
    """Importance-weighted bound of log p(x_i) given draws of the global latents, mean over images (nats)."""
    rows = torch.arange(len(x))
    weights = []
    for _ in range(particles):
        guide_trace = poutine.trace(guide).get_trace(x, rows)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, rows)
        weights.append(_local_log_prob(model_trace) - _local_log_prob(guide_trace))
    log_weights = torch.stack(weights)
    return float((log_weights.logsumexp(0) - torch.tensor(float(particles)).log()).mean())


def _local_log_prob(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    sites = [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and any(f.name == "image" for f in site["cond_indep_stack"])
    ]
    return sum(site["unscaled_log_prob"] for site in sites)


def main(argv: Sequence[str] | None = None) -> FactorResult:
    """Train both guides, print their bounds."""
    args = _parser().parse_args(argv)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    dataset = digits()
    train, test = dataset.train / LEVELS, dataset.test / LEVELS
    if args.fast:
        train, test = train[:FAST_ROWS], test[:50]
    model = make_model(len(train), args.factors)
    rows = torch.arange(len(train))
    guides = {
        "AmortizedSplineFlow": amortised_guide(model),
        "AutoNormal": normal_guide(model, len(train)),
    }
    print(f"{args.factors} factors, {len(train)} training images; nats per image")
    elbos = {}
    for name, guide in guides.items():
        guide(train, rows)  # parameters for every image, not for those of the first minibatch
        result = fit(
            model,
            guide,
            data=(train, rows),
            batch_size=128,
            num_particles=1,
            max_steps=FAST_STEPS if args.fast else args.steps,
            lr=args.lr,
            scheduler="cosine",
            seed=args.seed,
            progress=sys.stderr.isatty() and not args.fast,
        )
        with torch.no_grad():
            draws = 2 if args.fast else 50
            elbo = -Trace_ELBO(num_particles=draws).loss(model, guide, train, rows)
        elbos[name] = elbo / len(train)
        seconds = result.history["seconds"][-1]
        print(f"{name:<20} ELBO, training images {elbos[name]:8.2f}   ({seconds:.0f} s)")
    amortised = guides["AmortizedSplineFlow"]
    heldout = heldout_bound(model, amortised, test, 10 if args.fast else 100)
    print(f"{'AmortizedSplineFlow':<20} bound, test images    {heldout:8.2f}")
    return FactorResult(elbos["AmortizedSplineFlow"], elbos["AutoNormal"], heldout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.factor",
        description="A Bayesian factor model of the digits: amortised spline flows beside AutoNormal.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--factors", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each guide")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fast", action="store_true", help="a few steps on a few images, to try it"
    )
    return parser


if __name__ == "__main__":
    main()
