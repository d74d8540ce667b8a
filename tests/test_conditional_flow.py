"""A flow with a context: a conditional Gaussian at first, whose units the splines have at every scale."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_flowkit import SplineFlow, head_start
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
    affine = flow.affine
    heads = context @ (affine.weight_rate * affine.weight).mT + affine.rate * affine.raw_constant
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


def narrow(context: Tensor) -> None:
    with pyro.plate("data", len(context)):
        pyro.sample("z", dist.Normal(context, 0.05).to_event(1))


def train(flow: SplineFlow, elbo: Trace_ELBO, steps: int) -> None:
    def guide(context: Tensor) -> None:
        with pyro.plate("data", len(context)):
            pyro.sample("z", flow(context))

    svi = SVI(narrow, guide, Adam({"lr": 3e-3}), elbo)
    for _ in range(steps):
        svi.step(torch.randn(32, 2))


def parts_of(flow: SplineFlow) -> dict[str, Tensor]:
    parts = {
        "map": [flow.affine.raw_constant, flow.affine.weight],
        "network": flow.affine.network.parameters(),
        "splines": flow.layers.parameters(),
    }
    return {name: torch.cat([p.detach().flatten() for p in of]) for name, of in parts.items()}


@pytest.mark.parametrize("elbo", [Trace_ELBO, JitTrace_ELBO])
def test_the_map_has_a_head_start_over_its_network_and_that_over_the_splines(
    elbo: type[Trace_ELBO], monkeypatch
) -> None:
    monkeypatch.setattr(head_start, "NETWORK_STEPS", 2)
    monkeypatch.setattr(head_start, "SPLINE_STEPS", 4)
    flow = make_flow(2, 2)
    objective = elbo(ignore_jit_warnings=True) if elbo is JitTrace_ELBO else elbo()
    found = []
    for _ in range(6):
        before = parts_of(flow)
        train(flow, objective, 1)
        found.append([name for name, p in parts_of(flow).items() if not p.equal(before[name])])
    everything = ["map", "network", "splines"]
    assert found == 2 * [everything[:1]] + 2 * [everything[:2]] + 2 * [everything]


def test_several_draws_of_a_step_are_one_step_and_densities_do_not_wait() -> None:
    flow = make_flow(2, 2)
    for _ in range(head_start.NETWORK_STEPS):
        flow(CONTEXT).rsample().sum().backward()
    assert float(flow.head_start.steps) == pytest.approx(1.0)
    splines = [*flow.layers.parameters()]
    assert all(p.grad is None for p in splines)
    flow(CONTEXT).log_prob(torch.zeros(5, 2)).sum().backward()
    assert any(p.grad is not None for p in splines)


def test_a_flow_whose_map_was_set_does_not_wait() -> None:
    flow = make_flow(2, 2)
    flow.load_state_dict(bent(2, 2).state_dict())
    flow(CONTEXT).rsample().sum().backward()
    assert all(p.grad is not None for p in flow.layers.parameters())


def gap_of_a_narrow_posterior(seed: int) -> float:
    """In nats, after 800 steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    flow = make_flow(2, 2)
    train(flow, Trace_ELBO(num_particles=4, vectorize_particles=True), 800)
    context = torch.randn(1000, 2)
    z = flow.sample(10, context)
    with torch.no_grad():
        gap = flow.log_prob(z, context) - dist.Normal(context, 0.05).to_event(1).log_prob(z)
    return float(gap.mean())


def test_splines_are_not_squeezed_on_the_way_to_a_narrow_posterior(monkeypatch) -> None:
    """Without a head start they are: about twice as much is left in each of three seeds."""
    with_head_start = gap_of_a_narrow_posterior(seed=0)
    monkeypatch.setattr(head_start, "NETWORK_STEPS", 0)
    monkeypatch.setattr(head_start, "SPLINE_STEPS", 0)
    assert with_head_start < 0.8 * gap_of_a_narrow_posterior(seed=0)
