"""A Gaussian with a Gaussian guide, as many times beside each other as there are data: everything is known exactly."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

LOC, LOG_SCALE, OBSERVED = 0.2, -0.1, 1.0  # the posterior is N(OBSERVED / 2, 1 / 2)


def model(data: Tensor) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def guide(data: Tensor) -> None:
    """Every datum has parameters of its own: their gradients are as many independent estimates."""
    loc = pyro.param("loc", lambda: torch.full_like(data, LOC))
    log_scale = pyro.param("log_scale", lambda: torch.full_like(data, LOG_SCALE))
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def data(size: int) -> Tensor:
    return torch.full((size,), OBSERVED, dtype=torch.float64)


def gradients(objective, size: int, model=model, guide=guide, seed: int = 0) -> dict[str, Tensor]:
    """One estimate per datum of the gradient of every parameter of the guide, shape ``(size,)``."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    objective.loss_and_grads(model, guide, data(size))
    store = pyro.get_param_store()
    return {name: store[name].unconstrained().grad for name in store.keys()}


def quadrature(nodes: int, dims: int) -> tuple[list[Tensor], Tensor]:
    """Nodes of ``dims`` standard normals and their weights, each of shape ``(nodes ** dims,)``."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    grid = list(torch.meshgrid(*[points] * dims, indexing="ij"))
    product = torch.ones(())
    for part in torch.meshgrid(*[weights] * dims, indexing="ij"):
        product = product * part
    return [axis.reshape(-1) for axis in grid], product.reshape(-1)


def log_normal(x: Tensor | float, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    x, loc, scale = (torch.as_tensor(value, dtype=torch.float64) for value in (x, loc, scale))
    return dist.Normal(loc, scale).log_prob(x)


def assert_mean(estimates: Tensor, exact: Tensor | float, *, resolution: float = 0.1) -> None:
    """The mean is the exact value within five standard errors, which are small beside the value."""
    error = estimates.std() / len(estimates) ** 0.5
    exact = float(exact)
    assert error < resolution * max(abs(exact), 0.1), f"only {exact} +- {error}"
    assert abs(estimates.mean() - exact) < 5 * error, f"{estimates.mean()} +- {error}, not {exact}"


def signal_to_noise(estimates: Tensor) -> float:
    return float(estimates.mean().abs() / estimates.std())
