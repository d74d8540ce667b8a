"""AutoSplineFlow with two components where the posterior has two modes: the evidence, and each mode's share of it.

Two posteriors of one latent, whose evidence and shares follow from quadrature: x ~ N(0, 10) with x^2 observed at
100 +- 4, and .3 N(-6, 1) + .7 N(6, 1), as the factor of a model with a wide prior. Each is fitted by
``fit(model, AutoSplineFlow(model, num_components=2))``, from several seeds; beside it a guide with one component.

    python -m benchmarks.bimodal
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import LatentDensity

NUM_DRAWS = 50_000


def square() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("o", dist.Normal(x**2, 4.0), obs=torch.tensor(100.0))


def unequal() -> None:
    prior = dist.Normal(0.0, 10.0)
    z = pyro.sample("z", prior)
    bumps = dist.Normal(torch.tensor([-6.0, 6.0]), 1.0).log_prob(z.unsqueeze(-1))
    target = (bumps + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)
    pyro.factor("target", target - prior.log_prob(z))


MODELS: dict[str, Callable[[], None]] = {
    "x^2 = 100 +- 4": square,
    ".3 N(-6, 1) + .7 N(6, 1)": unequal,
}


@dataclass(frozen=True)
class Found:
    """What a fit found: nats, the share of its draws below zero, CPU seconds."""

    log_evidence: float
    elbo: float
    below_zero: float
    seconds: float


def exact(model: Callable[[], None]) -> tuple[float, float]:
    """Log evidence and the share below zero, by quadrature."""
    pyro.clear_param_store()
    guide = AutoSplineFlow(model).setup()
    grid = torch.linspace(-50.0, 50.0, 400_001)
    with torch.no_grad():
        log_density = LatentDensity(model, guide)(grid[:, None]).double()
    total = _log_integral(log_density, grid.double())
    below = grid <= 0
    part = _log_integral(log_density[below], grid[below].double())
    return float(total), float((part - total).exp())


def _log_integral(log_density: Tensor, grid: Tensor) -> Tensor:
    top = log_density.max()
    return torch.trapezoid((log_density - top).exp(), grid).log() + top


def measure(model: Callable[[], None], components: int, seed: int, steps: int | None) -> Found:
    """One fit with the defaults, and what it says of the posterior."""
    pyro.clear_param_store()
    guide = AutoSplineFlow(model, num_components=components)
    begun = time.process_time()
    with warnings.catch_warnings():
        if components == 1:  # there are two modes, as it says
            warnings.filterwarnings("ignore", ".*separate modes of comparable mass")
        fit(model, guide, seed=seed, max_steps=steps, progress=False)
    seconds = time.process_time() - begun
    evidence = guide.evidence(seed=0)
    (draws,) = guide.sample(NUM_DRAWS).values()
    below = float((draws < 0).double().mean())
    return Found(evidence.log_evidence, evidence.elbo, below, seconds)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Found]]:
    """Print the table and write it to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--steps", type=int, default=None, help="of each fit, instead of its recipe's"
    )
    parser.add_argument("--output", default=RESULTS / "bimodal.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, found = [], {}
    for name, model in MODELS.items():
        log_evidence, share = exact(model)
        runs = [(2, seed) for seed in args.seeds] + [(1, args.seeds[0])]
        found[name] = []
        for components, seed in runs:
            one = measure(model, components, seed, args.steps)
            found[name].append(one)
            print(name, components, seed, one, flush=True)
            rows.append(
                [
                    name,
                    str(components),
                    str(seed),
                    f"{one.log_evidence:.4f}",
                    f"{one.log_evidence - log_evidence:+.4f}",
                    f"{one.elbo - log_evidence:+.4f}",
                    f"{one.below_zero:.3f}",
                    f"{one.below_zero - share:+.3f}",
                    f"{one.seconds:.0f}",
                ]
            )
    report = Report("AutoSplineFlow on posteriors with two modes")
    steps = f" with max_steps={args.steps}" if args.steps else ""
    report.add(
        f"`fit(model, AutoSplineFlow(model, num_components=...))`{steps}: the log evidence in nats by importance "
        "sampling (4,000 draws) and its error, the error of the ELBO, the share of 50,000 draws below zero and its "
        "error; errors against quadrature. CPU seconds are those of the fit with its setup.",
        "",
    )
    header = [
        "posterior",
        "components",
        "seed",
        "log evidence",
        "error",
        "ELBO's error",
        "below 0",
        "error",
        "CPU s",
    ]
    report.add(*table(header, rows))
    report.save(args.output)
    return found


if __name__ == "__main__":
    main()
