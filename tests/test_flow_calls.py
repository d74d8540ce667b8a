"""How often the conditioners run, and when a remembered draw may answer for them."""

from collections import Counter
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_flowkit.transforms as T
from pyro_flowkit import FlowDistribution, SplineFlow
from pyro_flowkit.testing import perturb_

CONTEXT = torch.linspace(-1.0, 1.0, 6).reshape(3, 2)


def tiny(context_dim: int = 0, **settings) -> SplineFlow:
    settings = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4, **settings}
    return perturb_(SplineFlow(3, context_dim, **settings), 0.3)


def count_passes(flow: SplineFlow) -> Counter:
    """Calls of each conditioner from now on, by layer."""
    calls: Counter = Counter()
    for i, layer in enumerate(flow.layers):
        if hasattr(layer, "conditioner"):
            calls[i] = 0
            layer.conditioner.register_forward_hook(lambda *_, i=i: calls.update([i]))
    return calls


@pytest.fixture(params=[0, 2], ids=["plain", "conditional"])
def flow_and_context(request) -> tuple[SplineFlow, Tensor | None]:
    base = "conditional_normal" if request.param else "normal"
    return tiny(request.param, base=base), CONTEXT if request.param else None


def passes_of(
    flow: SplineFlow, context: Tensor | None, action: Callable[[FlowDistribution], object], **kwargs
) -> set[int]:
    calls = count_passes(flow)
    d = flow(context, **kwargs)
    assert set(calls.values()) == {0}, "building the distribution runs no conditioner"
    action(d)
    assert len(calls) == 2
    return set(calls.values())


def test_rsample_and_log_prob_runs_each_conditioner_once(flow_and_context) -> None:
    assert passes_of(*flow_and_context, lambda d: d.rsample_and_log_prob((5,))) == {1}


def test_log_prob_of_fresh_data_runs_each_conditioner_once(flow_and_context) -> None:
    assert passes_of(*flow_and_context, lambda d: d.log_prob(torch.randn(3, 3))) == {1}


def test_rsample_then_log_prob_runs_each_conditioner_once_in_total(flow_and_context) -> None:
    assert passes_of(*flow_and_context, lambda d: d.log_prob(d.rsample((5,)))) == {1}


def test_sample_then_log_prob_without_gradients_runs_each_conditioner_once(flow_and_context):
    @torch.no_grad()
    def action(d: FlowDistribution) -> None:
        d.log_prob(d.sample((5,)))

    assert passes_of(*flow_and_context, action) == {1}


def test_sample_then_log_prob_with_gradients_runs_again(flow_and_context) -> None:
    assert passes_of(*flow_and_context, lambda d: d.log_prob(d.sample((5,)))) == {2}


def test_score_parts_after_rsample_costs_nothing_more(flow_and_context) -> None:
    assert passes_of(*flow_and_context, lambda d: d.score_parts(d.rsample())) == {1}


def test_path_gradient_adds_exactly_one_pass(flow_and_context) -> None:
    assert passes_of(
        *flow_and_context, lambda d: d.score_parts(d.rsample()), path_gradient=True
    ) == {2}


def test_path_gradient_adds_no_pass_without_gradients(flow_and_context) -> None:
    @torch.no_grad()
    def action(d: FlowDistribution) -> None:
        d.score_parts(d.rsample())

    assert passes_of(*flow_and_context, action, path_gradient=True) == {1}


def test_a_guide_trace_runs_each_conditioner_once() -> None:
    flow = tiny()
    calls = count_passes(flow)

    def guide() -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", flow())

    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert set(calls.values()) == {1}
    assert trace.nodes["z"]["log_prob"].shape == (4,)


def test_memory_is_used_once() -> None:
    flow = tiny()
    d = flow()
    calls = count_passes(flow)
    x = d.rsample((2,))
    first, second = d.log_prob(x), d.log_prob(x)
    assert set(calls.values()) == {2}
    assert torch.allclose(first, second, atol=1e-5)
    assert first.grad_fn is not second.grad_fn


def test_memory_answers_for_that_very_tensor_only() -> None:
    d = tiny()()
    x = d.rsample((2,))
    assert not torch.allclose(d.log_prob(x + 1.0), tiny()().log_prob(x), atol=1e-3)
    x = d.rsample((2,))
    equal_but_other = x.clone()
    assert torch.allclose(d.log_prob(equal_but_other), d.log_prob(x), atol=1e-5)


def test_memory_is_dropped_when_the_value_is_written_to() -> None:
    d = tiny()()
    with torch.no_grad():
        x = d.sample((2,))
        before = d.log_prob(x.clone())
        x = d.sample((2,))
        x.add_(1.0)
        after = d.log_prob(x)
        assert torch.allclose(after, d.log_prob(x.clone()), atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("which", ["conditioner", "lu", "standardization", "base"])
def test_memory_is_dropped_when_a_parameter_is_written_to(which: str) -> None:
    flow = tiny(base="student_t")
    d = flow()
    parameter = {
        "conditioner": flow.layers[0].conditioner.packed,
        "lu": flow.layers[1].bias,
        "standardization": flow.standardization.loc,
        "base": flow.base.log_df,
    }[which]
    with torch.no_grad():
        x = d.sample((4,))
        remembered = d.log_prob(x)
        x = d.sample((4,))
        parameter.add_(0.5)
        fresh = flow().log_prob(x)
        if which == "base":  # computed when the distribution was made
            d = flow()
        assert torch.allclose(d.log_prob(x), fresh, atol=1e-5)
        assert remembered.shape == fresh.shape


def test_memory_is_dropped_when_a_base_parameter_is_written_to() -> None:
    loc = torch.nn.Parameter(torch.zeros(3))
    d = FlowDistribution(dist.Normal(loc, 1.0).to_event(1), [T.spline_coupling(3)])
    with torch.no_grad():
        x = d.sample((4,))
        loc.add_(2.0)
        assert torch.allclose(d.log_prob(x), d.log_prob(x.clone()), atol=1e-5)


def test_memory_is_dropped_when_a_parameter_is_replaced() -> None:
    flow = SplineFlow(2, num_transforms=1, hidden_dims=[4], mixing=None)
    conditioner = flow.layers[0].conditioner
    conditioner.packed = torch.nn.Parameter(torch.zeros_like(conditioner.packed))
    d = flow()
    with torch.no_grad():
        x = d.sample((4,))
        conditioner.packed = torch.nn.Parameter(torch.randn(conditioner.packed.shape))
        assert torch.allclose(d.log_prob(x), d.log_prob(x.clone()), atol=1e-5)


def test_memory_is_dropped_in_the_other_grad_mode() -> None:
    flow = tiny()
    d = flow()
    x = d.sample((4,))
    d.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    with torch.no_grad():
        y = d.rsample((4,))
    assert d.log_prob(y).requires_grad
    z = d.rsample((4,))
    with torch.no_grad():
        assert not d.log_prob(z).requires_grad


def test_unversioned_write_then_flow_again_is_fresh() -> None:
    flow = tiny()
    with torch.no_grad():
        x = flow().sample((4,))
        old = flow().log_prob(x)
        flow.layers[0].conditioner.packed.data.add_(0.7)
        new = flow().log_prob(x)
        assert not torch.allclose(old, new, atol=1e-3)
        assert torch.allclose(new, flow().log_prob(x.clone()), atol=1e-5)


def test_new_weights_give_a_new_log_prob() -> None:
    flow = tiny()
    d = flow()
    x = torch.randn(5, 3)
    before = d.log_prob(x)
    perturb_(flow, 0.3, seed=5)
    after = d.log_prob(x)
    assert (before - after).abs().max() > 1e-2
    assert torch.equal(after, flow().log_prob(x))


def test_log_prob_of_an_own_sample_has_the_right_gradient() -> None:
    flow = tiny()
    d = flow()
    other = torch.zeros((), requires_grad=True)
    x = d.sample((16,))
    (d.log_prob(x).mean() + other).backward()
    got = {name: p.grad.clone() for name, p in flow.named_parameters()}
    flow.zero_grad()
    flow().log_prob(x.clone()).mean().backward()
    assert got and all(g.abs().max() > 0 for n, g in got.items() if "lower" not in n)
    for name, parameter in flow.named_parameters():
        assert torch.allclose(got[name], parameter.grad, atol=1e-5), name


def test_each_site_of_one_flow_keeps_its_own_draw() -> None:
    flow = tiny()
    calls = count_passes(flow)

    def guide() -> tuple[Tensor, ...]:
        return tuple(pyro.sample(f"z{i}", flow()) for i in range(3))

    with torch.no_grad():
        trace = poutine.trace(guide).get_trace()
        trace.compute_log_prob()
        assert set(calls.values()) == {3}
        for i in range(3):
            node = trace.nodes[f"z{i}"]
            assert torch.allclose(node["log_prob"], flow.log_prob(node["value"].clone()), atol=1e-5)
        assert not torch.equal(trace.nodes["z0"]["value"], trace.nodes["z1"]["value"])


def test_interleaved_draws_of_one_distribution_are_right() -> None:
    d = tiny()()
    with torch.no_grad():
        x, y = d.sample((3,)), d.sample((3,))
        assert torch.allclose(d.log_prob(x), d.log_prob(x.clone()), atol=1e-5)
        assert torch.allclose(d.log_prob(y), d.log_prob(y.clone()), atol=1e-5)


def test_remembered_draw_keeps_no_value_alive() -> None:
    import weakref

    d = tiny()()
    x = d.sample((1000,))
    ref = weakref.ref(x)
    del x
    assert ref() is None


def scaled(flow, x):
    for parameter in flow.parameters():
        parameter.data.mul_(1.5)


def from_vector(flow, x):
    vector = torch.nn.utils.parameters_to_vector(flow.parameters())
    torch.nn.utils.vector_to_parameters(1.5 * vector.detach(), flow.parameters())


def moved(flow, x):
    x.data.add_(1.0)


def signs(flow, x):
    for parameter in flow.parameters():
        parameter.data.neg_()


def in_reverse(flow, x):
    for parameter in flow.parameters():
        parameter.data.copy_(parameter.data.flip(-1))


def rows_in_reverse(flow, x):
    x.data.copy_(x.data.flip(0))


def signs_of_draw(flow, x):
    x.data.neg_()


def of_buffer(flow, x):
    flow.standardization.loc.data.add_(1.0)


CHANGES = [scaled, from_vector, moved, signs, in_reverse, rows_in_reverse, signs_of_draw, of_buffer]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [True, False])
def test_changes_that_autograd_does_not_count_are_seen(change, gradients: bool) -> None:
    flow = perturb_(SplineFlow(2, num_transforms=2, hidden_dims=[8]), 0.2)
    d = flow()
    x = d.rsample((50,)) if gradients else d.sample((50,))
    before = d._draw.log_prob.detach().clone()
    change(flow, x)
    found = d.log_prob(x)
    assert torch.equal(found, flow().log_prob(x.detach().clone()))
    assert (found - before).abs().max() > 0.1


def test_a_context_that_is_written_to_without_a_count_is_seen() -> None:
    flow = perturb_(SplineFlow(2, 3, num_transforms=2, hidden_dims=[8]), 0.2)
    context = torch.randn(5, 3)
    d = flow(context)
    x = d.sample()
    context.data.copy_(context.data.flip(0))
    assert torch.equal(d.log_prob(x), flow(context).log_prob(x.clone()))
