r"""Posteriors for :mod:`benchmarks.time_to_posterior`: ``models._targets``, nearly Gaussian ones, and two more.

Gaussian process   y ~ N(B (sqrt(S) z), .3), z ~ N(0, 1)^38, S_j = sd^2 ls exp(-ls^2 w_j^2 / 2), sd ~ LogNormal(0, 1),
                   ls ~ LogNormal(log .03, .5), 38 sines of frequencies w = pi .. 38 pi; where ls is large S underflows
                   and its square root has no derivative
Lotka-Volterra     du/dt = (a - b v) u, dv/dt = (d u - c) v, by Runge and Kutta's method of fourth order; 21 counts
                   of both with errors LogNormal(sigma), from simulated parameters. Its posterior has wrong modes.

and for :mod:`benchmarks.budgets`:

Poisson hierarchy  y_g ~ Poisson(exp(theta_g)), theta_g ~ N(mu + b x_g, sigma), for 20 simulated groups
horseshoe          y ~ Bernoulli(logits=X (tau lambda z)), 100 simulated rows of 12 columns, two of which matter
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.near_gaussian import MODELS
from models._targets import targets

NUM_YEARS = 21
STEPS_PER_YEAR = 4


@dataclass(frozen=True)
class Posterior:
    """A model with its data.

    Attributes:
        model: a Pyro model.
        args: its arguments.
        log_evidence: in nats; None where it is not known.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    log_evidence: float | None


def gaussian_process(w: Tensor, basis: Tensor, y: Tensor) -> None:
    """A curve through ``y`` of shape ``(n,)``; frequencies ``w`` ``(38,)``, their sines ``basis`` ``(n, 38)``."""
    zero = w.new_zeros(())
    sd = pyro.sample("sd", dist.LogNormal(zero, 1.0))[..., None]
    ls = pyro.sample("ls", dist.LogNormal(zero + math.log(0.03), 0.5))[..., None]
    z = pyro.sample("z", dist.Normal(torch.zeros_like(w), 1.0).to_event(1))
    spd = sd**2 * ls * torch.exp(-0.5 * ls**2 * w**2)
    pyro.sample("y", dist.Normal((spd.sqrt() * z) @ basis.mT, 0.3).to_event(1), obs=y)


def _curve() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.linspace(0.0, 1.0, 40, dtype=torch.float64)
    w = math.pi * torch.arange(1, 39, dtype=torch.float64)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (
        w,
        math.sqrt(2.0) * torch.sin(x[:, None] * w),
        torch.sin(9 * x) * torch.exp(-x) + 0.3 * noise,
    )


def populations(rates: Any, start: Any) -> list[tuple[Any, Any]]:
    """Prey and predators of every year, from the rates (a, b, c, d) and the first year's."""
    a, b, c, d = rates
    u, v = start
    found = [(u, v)]
    h = 1.0 / STEPS_PER_YEAR

    def slope(u: Any, v: Any) -> tuple[Any, Any]:
        return (a - b * v) * u, (d * u - c) * v

    for _ in range(NUM_YEARS - 1):
        for _ in range(STEPS_PER_YEAR):
            u1, v1 = slope(u, v)
            u2, v2 = slope(u + h / 2 * u1, v + h / 2 * v1)
            u3, v3 = slope(u + h / 2 * u2, v + h / 2 * v2)
            u4, v4 = slope(u + h * u3, v + h * v3)
            u = u + h / 6 * (u1 + 2 * u2 + 2 * u3 + u4)
            v = v + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        found.append((u, v))
    return found


RATES_LOC, RATES_SCALE = (-0.11, -3.34, -0.11, -3.34), (0.47, 0.83, 0.47, 0.83)
TRUE_RATES, TRUE_START = (0.55, 0.028, 0.8, 0.024), (33.0, 6.0)


def lotka_volterra(y: Tensor) -> None:
    """Counts ``y`` of shape ``(21, 2)``."""
    loc, scale = y.new_tensor(RATES_LOC), y.new_tensor(RATES_SCALE)
    rates = pyro.sample("rates", dist.LogNormal(loc, scale).to_event(1))
    start = pyro.sample("start", dist.LogNormal(y.new_full((2,), math.log(10.0)), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(y.new_full((2,), -1.0), 1.0).to_event(1))
    years = populations(rates.unbind(-1), start.unbind(-1))
    mean = torch.stack([torch.stack(year, -1) for year in years], -2)
    log_mean = mean.clamp(min=1e-30).log()
    pyro.sample("y", dist.LogNormal(log_mean, sigma[..., None, :]).to_event(2), obs=y)


def _counts() -> Tensor:
    true = torch.tensor([*TRUE_RATES, *TRUE_START], dtype=torch.float64).unbind()
    mean = torch.stack([torch.stack(year) for year in populations(true[:4], true[4:])])
    noise = torch.randn(
        NUM_YEARS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return mean * torch.exp(0.25 * noise)


def poisson_hierarchy(x: Tensor, y: Tensor) -> None:
    """Counts ``y`` of groups, shape ``(20,)``, with a covariate ``x`` of each."""
    zero = x.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 2.0))
    slope = pyro.sample("slope", dist.Normal(zero, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 1.0))
    with pyro.plate("groups", len(y)):
        rate = pyro.sample("log_rate", dist.Normal(mu + slope * x, sigma))
        pyro.sample("y", dist.Poisson(rate.exp()), obs=y)


def horseshoe_logistic(x: Tensor, y: Tensor) -> None:
    """Coefficients of which few matter; ``x`` ``(100, 12)``, ``y`` ``(100,)``."""
    tau = pyro.sample("tau", dist.HalfCauchy(x.new_tensor(0.1)))
    columns = x.new_ones(x.shape[-1])
    lam = pyro.sample("lam", dist.HalfCauchy(columns).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(columns), 1.0).to_event(1))
    logits = (tau[..., None] * lam * z) @ x.mT
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def _groups() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, 20, generator=draw, dtype=torch.float64)
    return x, torch.poisson((1.0 + 0.5 * x + 0.5 * noise).exp(), draw)


def _few_that_matter() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(100, 12, generator=draw, dtype=torch.float64)
    return x, torch.bernoulli((2.0 * x[:, 0] - 1.5 * x[:, 1]).sigmoid(), generator=draw)


def for_budgets() -> dict[str, Posterior]:
    """Six that a Gaussian does not do for, by name."""
    known = posteriors()
    return {
        "eight schools, centred": known["eight schools, centred"],
        "binomial hierarchy": known["seeds"],
        "Poisson hierarchy": Posterior(poisson_hierarchy, _groups(), None),
        "horseshoe": Posterior(horseshoe_logistic, _few_that_matter(), None),
        "Gaussian process": known["Gaussian process"],
        "funnel": known["funnel"],
    }


def posteriors() -> dict[str, Posterior]:
    """All of them, by name."""
    found = {
        name: Posterior(target.model, target.args, target.log_evidence)
        for name, target in targets().items()
    }
    for name, regression in MODELS.items():
        found[name] = Posterior(*regression, None)
    found["Gaussian process"] = Posterior(gaussian_process, _curve(), None)
    found["Lotka-Volterra"] = Posterior(lotka_volterra, (_counts(),), None)
    return found
