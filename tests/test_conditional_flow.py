"""A flow with a context: a conditional Gaussian at first, whose units the splines have at every scale."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flowkit import SplineFlow
from pyro_flowkit.nn import compressed
from tests.tiny import CONTEXT, bent, make_flow


def set_heads(flow: SplineFlow, loc: Tensor, log_scale: Tensor) -> None:
    """Location and scale that are the same for every context."""
    flow.affine.raw_constant.data.copy_(torch.cat([loc, log_scale]) / flow.affine.rate)


@pytest.mark.parametrize("base", ["normal", "conditional_normal"])
def test_it_starts_as_a_standard_normal_whatever_the_context(base: str) -> None:
    flow = make_flow(3, 2, base=base)
    x = torch.randn(5, 3)
    expected = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(x)
    assert torch.allclose(flow.log_prob(x, 100 * CONTEXT), expected, atol=1e-5)


def test_with_straight_splines_it_is_the_gaussian_of_a_linear_map_of_the_context() -> None:
    flow = make_flow(2, 3).double()
    torch.nn.init.normal_(flow.affine.weight, std=0.1)
    torch.nn.init.normal_(flow.affine.raw_constant, std=0.1)
    context = torch.randn(6, 3, dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64)
    heads = flow.affine.weight_rate * context @ flow.affine.weight.mT + flow.affine.raw_constant
    loc, log_scale = heads.chunk(2, -1)
    expected = dist.Normal(loc, log_scale.exp()).to_event(1)
    assert torch.allclose(flow.log_prob(x, context), expected.log_prob(x), atol=1e-9)


def test_splines_see_whitened_values() -> None:
    flow, x = bent(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    context = CONTEXT.double()
    flow.affine.weight.data.zero_()
    flow.affine.network.packed.data.zero_()
    zero = torch.zeros(3, dtype=torch.float64)
    set_heads(flow, zero, zero)
    expected = flow.log_prob(x, context)
    loc, log_scale = zero + 7.0, zero - 5.0
    set_heads(flow, loc, log_scale)
    found = flow.log_prob(loc + log_scale.exp() * x, context)
    assert torch.allclose(found, expected - log_scale.sum(), atol=1e-9)


def test_circular_tails_have_no_location_and_scale() -> None:
    assert make_flow(2, 1, tails="circular", mixing=None).affine is None
    with pytest.raises(ValueError, match=r"Expected linear tails .*got .circular"):
        make_flow(2, 1, tails="circular", mixing=None, base="conditional_normal")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_context_is_compressed_along_its_direction(dtype: torch.dtype) -> None:
    context = torch.tensor([[3.0, 4.0]], dtype=dtype)
    sizes = torch.tensor([[0.0], [0.01], [1.0], [1.001], [1e3]], dtype=dtype)
    found = compressed(sizes * context)
    assert found.dtype == dtype and bool((found.diff(dim=0) > 0).all())
    assert torch.allclose(found[1], sizes[1] * context[0], rtol=2e-3)
    assert found[-1].max() < 12
    assert torch.allclose(found[1:, 0] / found[1:, 1], torch.tensor(0.75, dtype=dtype), rtol=2e-3)


def test_a_context_of_zeros_has_a_gradient() -> None:
    context = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(compressed(context).sum(), context)
    assert torch.allclose(gradient, torch.ones(2, 3))
