"""Moments and quantiles of flows, the ends of a circle, and batches without rows."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit import SplineFlow
from pyro_flowkit.testing import perturb_
from tests.tiny import ready_guide


def heavy(df, **settings):
    flow = SplineFlow(len(df), base="student_t", num_transforms=2, hidden_dims=[8], **settings)
    with torch.no_grad():
        flow.base.log_df.copy_(torch.tensor(df).log())
    return flow


def test_a_tail_without_moments_has_none() -> None:
    d = heavy([0.8, 1.5, 2.0, 9.0])()
    assert torch.equal(d.mean.isnan(), torch.tensor([True, False, False, False]))
    assert d.variance[0].isnan() and d.variance[1:3].isinf().all()
    assert d.variance[3].item() == pytest.approx(9 / 7, rel=0.02)
    assert d.mean[1:].abs().max() < 1e-5


def test_a_tail_reaches_what_is_mixed_with_it() -> None:
    flow = perturb_(heavy([1.5, 9.0, 9.0]), 0.1)
    assert flow().variance.isinf().all() and flow().mean.isfinite().all()
    alone = perturb_(heavy([1.5, 9.0, 9.0], mixing=None), 0.1)
    assert torch.equal(alone().variance.isinf(), torch.tensor([True, False, False]))


@pytest.mark.parametrize("base", ["normal", "student_t"])
def test_moments_and_quantiles_are_those_of_many_draws(base) -> None:
    torch.manual_seed(0)
    flow = perturb_(SplineFlow(2, base=base, num_transforms=2, hidden_dims=[8]), 0.3)
    d, count = flow(), 400_000
    with torch.no_grad():
        draws = d.sample((count,))
        fixed = d.fixed_draws()
    assert torch.allclose(d.mean, draws.mean(0), atol=4 * draws.std(0).max() / count**0.5)
    spread = (draws - draws.mean(0)).square().std(0) / count**0.5
    assert torch.all((d.variance - draws.var(0)).abs() < 4 * spread + 0.003 * d.variance)
    for level in (0.16, 0.5, 0.84, 0.97):
        share = (draws <= fixed.quantile(level, 0)).double().mean(0)
        assert torch.allclose(share, torch.tensor(level).double(), atol=0.002)


def test_the_summaries_of_a_guide_are_those_of_its_draws() -> None:
    guide = ready_guide()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = guide.get_posterior().sample((100_000,))
    variance = guide.get_posterior().variance
    spread = (draws - draws.mean(0)).square().std(0) / len(draws) ** 0.5
    assert torch.all((variance - draws.var(0)).abs() < 4 * spread + 0.003 * variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_circle_has_a_density_at_both_ends(dtype) -> None:
    uniform = dist.Uniform(torch.tensor(-math.pi, dtype=dtype), math.pi).expand([2]).to_event(1)
    flow = SplineFlow(2, tails="circular", mixing="permute", base=uniform, bound=math.pi)
    flow = perturb_(flow.to(dtype), 0.1)
    pi = torch.atan2(torch.tensor(0.0, dtype=dtype), torch.tensor(-1.0, dtype=dtype))
    assert pi >= math.pi - 1e-6
    for other in (0.3, -2.0):
        ends = torch.tensor([[pi, other], [-pi, other], [0.9999 * pi, other]], dtype=dtype)
        at_pi, at_minus_pi, near = flow.log_prob(ends).tolist()
        assert at_pi == pytest.approx(at_minus_pi, abs=1e-4)
        assert at_pi == pytest.approx(near, abs=0.02)
    with torch.no_grad():
        side = torch.linspace(-1, 1, 101, dtype=dtype)[:-1]
        angles = torch.cartesian_prod(side, side)
        density = flow.log_prob(math.pi * angles).exp()
    assert float(density.mean()) * (2 * math.pi) ** 2 == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_batch_without_rows_has_a_gradient_of_zero(context_dim) -> None:
    flow = SplineFlow(2, context_dim, num_transforms=2, hidden_dims=[8])
    context = torch.zeros(0, 2, requires_grad=True) if context_dim else None
    log_prob = flow.log_prob(torch.zeros(0, 2), context)
    assert log_prob.shape == (0,)
    log_prob.sum().backward()
    for parameter in flow.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    x = flow(context).rsample((0,) if context is None else ())
    assert x.shape == (0, 2) and flow(context).log_prob(x).requires_grad
