r"""Posteriors with a known evidence, small and hard in different ways, for guides to be measured on.

    eight schools    see eight_schools.py; centred, theta_j narrows to a funnel as tau goes to zero
    seeds            logistic regression with a random effect for each of 21 plates of seeds (Crowder 1978; an
                     example of BUGS):  a ~ N(0, 10)^4,  tau ~ Gamma(.01, .01),  b_i ~ N(0, tau^-1/2),
                     r_i ~ Binomial(n_i, logit^-1(a x_i + b_i))
    funnel           v ~ N(0, 3),  x_1..9 ~ N(0, e^(v/2))  (Neal 2003)
    banana           x_1 ~ N(0, 10),  x_2 ~ N(0.03 x_1^2 - 3, 1)  (Haario et al. 1999)
    terrain          see _terrain.py; a linear regression of 170 simulated countries, almost Gaussian

The evidence of the funnel and the banana is 1 by construction. That of eight schools is a quadrature, that of Seeds
importance sampling with the error below the last digit given. That of the terrain is computed at every call, by a
quadrature over sigma: given sigma it has a closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from torch import Tensor

from models import _terrain, eight_schools

SEEDS_N = (39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7)
SEEDS_R = (10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3)
SEEDS_X1 = (0,) * 11 + (1,) * 10
SEEDS_X2 = (0,) * 5 + (1,) * 6 + (0,) * 5 + (1,) * 5


@dataclass(frozen=True)
class Target:
    """A model with its data.

    Attributes:
        model: a Pyro model.
        args: its arguments.
        log_evidence: log Z in nats, exact to the digits given.
        gaussian_elbo: ELBO of the best full-rank Gaussian in unconstrained space (nats), None where it is not known.
        start: values of the latents where a guide that can start somewhere should.
        exact_draws: so many independent draws of the posterior by site, None where there is no way to them.
    """

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    log_evidence: float
    gaussian_elbo: float | None
    start: dict[str, Tensor]
    exact_draws: Callable[[int], dict[str, Tensor]] | None = None


def seeds(x: Tensor, n: Tensor, r: Tensor) -> None:
    """Numbers of germinated seeds ``r`` of ``n``, with covariates ``x`` of shape ``(21, 4)``."""
    zero = x.new_zeros(())
    a = pyro.sample("a", dist.Normal(zero, 10.0 + zero).expand([4]).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(0.01 + zero, 0.01 + zero))
    with pyro.plate("plate", len(n)):
        b = pyro.sample("b", dist.Normal(zero, tau.rsqrt()))
        pyro.sample("r", dist.Binomial(n, logits=(a * x).sum(-1) + b), obs=r)


def funnel(zero: Tensor) -> None:
    """Neal's funnel in ten dimensions; ``zero`` gives dtype and device."""
    v = pyro.sample("v", dist.Normal(zero, 3.0 + zero))
    with pyro.plate("dimension", 9):
        pyro.sample("x", dist.Normal(zero, (v / 2).exp()))


def banana(zero: Tensor) -> None:
    """A Gaussian bent along a parabola; ``zero`` gives dtype and device."""
    x1 = pyro.sample("x1", dist.Normal(zero, 10.0 + zero))
    pyro.sample("x2", dist.Normal(0.03 * x1.square() - 3.0, 1.0 + zero))


def _prior_draws(model: Callable[..., None], zero: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Draws of a model without data."""
    draws = Predictive(model, num_samples=num_samples, parallel=True)(zero)
    return {name: value.reshape(num_samples, -1).squeeze(-1) for name, value in draws.items()}


def targets(dtype: torch.dtype = torch.float64) -> dict[str, Target]:
    """The posteriors by name."""
    tensor = partial(torch.tensor, dtype=dtype)
    x1, x2 = tensor(SEEDS_X1), tensor(SEEDS_X2)
    x = torch.stack([torch.ones_like(x1), x1, x2, x1 * x2], dim=-1)
    schools, evidence = eight_schools.data(dtype), eight_schools.EXACT_LOG_EVIDENCE
    countries = _terrain.data(dtype)
    population = {"mu": tensor(4.0), "tau": tensor(3.0)}
    return {
        "eight schools, centred": Target(
            eight_schools.centred,
            schools,
            evidence,
            -32.59,
            {**population, "theta": tensor([4.0] * 8)},
        ),
        "eight schools, non-centred": Target(
            eight_schools.non_centred,
            schools,
            evidence,
            -31.53,
            {**population, "eta": tensor([0.0] * 8)},
        ),
        "seeds": Target(
            seeds,
            (x, tensor(SEEDS_N), tensor(SEEDS_R)),
            -73.406,  # 200,000 importance weights of a trained flow, twice, of two seeds: each -73.4063 (0.0002)
            -74.18,
            {"a": tensor([-0.5, 0.0, 1.3, -0.8]), "tau": tensor(10.0), "b": tensor([0.0] * 21)},
        ),
        "funnel": Target(
            funnel,
            (tensor(0.0),),
            0.0,
            -1.863,
            {"v": tensor(0.0), "x": tensor([0.0] * 9)},
            partial(_prior_draws, funnel, tensor(0.0)),
        ),
        "banana": Target(
            banana,
            (tensor(0.0),),
            0.0,
            -0.726,
            {"x1": tensor(0.0), "x2": tensor(-3.0)},
            partial(_prior_draws, banana, tensor(0.0)),
        ),
        "terrain": Target(
            _terrain.terrain,
            countries,
            _terrain.log_evidence(*countries),
            -253.060,
            {
                "a": tensor(9.0),
                **dict.fromkeys(_terrain.COEFFICIENTS[1:], tensor(0.0)),
                "sigma": tensor(1.0),
            },
            partial(_terrain.exact_draws, *countries),
        ),
    }
