"""Base distributions: standard normal, Student's t, conditional normal, and one that is handed in."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flowkit import SplineFlow
from pyro_flowkit.bases import make_base
from pyro_flowkit.testing import perturb_

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}


def mixture() -> dist.TorchDistribution:
    components = dist.Normal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


def test_normal_base_follows_dtype_and_is_not_in_the_state() -> None:
    base = make_base("normal", 3, 0).double()
    assert base().sample().dtype == torch.float64 and base().event_shape == (3,)
    assert list(base.state_dict()) == []


def test_normal_base_is_a_standard_normal() -> None:
    d = make_base("normal", 3, 0)()
    expected = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    x = torch.randn(5, 3, requires_grad=True)
    assert torch.allclose(d.log_prob(x), expected.log_prob(x), atol=1e-6)
    assert torch.allclose(d.expand([5]).log_prob(x), expected.log_prob(x), atol=1e-6)
    (derivative,) = torch.autograd.grad(d.log_prob(x).sum(), x)
    assert torch.allclose(derivative, -x)
    torch.manual_seed(0)
    drawn = d.rsample((4,))
    torch.manual_seed(0)
    assert torch.equal(drawn, expected.rsample((4,)))


def test_student_t_starts_at_ten_degrees_of_freedom() -> None:
    d = make_base("student_t", 2, 0)()
    x = torch.randn(5, 2)
    expected = dist.StudentT(10.0, torch.zeros(2), torch.ones(2)).to_event(1).log_prob(x)
    assert torch.allclose(d.log_prob(x), expected, atol=1e-5)


def test_student_t_learns_its_degrees_of_freedom() -> None:
    data = dist.StudentT(torch.tensor([2.0, 200.0]), 0.0, 1.0).sample((4000,))
    base = make_base("student_t", 2, 0)
    optimizer = torch.optim.Adam(base.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (-base().log_prob(data).mean()).backward()
        optimizer.step()
    heavy, light = base.log_df.exp().tolist()
    assert 1.5 < heavy < 2.7 and light > 20


def test_student_t_learns_inside_a_flow_by_both_estimators() -> None:
    flow = SplineFlow(2, base="student_t", **TINY)
    before = flow.base.log_df.detach().clone()
    flow.log_prob(torch.randn(50, 2)).mean().backward()
    assert flow.base.log_df.grad.abs().min() > 0
    target = dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1)
    svi = SVI(
        lambda: pyro.sample("z", target),
        lambda: pyro.sample("z", flow()),
        Adam({"lr": 0.1}),
        Trace_ELBO(num_particles=4),
    )
    svi.step()
    assert (flow.base.log_df - before).abs().min() > 0


@pytest.mark.parametrize(
    "custom",
    [
        lambda: dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1),
        lambda: dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        lambda: torch.distributions.Independent(
            torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1
        ),
        lambda: dist.LogNormal(torch.zeros(2), 0.25).to_event(1),
        mixture,
    ],
)
def test_custom_base(custom) -> None:
    flow = SplineFlow(2, base=custom(), **TINY)
    x = custom().sample((20,))
    assert torch.allclose(flow.log_prob(x), custom().log_prob(x), atol=1e-4), "fresh flow"
    perturb_(flow, 0.2)
    draws = flow.sample(6)
    assert draws.shape == (6, 2)
    d = flow()
    with torch.no_grad():
        own = d.sample((6,))
        assert torch.allclose(d.log_prob(own), d.log_prob(own.clone()), atol=1e-4)
    assert torch.isfinite(d.mean).all() and torch.isfinite(d.variance).all()
    twin = copy.deepcopy(flow)
    assert torch.equal(twin.log_prob(own), flow.log_prob(own))


def test_fixed_draws_of_an_asymmetric_base_stay_in_its_support() -> None:
    base = dist.LogNormal(torch.zeros(2), 0.5).to_event(1)
    d = SplineFlow(2, base=base, **TINY)()
    assert (d.fixed_draws(200) > 0).all()
    assert d.fixed_draws(200).shape == (401, 2)
    assert torch.allclose(d.mean, base.base_dist.mean, atol=0.05)


def test_base_without_reparametrised_draws_gets_the_score_function() -> None:
    d = SplineFlow(2, base=mixture(), **TINY)()
    assert not d.has_rsample
    x = d.sample()
    parts = d.score_parts(x)
    assert torch.equal(parts.score_function, parts.log_prob) and parts.entropy_term == 0


@pytest.mark.parametrize(
    "wrong",
    [
        dist.Normal(torch.zeros(2), 1.0),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
        dist.Normal(0.0, 1.0),
    ],
)
def test_base_of_another_event_shape_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"Expected .*event shape \(2,\), got"):
        SplineFlow(2, base=wrong, **TINY)


@pytest.mark.parametrize("unknown", ["cauchy", "Normal", None, 3])
def test_unknown_base_is_refused(unknown) -> None:
    with pytest.raises(ValueError, match=r"Expected base .* got"):
        make_base(unknown, 2, 0)


def test_conditional_normal_without_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected context_dim >= 1 .* got 0"):
        make_base("conditional_normal", 2, 0)
