"""AutoSplineFlow where a Gaussian is nearly enough: it must not lose there what it gains elsewhere.

Ten regressions with 2 to 30 coefficients, some of them badly scaled (predictors in the thousands, an intercept far
away). The best full-rank Gaussian is found without noise, by L-BFGS on fixed draws; the flow trains by its own recipe.
ELBOs on the same 20,000 quasi-random draws of the base, so that their difference is precise.

    python -m benchmarks.near_gaussian
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.ops.quasi_random import normal_draws


class Regression(NamedTuple):
    """A Pyro model and its arguments."""

    model: Callable[..., None]
    args: tuple[Any, ...]


def _predictors(rows: int, columns: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    truth = torch.randn(columns, generator=generator, dtype=torch.float64)
    return scale * x + shift, noise, truth


def linear_model(x: Tensor, y: Tensor) -> None:
    """Coefficients, intercept and noise of a linear regression."""
    alpha = pyro.sample("alpha", dist.Normal(x.new_zeros(()), 1000.0))
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
    mean = alpha[..., None] + beta @ x.mT
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def logistic_model(x: Tensor, y: Tensor, prior_scale: float) -> None:
    """Coefficients of a logistic regression."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), prior_scale).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)


def poisson_model(x: Tensor, y: Tensor) -> None:
    """Coefficients and intercept of a Poisson regression."""
    alpha = pyro.sample("alpha", dist.Normal(x.new_zeros(()), 5.0))
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    rate = (alpha[..., None] + beta @ x.mT).exp()
    pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def linear(
    rows: int, columns: int, *, scale: float = 1.0, shift: float = 0.0, intercept: float = 0.0
) -> Regression:
    x, noise, truth = _predictors(rows, columns, columns, scale, shift)
    return Regression(linear_model, (x, intercept + x @ (truth / scale) + noise))


def logistic(rows: int, columns: int, *, scale: float = 1.0) -> Regression:
    x, noise, truth = _predictors(rows, columns, 100 + columns, scale)
    return Regression(logistic_model, (x, (x @ truth / scale + noise > 0).double(), 3.0 / scale))


def poisson(rows: int, columns: int, *, scale: float = 1.0) -> Regression:
    x, _, truth = _predictors(rows, columns, 200 + columns, scale)
    return Regression(poisson_model, (x, (1.0 + 0.3 * x @ truth / scale).exp().round()))


MODELS: dict[str, Regression] = {
    "linear, 2 predictors": linear(50, 2),
    "linear, 8 predictors": linear(100, 8),
    "linear, 28 predictors": linear(200, 28),
    "linear, predictors in the thousands": linear(80, 3, scale=2000.0),
    "linear, intercept at 500": linear(80, 3, intercept=500.0),
    "linear, predictors around 300": linear(80, 4, shift=300.0),
    "logistic, 2 coefficients": logistic(60, 2),
    "logistic, 15 coefficients, predictors of 100": logistic(300, 15, scale=100.0),
    "logistic, 30 coefficients": logistic(500, 30),
    "Poisson, 6 predictors": poisson(100, 6),
}


def _elbo(guide: AutoSplineFlow, density: LatentDensity, draws: Tensor) -> Tensor:
    """log p - log q at draws of the base, whatever the guide is now."""
    with torch.no_grad():
        parts = []
        for z in draws.split(2000):
            latent, log_prob = guide.get_posterior()._push(z)
            parts.append(density(latent) - log_prob)
    return torch.cat(parts)


def measure(
    regression: Regression, *, seconds: float, steps: int | None, seed: int
) -> dict[str, float]:
    """The ELBO of the best Gaussian, and what the flow adds to it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, args = regression
    gaussian = AutoSplineFlow(model, hierarchical=False).setup(*args)
    gaussian.find_start(model, args)
    density = LatentDensity(model, gaussian, args)
    draws = normal_draws(10_000, gaussian.affine.loc, seed=5)
    before = _elbo(gaussian, density, draws)
    pyro.clear_param_store()
    guide = AutoSplineFlow(model).setup(*args)
    begun = time.process_time()
    fit(model, guide, args=args, max_seconds=seconds, max_steps=steps, seed=seed, progress=False)
    cpu = time.process_time() - begun
    gain = _elbo(guide, density, draws) - before
    return {
        "D": guide.latent_dim,
        "full rank": float(before.mean()),
        "gain": float(gain.mean()),
        "error": float(gain.std()) / len(gain) ** 0.5,
        "CPU s": cpu,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the table and write it to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each fit")
    parser.add_argument(
        "--steps", type=int, default=None, help="of each fit, instead of its recipe's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=RESULTS / "near_gaussian.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    for name, regression in MODELS.items():
        found[name] = measure(regression, seconds=args.seconds, steps=args.steps, seed=args.seed)
        print(name, found[name], flush=True)
    report = Report("AutoSplineFlow on posteriors that are close to a Gaussian")
    report.add(
        "ELBO of the best full-rank Gaussian, and what AutoSplineFlow adds to it (nats).", ""
    )
    header = ["posterior", "D", "full rank", "AutoSplineFlow adds", "CPU seconds"]
    rows = [
        [
            name,
            f"{row['D']:.0f}",
            f"{row['full rank']:.3f}",
            f"{row['gain']:+.4f} ({row['error']:.4f})",
            f"{row['CPU s']:.0f}",
        ]
        for name, row in found.items()
    ]
    report.add(*table(header, rows))
    report.save(args.output)
    return found


if __name__ == "__main__":
    main()
