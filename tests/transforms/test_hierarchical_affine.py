"""The affine map of each block given those before it: its structure, its limits, and what a guide gains by it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.component import _blocks
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine


def test_a_block_depends_on_those_before_it_and_is_scaled_itself() -> None:
    layer = perturb_(HierarchicalAffine([1, 2, 2], hidden_dims=[8]), 0.5)
    jacobian = torch.func.jacrev(layer)(torch.tensor([0.5, -1.0, 0.3, 0.8, -0.2]))
    block = torch.tensor([0, 1, 1, 2, 2])
    assert (jacobian[block[:, None] > block] != 0).all()
    assert (jacobian.diagonal() > 0).all() and jacobian[0, 0] == 1
    outside = (block[:, None] <= block) & ~torch.eye(5, dtype=torch.bool)
    assert (jacobian[outside] == 0).all()


def without_likelihood(layer: HierarchicalAffine) -> HierarchicalAffine:
    for conditioner in layer.conditioners:
        conditioner.likelihood.data[1] = -40.0
    return layer


def test_a_block_is_a_gaussian_given_those_before_it_times_one_that_is_always_the_same() -> None:
    layer = HierarchicalAffine([1, 3]).double()
    loc, log_scale = torch.tensor([0.3, -0.7, 0.0]), torch.tensor([1.0, 0.5, -2.0])
    place, half = torch.tensor([0.4, 0.0, -1.0]), torch.tensor([-1.0, 0.2, 1.5])
    with torch.no_grad():
        layer.conditioners[0].weight.copy_(torch.cat([loc, log_scale])[:, None])
        layer.conditioners[0].likelihood.copy_(torch.stack([place, half]))
    v = torch.linspace(-4.5, 4.5, 7, dtype=torch.float64)[:, None]
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = (-2 * 15 * (log_scale * v / 15).tanh()).exp()
    likelihood = (2 * half.double()).exp()
    mean = (prior * loc * v + likelihood * place) / (prior + likelihood)
    scale = ((1 + likelihood) / (prior + likelihood)).sqrt()  # one where v is 0
    y, ladj = layer.call_and_ladj(torch.cat([v, x], -1))
    assert torch.allclose(y, torch.cat([v, mean + scale * x], -1))
    assert torch.allclose(ladj, scale.log().sum(-1))


def test_log_scale_follows_a_line_up_to_five_and_a_logarithm_from_there_on() -> None:
    layer = without_likelihood(HierarchicalAffine([1, 1])).double()
    with torch.no_grad():
        layer.conditioners[0].weight[1, 0] = 0.5
    v = torch.tensor([-5.0, 5.0, 24.0, -1e6], dtype=torch.float64)
    log_scale = layer(torch.stack([v, torch.ones(4).double()], -1))[:, 1].log().detach()
    raw = torch.tensor([-2.5, 2.5, 0.5 * (5 + math.log(20.0)), -0.5 * (5 + math.log(1e6 - 4))])
    assert torch.allclose(log_scale, 15 * torch.tanh(raw.double() / 15))


def test_log_scale_has_a_limit() -> None:
    layer = without_likelihood(HierarchicalAffine([1, 1])).double()
    with torch.no_grad():
        layer.conditioners[0].weight[1, 0] = 50.0
    x = torch.tensor([[-9.0, 1.0], [9.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(layer(x)[:, 1].log().detach(), torch.tensor([-15.0, 15.0]).double())


def test_derivatives_far_outside_are_those_of_autograd() -> None:
    layer = perturb_(HierarchicalAffine([2, 3, 1], hidden_dims=[8]), 0.3).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = 8 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (x[:, :2].abs() > 5).any() and (x[:, :2].abs() < 5).any()

    def weighed(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, parameters, strict=True))
        y, ladj = torch.func.functional_call(
            _LogDet(layer), {f"layer.{n}": p for n, p in values.items()}, x
        )
        return (y * torch.arange(1.0, 7.0)).tanh().sum() + (ladj**2).sum()

    assert torch.autograd.gradcheck(weighed, (x.requires_grad_(), *parameters), fast_mode=True)
    y, _ = layer.call_and_ladj(x)
    (own,) = torch.autograd.grad(-0.5 * (x**2).sum(), x)
    pushed = layer.pushed_derivative(x, y, own)
    value = y.detach().requires_grad_()
    back, ladj = layer.inverse_and_ladj(value)
    (expected,) = torch.autograd.grad(-0.5 * (back**2).sum() + ladj.sum(), value)
    assert torch.allclose(pushed, expected)


class _LogDet(torch.nn.Module):
    def __init__(self, layer: HierarchicalAffine) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer.call_and_ladj(x)


def chained() -> None:
    """Eight schools as in Pyro's example: the population inside the plate, so that every school has one."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def test_scales_that_follow_scales_do_not_let_one_draw_decide_the_elbo() -> None:
    pyro.set_rng_seed(0)
    guide = AutoSplineFlow(chained)
    svi = SVI(chained, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(200):
        svi.step()
    assert guide.evidence(num_samples=20_000, seed=0).elbo > -50


def test_large_blocks_have_no_linear_part() -> None:
    layer = HierarchicalAffine([100, 101])
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["conditioners.0.likelihood", "conditioners.0.network.packed"]
    assert layer(torch.ones(201)).equal(torch.ones(201))


@pytest.mark.parametrize("sizes", [[], [3], [2, 0], [1.5, 2]])
def test_fewer_than_two_blocks_are_refused(sizes) -> None:
    with pytest.raises(ValueError, match="Expected at least two positive block_sizes, got"):
        HierarchicalAffine(sizes)


def test_blocks_begin_at_the_largest_sites() -> None:
    assert _blocks([5]) == [5]
    assert _blocks([1, 9]) == [1, 9]
    assert _blocks([1, 1, 8, 20, 1, 2]) == [2, 8, 21, 2]


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal(torch.zeros(5, dtype=torch.float64), (v / 2).exp()))


def test_a_funnel_is_found_before_any_training() -> None:
    guide = AutoSplineFlow(funnel, num_transforms=2, hidden_dims=[8]).setup()
    assert guide.find_start(funnel) is not None
    hierarchical = guide.evidence(num_samples=4000, seed=0)
    assert -0.02 < hierarchical.elbo < 0.0
    assert hierarchical.is_reliable
    pyro.clear_param_store()
    guide = AutoSplineFlow(funnel, num_transforms=2, hidden_dims=[8], hierarchical=False).setup()
    guide.find_start(funnel)
    assert guide.evidence(num_samples=4000, seed=0).elbo < -1.0, "the best Gaussian"


def test_hierarchical_guides_only_where_there_are_several_sites() -> None:
    def single():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    for of, settings, blocks in (
        (single, {}, None),
        (funnel, {"hierarchical": False}, None),
        (funnel, {}, [1, 5]),
    ):
        pyro.clear_param_store()
        hierarchy = AutoSplineFlow(of, **settings).setup().hierarchy
        assert (hierarchy and hierarchy.block_sizes) == blocks
    assert next(hierarchy.parameters()).dtype == torch.float64
