r"""Wealth and rugged terrain, in and out of Africa: the regression of Pyro's tutorial, on simulated countries.

    a ~ N(0, 10),   b_africa, b_rugged, b_both ~ N(0, 1),   sigma ~ Uniform(0, 10),
    y_i ~ N(a + b_africa A_i + b_rugged R_i + b_both A_i R_i, sigma)

With X the 170 x 4 matrix of predictors and P the prior variances of the coefficients, ``y | sigma`` is normal with
covariance ``sigma^2 I + X P X^T``. In the eigenvectors of ``X P X^T`` that is a product over rows, and the evidence and
the posterior are sums over a fine grid of sigma; between its points the coefficients are normal given sigma.

Reference:
    Nathan Nunn, Diego Puga. Ruggedness: the blessing of bad geography in Africa. Review of Economics and Statistics
    2012 (the question; the numbers here are simulated).
"""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

NUM_COUNTRIES, NUM_IN_AFRICA = 170, 49
NUM_GRID = 20_000
MAX_SIGMA = 10.0
PRIOR_SCALES = (10.0, 1.0, 1.0, 1.0)
COEFFICIENTS = ("a", "b_africa", "b_rugged", "b_both")


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Predictors (1, A, R, A R) of shape ``(170, 4)`` and log GDP of shape ``(170,)``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(NUM_COUNTRIES, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_COUNTRIES, generator=generator, dtype=torch.float64)
    rugged = -1.3 * torch.log1p(-uniform)
    africa = (torch.arange(NUM_COUNTRIES) < NUM_IN_AFRICA).double()
    x = torch.stack([torch.ones_like(rugged), africa, rugged, africa * rugged], dim=-1)
    y = x @ torch.tensor([9.2, -1.9, -0.2, 0.35], dtype=torch.float64) + 0.95 * noise
    return x.to(dtype), y.to(dtype)


def terrain(x: Tensor, y: Tensor) -> None:
    """The model; ``x`` and ``y`` as from :func:`data`."""
    zero = y.new_zeros(())
    mean = zero
    for name, scale, column in zip(COEFFICIENTS, PRIOR_SCALES, x.unbind(-1), strict=True):
        mean = mean + pyro.sample(name, dist.Normal(zero, scale + zero)) * column
    sigma = pyro.sample("sigma", dist.Uniform(zero, MAX_SIGMA + zero))
    with pyro.plate("country", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def log_evidence(x: Tensor, y: Tensor) -> float:
    """log p(y) in nats, by the trapezoidal rule over sigma."""
    _, log_joint = _sigma_grid(x, y)
    return float(log_joint.logsumexp(0)) + math.log(MAX_SIGMA / NUM_GRID)


def exact_draws(x: Tensor, y: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Independent draws of the posterior, ``{site: values}`` of shape ``(num_samples,)``."""
    sigma, log_joint = _sigma_grid(x, y)
    drawn = sigma[torch.multinomial(log_joint.softmax(0), num_samples, replacement=True)]
    prior = torch.tensor(PRIOR_SCALES).to(x).square().reciprocal().diag()
    precision = x.mT @ x / drawn.square()[:, None, None] + prior
    factor = torch.linalg.cholesky(precision)
    mean = torch.cholesky_solve((x.mT @ y / drawn.square()[:, None])[..., None], factor)
    noise = torch.randn_like(mean)
    values = mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)
    return {**dict(zip(COEFFICIENTS, values.squeeze(-1).unbind(-1), strict=True)), "sigma": drawn}


def _sigma_grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points of sigma, and log p(y, sigma) there; the integrand is zero at both ends."""
    sigma = torch.arange(1, NUM_GRID).to(y) * (MAX_SIGMA / NUM_GRID)
    covariance = (x * torch.tensor(PRIOR_SCALES).to(x).square()) @ x.mT
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    variance = sigma.square()[:, None] + eigenvalues.clamp(min=0.0)
    squares = (vectors.mT @ y).square()
    log_likelihood = -0.5 * (squares / variance + (2.0 * math.pi * variance).log()).sum(-1)
    return sigma, log_likelihood - math.log(MAX_SIGMA)
