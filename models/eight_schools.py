r"""Eight schools: what a guide misses of a posterior that is no Gaussian, on the smallest real example.

The effects of coaching on test scores in eight schools (Rubin 1981):

    mu ~ N(0, 5),   tau ~ HalfCauchy(5),   theta_j ~ N(mu, tau),   y_j ~ N(theta_j, sigma_j)

Centred, theta_j narrows to a funnel as tau goes to zero, which no Gaussian guide can follow.
Non-centred, theta_j = mu + tau eta_j with eta_j ~ N(0, 1): the same model with milder geometry. Both
have log p(y) = -31.311 (by quadrature), so every guide's gap is known.

    python -m models.eight_schools --centred
    python -m models.eight_schools --centred --guide auto_normal

Reference:
    Andrew Gelman et al. Bayesian Data Analysis, third edition, section 5.5. CRC Press 2013.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_flowkit.diagnostics import Verdict, diagnose, from_svi, to_arviz
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import fit

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
SCHOOLS = ("A", "B", "C", "D", "E", "F", "G", "H")
EXACT_LOG_EVIDENCE = -31.311

GUIDES: dict[str, Callable[..., Any]] = {
    "auto_spline_flow": AutoSplineFlow,
    "auto_multivariate_normal": AutoMultivariateNormal,
    "auto_normal": AutoNormal,
}

FAST_STEPS = 30


@dataclass(frozen=True)
class SchoolsResult:
    """What ``main`` returns.

    Attributes:
        tree: draws, weights, training curve and bounds, from ``from_svi``.
        summary: ArviZ's summary of the draws.
        verdict: what ``diagnose`` says of the guide.
    """

    tree: xr.DataTree
    summary: pd.DataFrame
    verdict: Verdict


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Standard errors and estimated effects of the eight schools, each of shape ``(8,)``."""
    return torch.tensor(ERRORS, dtype=dtype), torch.tensor(EFFECTS, dtype=dtype)


def centred(sigma: Tensor, y: Tensor) -> None:
    """The model with theta_j as a latent."""
    mu, tau = _population(sigma)
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(sigma: Tensor, y: Tensor) -> None:
    """The model with the standardised effect eta_j as a latent."""
    mu, tau = _population(sigma)
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(torch.zeros_like(mu), torch.ones_like(tau)))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _population(like: Tensor) -> tuple[Tensor, Tensor]:
    five = like.new_tensor(5.0)
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(five), five))
    tau = pyro.sample("tau", dist.HalfCauchy(five))
    return mu, tau


def main(argv: Sequence[str] | None = None) -> SchoolsResult:
    """Train a guide; print its ELBO, the evidence, pareto k and the summary of its draws."""
    args = _parser().parse_args(argv)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    model = centred if args.centred else non_centred
    guide = GUIDES[args.guide](model)
    # A spline flow brings its own recipe; these are for the others.
    gaussian = not isinstance(guide, AutoSplineFlow)
    result = fit(
        model,
        guide,
        args=data(),
        num_particles=32 if gaussian else None,
        lr=args.lr or (1e-2 if gaussian else None),
        scheduler="step" if gaussian else None,
        max_steps=FAST_STEPS if args.fast else args.steps or (3000 if gaussian else None),
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.fast,
    )
    tree = from_svi(
        model,
        guide,
        args=data(),
        history=result,
        num_samples=1000 if args.fast else args.num_samples,
        exact_log_evidence=EXACT_LOG_EVIDENCE,
        coords={"school": list(SCHOOLS)},
        seed=args.seed,
    )
    import arviz

    summary = arviz.summary(to_arviz(tree), kind="stats")
    verdict = diagnose(tree)
    seconds = float(result.history["seconds"][-1])
    _print_report(args, tree, summary, verdict, len(result.history["step"]), seconds)
    if args.output:
        to_arviz(tree).to_netcdf(args.output)
        print(f"ArviZ data: {args.output}")
    return SchoolsResult(tree, summary, verdict)


def _print_report(
    args: argparse.Namespace,
    tree: xr.DataTree,
    summary: pd.DataFrame,
    verdict: Verdict,
    steps: int,
    seconds: float,
) -> None:
    bounds = tree["vi_diagnostics"].to_dataset()
    parametrisation = "centred" if args.centred else "non-centred"
    draws = int(bounds.attrs["num_samples"])
    print(f"Eight schools, {parametrisation}, {args.guide}: {steps} steps in {seconds:.0f} s; nats")
    print(f"ELBO (lower bound)          {_value(bounds, 'elbo')}")
    for count in bounds["n_particles"].to_numpy():
        if count > 1:
            rung = bounds.sel(n_particles=count)
            print(f"{f'IWAE-{count} (lower bound)':<27} {_value(rung, 'iwae')}")
    print(f"log evidence (PSIS)         {_value(bounds, 'log_evidence')}")
    print(f"log evidence (exact)        {EXACT_LOG_EVIDENCE:.3f}")
    print(f"gap, exact - ELBO           {float(bounds['gap']):.3f}")
    print(
        f"pareto k                    {float(bounds['pareto_k']):.2f} "
        f"({float(bounds['pareto_k_sd']):.2f}), {draws} draws"
    )
    print(f"verdict                     {verdict}\n")
    print("Draws of the guide:")
    print(summary.to_string())


def _value(bounds: xr.Dataset, name: str) -> str:
    return f"{float(bounds[name]):.3f} ({float(bounds[f'{name}_se']):.3f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.eight_schools",
        description="A variational guide for eight schools, judged by the known evidence.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--centred", action="store_true", help="theta as a latent: a funnel")
    parser.add_argument("--guide", choices=tuple(GUIDES), default="auto_spline_flow")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the guide's recipe)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the guide's recipe)")
    parser.add_argument("--num-samples", type=int, default=10_000, help="draws for the numbers")
    parser.add_argument("--output", metavar="PATH", help="save a netCDF file that ArviZ opens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps, to try it")
    return parser


if __name__ == "__main__":
    main()
