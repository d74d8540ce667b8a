"""IWAE and alpha-divergence: what the value is, and that the doubly reparameterised gradient is the right one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_flowkit import SplineFlow
from pyro_flowkit.objectives import AlphaDivergence, ImportanceWeightedELBO
from pyro_flowkit.testing import perturb_
from tests.objectives import gaussian
from tests.objectives.gaussian import (
    LOC,
    LOG_SCALE,
    OBSERVED,
    assert_mean,
    gradients,
    log_normal,
    quadrature,
    signal_to_noise,
)

STACKED = {"vectorize_particles": True, "max_plate_nesting": 1}
ORDERS = (0.0, 0.5, 2.0)


def exact_bound(log_weights: list[Tensor], weight: Tensor, alpha: float) -> Tensor:
    order = 1.0 - alpha
    mean = torch.logsumexp(order * torch.stack(log_weights), 0) - math.log(len(log_weights))
    return (weight * mean / order).sum()


def exact_gradients(alpha: float, beta: float = 1.0) -> dict[str, float]:
    """Of the loss with two particles, by quadrature; beta anneals prior and guide."""
    loc = torch.tensor(LOC, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(LOG_SCALE, dtype=torch.float64, requires_grad=True)
    noise, weight = quadrature(60, 2)
    log_weights = []
    for eps in noise:
        z = loc + log_scale.exp() * eps
        divergence = log_normal(z, loc, log_scale.exp()) - log_normal(z, 0.0, 1.0)
        log_weights.append(log_normal(OBSERVED, z, 1.0) - beta * divergence)
    (-exact_bound(log_weights, weight, alpha)).backward()
    return {"loc": float(loc.grad), "log_scale": float(log_scale.grad)}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("alpha", ORDERS)
def test_gradient_is_the_exact_one(alpha: float, vectorize: bool) -> None:
    objective = AlphaDivergence(alpha, 2, vectorize_particles=vectorize)
    got = gradients(objective, 40_000)
    for name, exact in exact_gradients(alpha).items():
        assert_mean(got[name], exact)


def test_gradient_is_the_exact_one_where_prior_and_guide_are_annealed() -> None:
    def annealed(program):
        def run(data: Tensor) -> None:
            with poutine.scale(scale=0.4):
                program(data)

        return run

    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            with poutine.scale(scale=0.4):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    objective = ImportanceWeightedELBO(2, **STACKED)
    got = gradients(objective, 40_000, model=model, guide=annealed(gaussian.guide))
    for name, exact in exact_gradients(0.0, beta=0.4).items():
        assert_mean(got[name], exact)


def test_gradient_is_the_exact_one_where_draws_depend_on_each_other() -> None:
    start = {"loc": 0.3, "slope": 0.7, "log_scale": -0.2}

    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            first = pyro.sample("first", dist.Normal(0.0, 1.0))
            second = pyro.sample("second", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second, 0.5), obs=data)

    def guide(data: Tensor) -> None:
        loc, slope, log_scale = (
            pyro.param(name, lambda value=value: torch.full_like(data, value))
            for name, value in start.items()
        )
        with pyro.plate("data", len(data)):
            first = pyro.sample("first", dist.Normal(loc, log_scale.exp()))
            pyro.sample("second", dist.Normal(slope * first + 0.1, 0.6))

    leaf = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in start.items()}
    noise, weight = quadrature(18, 4)
    log_weights = []
    for eps_1, eps_2 in (noise[:2], noise[2:]):
        first = leaf["loc"] + leaf["log_scale"].exp() * eps_1
        mean = leaf["slope"] * first + 0.1
        second = mean + 0.6 * eps_2
        log_weights.append(
            log_normal(first, 0.0, 1.0)
            + log_normal(second, first, 1.0)
            + log_normal(OBSERVED, second, 0.5)
            - log_normal(first, leaf["loc"], leaf["log_scale"].exp())
            - log_normal(second, mean, 0.6)
        )
    (-exact_bound(log_weights, weight, 0.0)).backward()
    got = gradients(ImportanceWeightedELBO(2, **STACKED), 200_000, model=model, guide=guide)
    for name in start:
        assert_mean(got[name], leaf[name].grad)


def test_signal_to_noise_grows_with_particles_and_that_of_the_plain_gradient_falls() -> None:
    def ratios(doubly: bool) -> list[dict[str, float]]:
        found = []
        for particles in (1, 10, 100, 1000):
            objective = ImportanceWeightedELBO(particles, doubly_reparameterized=doubly, **STACKED)
            found.append({k: signal_to_noise(v) for k, v in gradients(objective, 1000).items()})
        return found

    doubly, plain = ratios(True), ratios(False)
    for name in ("loc", "log_scale"):
        one, ten, hundred, thousand = (ratio[name] for ratio in doubly)
        assert one < ten < hundred < thousand and thousand > 10 * one
        # The mean of 1,000 estimates of pure noise is 0.03 standard deviations from 0.
        assert plain[2][name] < 0.1 and plain[3][name] < 0.1 < plain[0][name] < one


@pytest.mark.parametrize("doubly", [False, True])
def test_parameters_of_the_model_get_the_gradient_of_the_bound(doubly: bool) -> None:
    drawn = []

    def model(data: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.8, dtype=torch.float64))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            drawn.append(z.detach())
            pyro.sample("x", dist.Normal(z, scale), obs=data)

    objective = ImportanceWeightedELBO(7, doubly_reparameterized=doubly)
    objective.loss_and_grads(model, gaussian.guide, gaussian.data(3))
    z = torch.stack(drawn)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    log_w = log_normal(z, 0.0, 1.0) + log_normal(OBSERVED, z, scale)
    log_w = log_w - log_normal(z, LOC, math.exp(LOG_SCALE))
    (math.log(7) - torch.logsumexp(log_w, 0)).sum().backward()
    assert pyro.param("scale").grad == pytest.approx(scale.grad.item(), rel=1e-9)


def test_a_learned_point_gets_the_gradient_of_the_bound() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones((), dtype=torch.float64))

    def guide() -> None:
        point = pyro.param("point", torch.tensor(0.4, dtype=torch.float64))
        pyro.sample("loc", dist.Delta(point))
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    found = []
    for doubly in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        objective = ImportanceWeightedELBO(5, doubly_reparameterized=doubly)
        objective.loss_and_grads(model, guide)
        found.append(pyro.param("point").grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-9) and abs(found[0]) > 0.1


def flow_program(path_gradient: bool):
    flow = perturb_(SplineFlow(2, num_transforms=2, hidden_dims=[8], count_bins=4), 0.1).double()

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", flow(path_gradient=path_gradient))

    return flow, model, guide


def flow_gradient(objective, path_gradient: bool) -> tuple[float, Tensor]:
    pyro.set_rng_seed(3)
    flow, model, guide = flow_program(path_gradient)
    pyro.set_rng_seed(4)
    loss = objective.loss_and_grads(model, guide)
    return loss, torch.cat([p.grad.reshape(-1) for p in flow.parameters() if p.grad is not None])


@pytest.mark.parametrize("path_gradient", [False, True])
@pytest.mark.parametrize(
    "objective", [AlphaDivergence(1.0, 4), AlphaDivergence(0.3, 1), ImportanceWeightedELBO(1)]
)
def test_at_alpha_one_or_one_particle_it_is_the_path_gradient_elbo(objective, path_gradient):
    elbo = Trace_ELBO(num_particles=objective.num_particles)
    expected_loss, expected = flow_gradient(elbo, path_gradient=True)
    _, ordinary = flow_gradient(elbo, path_gradient=False)
    loss, gradient = flow_gradient(objective, path_gradient)
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    assert torch.allclose(gradient, expected, atol=1e-8)
    assert (gradient - ordinary).abs().max() > 1e-2


def test_alpha_leads_from_iwae_to_elbo() -> None:
    def loss(objective) -> float:
        pyro.set_rng_seed(0)
        return objective.loss(gaussian.model, gaussian.guide, gaussian.data(5))

    losses = [loss(AlphaDivergence(alpha, 50)) for alpha in (0.0, 1e-6, 0.5, 1 - 1e-6, 1.0, 2.0)]
    assert losses[0] == loss(ImportanceWeightedELBO(50))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[3] == pytest.approx(losses[4], abs=1e-4)
    assert losses[4] == pytest.approx(loss(Trace_ELBO(num_particles=50)))
    assert losses[0] + 0.1 < losses[2] and losses[2] + 0.1 < losses[4]
    assert losses[4] + 0.1 < losses[5]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 1.5])
def test_gap_to_the_evidence_is_the_divergence_of_renyi(alpha: float) -> None:
    objective = AlphaDivergence(alpha, 200_000, **STACKED)
    bound = -objective.loss(gaussian.model, gaussian.guide, gaussian.data(1))
    evidence = float(log_normal(OBSERVED, 0.0, math.sqrt(2.0)))
    # between N(m, s^2), the guide, and N(mu, t^2), the posterior (Gil et al. 2013)
    m, s, mu, t = LOC, math.exp(LOG_SCALE), OBSERVED / 2, math.sqrt(0.5)
    mixed = alpha * t**2 + (1 - alpha) * s**2
    if alpha == 1.0:
        divergence = math.log(t / s) + (s**2 + (m - mu) ** 2) / (2 * t**2) - 0.5
    else:
        divergence = math.log(t / s) + math.log(t**2 / mixed) / (2 * (alpha - 1))
        divergence += alpha * (m - mu) ** 2 / (2 * mixed)
    assert evidence - bound == pytest.approx(divergence, abs=0.01)


@pytest.mark.parametrize("doubly", [False, True])
def test_differentiable_loss_has_the_value_of_the_loss(doubly: bool) -> None:
    objective = AlphaDivergence(0.4, 6, doubly_reparameterized=doubly)
    values = []
    for evaluate in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
        pyro.set_rng_seed(0)
        values.append(evaluate(gaussian.model, gaussian.guide, gaussian.data(3)))
    assert isinstance(values[0], float) and isinstance(values[2], float)
    assert values[0] == pytest.approx(values[1].item(), abs=1e-9)
    assert values[0] == pytest.approx(values[2], abs=1e-9)


def test_impossible_draws_weigh_nothing_and_spoil_nothing() -> None:
    def model() -> None:
        pyro.sample("z", dist.Uniform(0.0, 1.0))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(loc, 1.0, validate_args=False))

    with pyro.validation_enabled(False):
        loss = ImportanceWeightedELBO(50, **STACKED).loss_and_grads(model, guide)
    assert math.isfinite(loss) and math.isfinite(pyro.param("loc").grad)
    assert pyro.param("loc").grad != 0
