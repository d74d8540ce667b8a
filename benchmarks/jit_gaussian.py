"""AutoSplineFlow under JitTrace_ELBO on a Gaussian of three correlated latents, whose exact ELBO is 0 nats.

A trace never calls the guide again: what its gradient is has to be chosen by operations inside of it, and the rate is
the user's. 500 steps of Adam, the rate falling from .05 to .0005, 100 particles.

    python -m benchmarks.jit_gaussian
"""

import argparse
import math
import warnings
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit.guides import AutoSplineFlow

LOC = (1.0, -2.0, 3.0)
SCALE = ((1.0, 0.0, 0.0), (0.8, 0.5, 0.0), (-0.6, 0.3, 2.0))
LR, LAST_LR, STEPS, PARTICLES, DRAWS = 0.05, 5e-4, 500, 100, 10_000


def model() -> None:
    pyro.sample("z", dist.MultivariateNormal(torch.tensor(LOC), scale_tril=torch.tensor(SCALE)))


def elbo_after_training(kind: type[Trace_ELBO], seed: int) -> float:
    """ELBO in nats by 10,000 draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoSplineFlow(model)
    optimizer = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LR},
            "gamma": (LAST_LR / LR) ** (1.0 / STEPS),
        }
    )
    objective = kind(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, optimizer, objective)
    for _ in range(STEPS):
        svi.step()
        optimizer.step()
    with torch.no_grad():
        judge = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True, max_plate_nesting=0)
        return -judge.loss(model, guide)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    warnings.simplefilter("ignore")  # torch.jit's, of what it traces
    rows = []
    for kind in (JitTrace_ELBO, Trace_ELBO):
        elbos = [elbo_after_training(kind, seed) for seed in range(args.seeds)]
        worst, mean = min(elbos), math.fsum(elbos) / len(elbos)
        print(f"{kind.__name__}: worst {worst:.4f}, mean {mean:.4f} of {args.seeds}", flush=True)
        rows.append([kind.__name__, f"{worst:.4f}", f"{mean:.4f}", str(args.seeds)])
    report = Report("AutoSplineFlow on an exact Gaussian, traced and not")
    report.add(
        f"ELBO in nats by {DRAWS:,} draws; the exact one is 0. {STEPS} steps of Adam, the rate falling from {LR} to "
        f"{LAST_LR}, {PARTICLES} particles.",
        "",
        *table(["objective", "worst", "mean", "seeds"], rows),
    )
    report.save(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jit_gaussian")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", default=str(RESULTS / "jit_gaussian.md"), metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
