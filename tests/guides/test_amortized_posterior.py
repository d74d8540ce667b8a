"""What AmortizedSplineFlow can represent and learn, where the exact posterior is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_mean
from torch import Tensor

from pyro_flowkit import fit
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow
from pyro_flowkit.guides.global_spline_flow import MAX_SILENCE, AntitheticNormal, centred
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine
from tests.guides.amortized_models import DATA, make_guide, model

# x_i ~ N(z_i, NOISE), z_i ~ N(mu, SPREAD), mu ~ N(0, PRIOR)
PRIOR, SPREAD, NOISE = 10.0, 1.0, 0.5
X = torch.tensor([2.1, 0.3, 1.7, 1.1, 0.4, 2.9], dtype=torch.float64)
SIZE = len(X)
PULL = SPREAD**2 / (SPREAD**2 + NOISE**2)
LOCAL_SD = math.sqrt(SPREAD**2 * (1 - PULL))
PRECISION = 1 / PRIOR**2 + SIZE / (SPREAD**2 + NOISE**2)
GLOBAL_SD = PRECISION**-0.5
GLOBAL_MEAN = float(X.sum()) / (SPREAD**2 + NOISE**2) / PRECISION


def hierarchy(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), PRIOR))
    with pyro.plate("rows", SIZE, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(mu, SPREAD))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def log_evidence() -> float:
    covariance = torch.full((SIZE, SIZE), PRIOR**2, dtype=X.dtype)
    covariance += (SPREAD**2 + NOISE**2) * torch.eye(SIZE, dtype=X.dtype)
    return float(dist.MultivariateNormal(torch.zeros_like(X), covariance).log_prob(X))


def exact_guide(**settings) -> AmortizedSplineFlow:
    guide = make_guide(
        hierarchy, lambda x: x[:, None], context_dim=1, condition_on_global=True, **settings
    ).setup(X)
    guide.global_guide.affine.restart(X.new_tensor([GLOBAL_MEAN]), X.new_tensor([[GLOBAL_SD]]))
    with torch.no_grad():
        affine = guide.affine
        affine.weight[0] = X.new_tensor([PULL, 1 - PULL]) / affine.weight_rate[0]
        affine.raw_constant[0] = (1 - PULL) * GLOBAL_MEAN / affine.rate
        affine.raw_constant[1] = math.log(LOCAL_SD) / affine.rate
    return guide


def gradient(guide, elbo, *args, of) -> Tensor:
    guide.zero_grad()
    elbo.differentiable_loss(of, guide, *args).backward()
    parts = [p.grad for p in guide.parameters() if p.grad is not None]
    return torch.cat([part.reshape(-1) for part in parts])


def test_linear_gaussian_posterior_is_represented_exactly() -> None:
    guide = exact_guide()
    for _ in range(5):  # every single draw gives the evidence
        assert Trace_ELBO().loss(hierarchy, guide, X) == pytest.approx(-log_evidence(), abs=1e-8)
    median = guide.median(X)
    assert float(median["mu"]) == pytest.approx(GLOBAL_MEAN, abs=1e-6)
    expected = PULL * X + (1 - PULL) * GLOBAL_MEAN
    spread = math.sqrt(LOCAL_SD**2 + ((1 - PULL) * GLOBAL_SD) ** 2)
    assert torch.allclose(median["z"], expected, atol=0.05 * spread)
    low, high = guide.quantiles([0.1587, 0.8413], X)["z"]
    assert torch.allclose((high - low) / 2, torch.full_like(X, spread), rtol=0.05)


def test_path_gradient_vanishes_at_the_exact_posterior() -> None:
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    ordinary = gradient(exact_guide(path_gradient=False), elbo, X, of=hierarchy)
    pyro.clear_param_store()
    guide = exact_guide()
    for _ in range(20):  # the global guide learns at first which gradient is the less noisy one
        path = gradient(guide, elbo, X, of=hierarchy)
    assert path.abs().max() < 1e-9
    assert ordinary.abs().max() > 0.1


@pytest.mark.parametrize("condition_on_global", [False, True])
def test_path_gradient_has_the_mean_of_the_ordinary_one(condition_on_global: bool) -> None:
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    gradients = []
    for path_gradient in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        guide = make_guide(
            encoder=lambda x: x,
            path_gradient=path_gradient,
            condition_on_global=condition_on_global,
        ).setup(DATA)
        guide.global_guide.affine.raw_log_scale.data.fill_(-0.1)
        guide.affine.raw_constant.data[3:6].fill_(-0.1)
        perturb_(guide.flow, 0.1)
        torch.nn.init.normal_(guide.affine.weight, std=0.3)
        steps = [gradient(guide, elbo, DATA[:4], of=model) for _ in range(30)]
        gradients.append(torch.stack(steps))
    difference = gradients[0] - gradients[1]
    z = difference.mean(0) / (difference.std(0) / 30**0.5 + 1e-6)
    assert z.square().mean() < 2.0  # 1 if only noise is left
    assert difference.abs().max() > 1e-4


def test_particles_of_global_latents_are_antithetic_while_gradients_are_recorded() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    base = AntitheticNormal(zeros, ones).to_event(1).expand([6, 1])
    draws = base.rsample()
    assert draws.shape == (6, 1, 3) and torch.equal(draws[:3], -draws[3:])
    with torch.no_grad():
        assert not torch.equal((draws := base.sample())[:3], -draws[3:])
    odd = AntitheticNormal(zeros, ones).to_event(1).expand([5]).rsample()
    assert len(odd.unique()) == 15
    many = AntitheticNormal(zeros, ones).expand([20_000, 3]).rsample()
    assert torch.allclose(many.std(0), ones, atol=0.03)


@pytest.mark.parametrize("rows", [3, SIZE])
def test_global_splines_are_frozen_where_minibatches_make_noise(rows: int) -> None:
    guide = make_guide(hierarchy, lambda x: x[:, None], context_dim=1).setup(X[:rows])
    flow = guide.global_guide.flow
    assert {p.requires_grad for p in flow.parameters()} == {rows == SIZE}
    assert all(p.requires_grad for p in guide.global_guide.affine.parameters())
    assert all(p.requires_grad for p in guide.flow.parameters())


def steps_until_splines_move(guide: AmortizedSplineFlow, x: Tensor, most: int) -> int:
    """Steps of Adam on all of the data; ``most`` if the splines of the global guide stay where they are."""
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    before = [p.detach().clone() for p in guide.global_guide.flow.parameters()]
    for i in range(most):
        optimizer.zero_grad()
        elbo.differentiable_loss(hierarchy, guide, x).backward()
        optimizer.step()
        pairs = zip(guide.global_guide.flow.parameters(), before, strict=True)
        if not all(torch.equal(now, then) for now, then in pairs):
            return i
    return most


def test_global_splines_wait_for_the_affine_map() -> None:
    guide = make_guide(hierarchy, lambda x: x[:, None], context_dim=1).setup(X)
    x = X + 10.0
    assert steps_until_splines_move(guide, x, 20) == 20
    assert all(p.grad is None for p in guide.global_guide.flow.parameters())
    assert 20 < steps_until_splines_move(guide, x, 1000) < 1000
    distance = guide.global_guide.affine.loc - x.mean()
    assert distance.abs() < 3 * guide.global_guide.affine.scale.squeeze()


@pytest.mark.parametrize("path_gradient", [False, True])
def test_global_splines_do_not_wait_for_news_that_never_comes(path_gradient: bool) -> None:
    guide = make_guide(
        hierarchy, lambda x: x[:, None], context_dim=1, path_gradient=path_gradient
    ).setup(X)
    if path_gradient:  # which an objective of this kind does not use
        elbo = RenyiELBO(alpha=0.5, num_particles=2)
        for _ in range(MAX_SILENCE // 2 + 1):
            guide.zero_grad()
            elbo.loss_and_grads(hierarchy, guide, X)
        assert all(p.grad is not None for p in guide.global_guide.flow.parameters())
    else:
        assert steps_until_splines_move(guide, X, 2 * MAX_SILENCE) == MAX_SILENCE


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("size", [1, 3])
def test_conditional_affine_is_a_bijection_with_its_log_det(kind: str, size: int) -> None:
    affine = ConditionalAffine(torch.zeros(size), 0.5, 2, kind, hidden_dims=[8]).double()
    x = torch.randn(4, size, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64)
    y, ladj = affine.call_and_ladj(x, context)
    assert torch.allclose(y, 0.5 * x) and torch.allclose(
        ladj, torch.tensor(0.5).double().log() * size
    )
    perturb_(affine, 0.3)
    y, ladj = affine.call_and_ladj(x, context)
    back, inverse_ladj = affine.inverse_and_ladj(y, context)
    assert torch.allclose(back, x, atol=1e-10) and torch.allclose(ladj, -inverse_ladj)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda row, c=context[i]: affine.call_and_ladj(row, c)[0], x[i]
        )
        assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, ladj[i], atol=1e-10)
        off = jacobian - jacobian.diagonal().diag()
        assert bool(off.any()) == (kind == "full" and size > 1)
    empty, _ = affine.call_and_ladj(x[:0], context[:0])
    assert empty.shape == (0, size)


# Training

LOADING = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-0.7, 0.3]])
TRIL = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
MANY = 10_000


def factors(x: Tensor) -> None:
    with pyro.plate("rows", MANY, subsample_size=len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=TRIL))
        pyro.sample("x", dist.Normal(z @ LOADING.mT, 0.7).to_event(1), obs=x)


def test_minibatches_of_varying_size_train_the_exact_local_posterior() -> None:
    x = torch.randn(MANY, 2) @ TRIL.mT @ LOADING.mT + 0.7 * torch.randn(MANY, 3)
    guide = make_guide(factors, lambda x: x, context_dim=3).setup(x[:100])
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    elbo = Trace_ELBO()
    for i in range(300):
        rows = torch.randint(MANY, ((100, 50, 150)[i % 3],))
        optimizer.zero_grad()
        (elbo.differentiable_loss(factors, guide, x[rows]) / MANY).backward()
        optimizer.step()
        schedule.step()
    precision = torch.linalg.inv(TRIL @ TRIL.mT) + LOADING.mT @ LOADING / 0.7**2
    covariance = torch.linalg.inv(precision)
    mean = x[:500] @ LOADING @ covariance / 0.7**2
    exact = dist.MultivariateNormal(mean, covariance)
    posterior = guide.get_posterior(x[:500])
    with torch.no_grad():
        draws = posterior.sample((200,))
        kl = (posterior.log_prob(draws) - exact.log_prob(draws)).mean()
        low, middle, high = guide.quantiles([0.1587, 0.5, 0.8413], x[:500])["z"]
    sd = covariance.diagonal().sqrt()
    assert kl < 0.005
    assert ((middle - mean) / sd).square().mean().sqrt() < 0.05
    assert ((high - low) / 2 / sd).mean(0).sub(1).abs().max() < 0.04


def test_minibatches_train_the_exact_posterior_of_global_and_local_latents() -> None:
    train_hierarchy_of_many(batch_size=40, max_steps=200)


def test_whole_plate_trains_the_posterior_that_minibatches_do() -> None:
    train_hierarchy_of_many(batch_size=None, max_steps=250)


def train_hierarchy_of_many(**settings) -> None:
    size, noise = 400, 2.0
    z = 1.5 + torch.randn(size)
    x = z + noise * torch.randn(size)

    def noisy(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    guide = make_guide(
        noisy,
        lambda x: x[:, None],
        context_dim=1,
        condition_on_global=True,
        init_loc_fn=init_to_mean,
    )
    fit(noisy, guide, data=x, lr=0.02, seed=0, progress=False, **settings)
    precision = 0.01 + size / (1 + noise**2)
    mean, sd = float(x.sum()) / (1 + noise**2) / precision, precision**-0.5
    low, middle, high = guide.quantiles([0.1587, 0.5, 0.8413], x)["mu"]
    assert abs(middle - mean) < 0.5 * sd
    # the ratio is 0.45 for a z that does not follow mu, 3.2 for batches that stand for themselves
    assert 0.75 < (high - low) / 2 / sd < 1.35
    pull, local_sd = 1 / (1 + noise**2), noise / (1 + noise**2) ** 0.5
    for given in (mean - sd, mean + sd):
        posterior = guide.get_posterior(x, given={"mu": torch.tensor(given)})
        expected = pull * x + (1 - pull) * given
        error = (posterior.mean.squeeze(-1) - expected) / local_sd
        assert error.square().mean().sqrt() < 0.15
        assert (posterior.variance.mean().sqrt() / local_sd - 1).abs() < 0.05


@pytest.mark.parametrize("kind", ["ours", "normal"])
def test_global_draws_are_seen_in_units_of_wide_scales_and_of_one_for_narrow_ones(kind) -> None:
    """t - m over max(s, 1): large draws would saturate the networks, and narrow ones are no noise to be magnified."""
    loc, scale = torch.tensor([3.0, -200.0]), torch.tensor([0.1, 50.0])

    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 100.0))

    if kind == "ours":
        guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[4]).setup()
        guide.affine.restart(loc, scale.diag())
    else:
        values = {"a": loc[0], "b": loc[1]}
        guide = AutoNormal(model, init_loc_fn=lambda site: values[site["name"]])
        guide()
        guide.scales.a, guide.scales.b = scale
    nodes = [node for _, node in guide.prototype_trace.iter_stochastic_nodes()]
    draws = {"a": loc[0] + torch.tensor([0.2, 0.0]), "b": loc[1] + torch.tensor([100.0, 25.0])}
    found = centred(guide, Latents(nodes), draws)
    torch.testing.assert_close(found, torch.tensor([[0.2, 2.0], [0.0, 0.5]]))
