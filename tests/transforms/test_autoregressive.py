"""Spline autoregressive transforms: who depends on whom, both directions, and the flow that is made of them."""

import functools

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flowkit.transforms as T
from pyro_flowkit import SplineFlow, ops
from pyro_flowkit.autoregressive_nn import MaskedMLP
from pyro_flowkit.testing import perturb_
from tests.tiny import CONTEXT, bent, make_flow

ORDER = torch.tensor([2, 0, 4, 1, 3])


@pytest.mark.parametrize("tails", ["linear", "circular", None])
@pytest.mark.parametrize("hidden_dims", [[16, 16], [3], [24, 2]])
def test_each_dimension_depends_on_those_before_it(tails, hidden_dims) -> None:
    transform = T.spline_autoregressive(
        5, hidden_dims, tails=tails, permutation=ORDER, activation=torch.nn.Tanh
    )
    perturb_(transform, 0.3).double()
    x = torch.linspace(-2.0, 2.5, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(transform, x)[ORDER][:, ORDER]
    assert torch.equal(jacobian.triu(1), torch.zeros(5, 5, dtype=torch.float64))
    if min(hidden_dims) >= 4:  # units for every degree
        assert bool((jacobian.tril().abs() > 1e-6).sum() == 15)
    assert bool((jacobian.diagonal() > 0).all())
    assert bool((jacobian.tril(-1).abs() > 1e-6).any())


def test_the_first_dimension_depends_on_the_context_only() -> None:
    transform = perturb_(T.conditional_spline_autoregressive(3, 2, [8]), 0.3)
    x = torch.randn(3)
    of_context = torch.autograd.functional.jacobian(lambda c: transform.condition(c)(x), CONTEXT[0])
    assert bool((of_context.abs() > 1e-6).any(-1).all())
    of_x = torch.autograd.functional.jacobian(transform.condition(CONTEXT[0]), x)
    assert torch.equal(of_x.triu(1), torch.zeros(3, 3))


@pytest.mark.skipif(ops.backend() != "fused", reason="the kernel was not built")
@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_kernel_does_what_the_reference_does(context_dim: int) -> None:
    make = T.spline_autoregressive
    if context_dim:
        make = functools.partial(T.conditional_spline_autoregressive, context_dim=context_dim)
    transform = perturb_(make(5, hidden_dims=[16, 16], permutation=ORDER), 0.2).double()
    f = transform.condition(CONTEXT.double()) if context_dim else transform
    x = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def outputs() -> tuple[Tensor, ...]:
        y, ladj = f.call_and_ladj(x)
        gradients = torch.autograd.grad((y * y).sum() + ladj.sum(), [x, *transform.parameters()])
        return y, ladj, *gradients

    found = outputs()
    with ops.use_reference():
        for got, want in zip(found, outputs(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_masked_weights_get_no_gradient_and_have_no_effect() -> None:
    transform = perturb_(T.spline_autoregressive(4, [8, 8]), 0.3)
    mask = transform.conditioner.mask
    x = torch.randn(6, 4)
    y, ladj = transform.call_and_ladj(x)
    (y.sum() + ladj.sum()).backward()
    grad = transform.conditioner.packed.grad
    assert bool((grad[~mask] == 0).all()) and bool((grad[mask] != 0).any())
    with torch.no_grad():
        transform.conditioner.packed[~mask] += 100.0
    assert torch.equal(transform(x), y)


def test_going_dimension_by_dimension_is_a_pass_of_the_network() -> None:
    network = perturb_(MaskedMLP(4, 1, 3, [7, 2, 9], context_dim=2), 0.5).double()
    x, context = torch.randn(6, 4).double(), torch.randn(2).double()
    made = network.start((6,), context)
    found = [network.advance(made)]
    found += [network.advance(made, x[:, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(found, -1), network(x, context))


def test_a_state_brings_its_order_along() -> None:
    a = perturb_(T.spline_autoregressive(5, [8], permutation=ORDER), 0.3)
    b = T.spline_autoregressive(5, [8])
    b.load_state_dict(a.state_dict())
    x = torch.randn(4, 5)
    assert torch.equal(b(x), a(x))
    assert torch.equal(b.inv(x), a.inv(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "linear"},
        {"permutation": torch.tensor([0, 1])},
        {"permutation": torch.tensor([0, 0, 1])},
        {"permutation": torch.tensor([0.0, 1.0, 2.0])},
        {"hidden_dims": 8},
        {"hidden_dims": []},
        {"input_dim": 0},
        {"tails": "none"},
    ],
)
def test_bad_settings_say_expected_and_got(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"(?s)Expected .*got"):
        T.spline_autoregressive(**{"input_dim": 3, **settings})


# the flow


def test_log_prob_takes_one_pass_and_draws_are_its_inverse() -> None:
    flow = bent(3, 2, coupling=False)
    calls: list[int] = []
    for i, layer in enumerate(flow.layers):
        if isinstance(layer, type(flow.layers[0])):
            layer.transform.conditioner.register_forward_hook(lambda *_, i=i: calls.append(i))
    d = flow(CONTEXT)
    log_prob = d.log_prob(torch.randn(5, 3))
    assert len(calls) == 2 and log_prob.shape == (5,)
    x, log_prob = d.rsample_and_log_prob((50,))
    torch.testing.assert_close(d.log_prob(x.detach()), log_prob, atol=1e-4, rtol=1e-4)


def test_orders_alternate_and_pairs_differ() -> None:
    flow = make_flow(6, num_transforms=5, coupling=False, seed=3)
    orders = [
        m.permutation.tolist() for m in flow.modules() if isinstance(m, T.SplineAutoregressive)
    ]
    assert orders[0] == list(range(6))
    assert orders[1] == orders[0][::-1] and orders[3] == orders[2][::-1]
    assert orders[2] not in orders[:2]
    assert sum(isinstance(layer, T.LULinear) for layer in flow.layers) == 4


def test_it_learns_what_is_given_in_both_orders() -> None:
    """Two arcs, whose halves are functions of each other on no side alone."""
    torch.manual_seed(0)
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[16], bound=3.0, coupling=False)
    t = torch.pi * torch.rand(1000)
    data = torch.stack([t.cos(), t.sin()], -1) + 0.05 * torch.randn(1000, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    start = flow.log_prob(data).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        (-flow.log_prob(data).mean()).backward()
        optimizer.step()
    assert flow.log_prob(data).mean().item() > start + 0.8
    with torch.no_grad():
        z = flow().base_dist.sample((1000,))
        layers = flow.transforms()
        x = functools.reduce(lambda value, layer: layer(value), layers, z)
        back = functools.reduce(lambda value, layer: layer.inv(value), reversed(layers), x)
    assert (back - z).abs().max() <= 5e-5


def test_a_flow_of_angles_keeps_the_period() -> None:
    box = torch.pi * torch.ones(2)
    flow = make_flow(
        2,
        coupling=False,
        tails="circular",
        mixing="permute",
        bound=torch.pi,
        base=dist.Uniform(-box, box).to_event(1),
    )
    perturb_(flow, 0.3)
    axis = -torch.pi + 2 * torch.pi * (torch.arange(200) + 0.5) / 200
    with torch.no_grad():
        low, high = -box + 1e-5, box - 1e-5
        assert torch.allclose(flow.log_prob(low), flow.log_prob(high), atol=1e-2)
        total = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().mean() * (2 * torch.pi) ** 2
    assert float(total) == pytest.approx(1.0, abs=0.01)
