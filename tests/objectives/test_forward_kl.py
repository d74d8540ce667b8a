"""The inclusive divergence: exact on Gaussians, zero at the posterior, wide where the ELBO is narrow."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flowkit.objectives import AlphaDivergence, ForwardKL
from tests.objectives import gaussian
from tests.objectives.gaussian import LOC, LOG_SCALE, OBSERVED, assert_mean, gradients

STACKED = {"vectorize_particles": True, "max_plate_nesting": 1}
VARIANCE = 0.5  # of the posterior, whose mean is OBSERVED / 2


def test_gradient_and_value_are_those_of_the_divergence() -> None:
    objective = ForwardKL(1000, **STACKED)
    got = gradients(objective, 1000)
    offset, variance = LOC - OBSERVED / 2, math.exp(2 * LOG_SCALE)
    assert_mean(got["loc"], offset / variance, resolution=0.02)
    assert_mean(got["log_scale"], 1 - (VARIANCE + offset**2) / variance, resolution=0.02)
    divergence = LOG_SCALE - math.log(VARIANCE) / 2 + (VARIANCE + offset**2) / (2 * variance) - 0.5
    loss = objective.loss(gaussian.model, gaussian.guide, gaussian.data(1000))
    assert loss / 1000 == pytest.approx(divergence, rel=0.02)


def test_at_the_posterior_the_value_is_zero_and_the_gradient_is_zero_on_average() -> None:
    def posterior(data) -> None:
        loc = pyro.param("loc", lambda: torch.full_like(data, OBSERVED / 2))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(loc, math.sqrt(VARIANCE)))

    objective = ForwardKL(10, **STACKED)
    got = gradients(objective, 10_000, guide=posterior)["loc"]
    assert got.std() > 0.3  # of a single estimate: a mean of ten scores, each 1.4
    assert abs(got.mean()) < 5 * got.std() / 100
    loss = objective.loss(gaussian.model, posterior, gaussian.data(10_000))
    assert abs(loss) < 1e-9


def test_value_never_exceeds_the_log_of_the_particles() -> None:
    def far(data) -> None:
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(20.0, 0.1))

    loss = ForwardKL(8, **STACKED).loss(gaussian.model, far, gaussian.data(50))
    assert 0.7 * math.log(8) < loss / 50 <= math.log(8) + 1e-9


def fitted_scale(target: dist.Distribution, objective, steps: int = 120) -> float:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model() -> None:
        pyro.sample("z", target)

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("log_scale", torch.tensor(0.0)).exp()
        pyro.sample("z", dist.Normal(loc, scale))

    svi = SVI(model, guide, Adam({"lr": 0.1, "betas": (0.8, 0.9)}), objective)
    scales = []
    for _ in range(steps):
        svi.step()
        scales.append(pyro.param("log_scale").exp().item())
    return sum(scales[steps // 2 :]) / (steps - steps // 2)


STEADY = {"num_particles": 300, "vectorize_particles": True, "max_plate_nesting": 0}


def test_it_covers_two_modes_where_the_elbo_takes_one() -> None:
    modes = dist.Normal(torch.tensor([-3.0, 3.0]), 0.5)
    target = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), modes)
    narrow = fitted_scale(target, Trace_ELBO(**STEADY))
    wide = fitted_scale(target, ForwardKL(**STEADY))
    assert narrow == pytest.approx(0.5, rel=0.2)
    assert wide == pytest.approx(math.sqrt(9.25), rel=0.1)  # the spread of the target


def test_the_scale_of_a_fit_to_a_long_tail_falls_with_alpha() -> None:
    parts = dist.Normal(torch.zeros(2), torch.tensor([0.5, 2.0]))
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.8, 0.2])), parts)
    orders = [AlphaDivergence(alpha, **STEADY) for alpha in (0.5, 1.0, 3.0)]
    scales = [fitted_scale(target, objective) for objective in (ForwardKL(**STEADY), *orders)]
    assert all(wide > 1.03 * narrow for wide, narrow in zip(scales, scales[1:], strict=False))


def test_discrete_guides_are_fitted() -> None:
    def model() -> None:
        pyro.sample("k", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))

    def guide() -> None:
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("k", dist.Categorical(logits=logits))

    svi = SVI(model, guide, Adam({"lr": 0.05}), ForwardKL(200, **STACKED))
    for _ in range(150):
        svi.step()
    probs = pyro.param("logits").softmax(0)
    assert torch.allclose(probs, torch.tensor([0.1, 0.2, 0.7]), atol=0.04)


def test_parameters_of_the_model_get_the_gradient_of_the_evidence() -> None:
    def model(data) -> None:
        scale = pyro.param("scale", lambda: torch.full_like(data, 0.8))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=data)

    got = gradients(ForwardKL(1000, **STACKED), 500, model=model)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    evidence = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(torch.tensor(OBSERVED))
    (-evidence).backward()
    assert_mean(got["scale"], scale.grad, resolution=0.05)


def test_what_it_cannot_fit_is_refused() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def point() -> None:
        pyro.sample("z", dist.Delta(pyro.param("point", torch.tensor(0.4))))

    with pytest.raises(ValueError, match="got a Delta at 'z' whose place is learned"):
        ForwardKL().loss_and_grads(model, point)

    def annealed() -> None:
        with pyro.poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.4)), 1.0))

    with pytest.raises(ValueError, match="one scale with the model's, got 0.5 at 'z'"):
        ForwardKL().loss_and_grads(model, annealed)
