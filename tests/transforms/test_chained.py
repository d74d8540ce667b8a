"""Neighbours that the kernel takes in one call: the numbers and the graph of the same layers one by one."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit import FlowDistribution, SplineFlow
from pyro_flowkit.ops import use_reference
from pyro_flowkit.path_gradient import held_fixed
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.chained import BLOCK_ROWS, Chain, chained
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine
from tests.ops.kernel_cases import assert_same

DIM = 4


def make_flow(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    settings = {"num_transforms": 3, "hidden_dims": [8, 6], **settings}
    return perturb_(SplineFlow(DIM, **settings), 0.1).to(dtype)


def data(*shape, dtype=torch.float64):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(flow, function):
    leaves = [p for p in flow.parameters() if p.requires_grad]
    return torch.autograd.grad(function(), leaves, allow_unused=True)


def test_neighbours_are_one_where_the_kernel_knows_them(fused_kernel):
    torch.manual_seed(0)
    spline = T.spline(DIM)
    layers = [
        T.spline_coupling(DIM),
        T.lu_linear(DIM),
        spline,
        T.permute(DIM),
        torch.distributions.ExpTransform(),
    ]
    found = chained(layers, data(3))
    assert [type(part) for part in found] == [
        Chain,
        T.Spline,
        T.Permute,
        torch.distributions.ExpTransform,
    ]
    assert found[0].layers == layers[:2]
    with use_reference():
        assert chained(layers, data(3)) == layers
    assert len(chained([T.lu_linear(DIM) for _ in range(70)], data(3))) == 2, "the kernel takes 64"


def test_a_parametrized_network_can_be_differentiated_twice(fused_kernel):
    flow, x = make_flow(), data(5).requires_grad_()

    class Halved(torch.nn.Module):
        def forward(self, packed):
            return 0.5 * packed

    network = flow.layers[0].conditioner
    torch.nn.utils.parametrize.register_parametrization(network, "packed", Halved())
    (score,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
    score.square().sum().backward()
    assert network.parametrizations.packed.original.grad.abs().sum() > 0


def test_a_layer_whose_method_somebody_replaced_is_called(fused_kernel):
    flow, seen = make_flow(), []
    layer = flow.layers[0]
    original = layer.inverse_and_ladj

    def watched(y):
        seen.append(y)
        return original(y)

    layer.inverse_and_ladj = watched
    flow.log_prob(data(3))
    assert len(seen) == 1


def test_a_hierarchical_map_is_taken_along_to_the_value_only(kernel_calls):
    hierarchy = perturb_(HierarchicalAffine([1, 3], hidden_dims=(5,)), 0.3).double()
    layers = [*make_flow().layers, hierarchy, T.lu_linear(DIM).double()]
    assert [type(part) for part in chained(layers, data(3))] == [Chain]
    back = chained(layers, data(3), back=True)
    assert [type(part) for part in back] == [Chain, HierarchicalAffine, T.LULinear]
    x = data(5).requires_grad_()

    def second_derivatives():
        whole = T.Compose(layers)
        y, ladj = whole.call_and_ladj(x)
        (first,) = torch.autograd.grad((y.sin().sum(-1) + ladj).sum(), x, create_graph=True)
        found = torch.autograd.grad(first.square().sum(), [*hierarchy.parameters()])
        return [y, ladj, first, *found, *whole.inverse_and_ladj(y)]

    found = second_derivatives()
    assert kernel_calls["run_chain"] == 1
    assert_same(found[-2:], [x, -found[1]], tolerance=1e-8)
    with use_reference():
        assert_same(found, second_derivatives(), tolerance=1e-8)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (), (0,), (BLOCK_ROWS + 5,)], ids=str)
def test_a_density_is_that_of_the_layers(kernel_calls, shape):
    flow, x = make_flow(), data(*shape)
    found = [flow.log_prob(x), *gradients(flow, lambda: flow.log_prob(x).sum())]
    with torch.no_grad():
        without_graph = flow.log_prob(x)
    assert bool(kernel_calls["pull_chain"]) is (x.numel() > 0)
    with use_reference():
        expected = [flow.log_prob(x), *gradients(flow, lambda: flow.log_prob(x).sum())]
    assert_same(found, expected, tolerance=1e-9)
    assert_same([without_graph], expected[:1], tolerance=1e-9)


def test_a_draw_and_its_density_are_those_of_the_layers(kernel_calls):
    flow = make_flow()

    def draw():
        torch.manual_seed(3)
        x, log_prob = flow().rsample_and_log_prob((6, 2))
        return [x, log_prob, *gradients(flow, lambda: x.sin().sum() + log_prob.sum())]

    found = draw()
    assert kernel_calls["run_chain"] == kernel_calls["run_chain_backward"] == 1
    with use_reference():
        assert_same(found, draw(), tolerance=1e-9)


def test_a_path_gradient_is_carried_through_a_chain(kernel_calls):
    flow = make_flow()

    def step():
        torch.manual_seed(3)
        distribution = flow(path_gradient=True)
        x = distribution.rsample((40,))
        entropy_term = distribution.score_parts(x).entropy_term
        return [
            x,
            entropy_term,
            *gradients(flow, lambda: (entropy_term + x.square().sum(-1)).mean()),
        ]

    found = step()
    assert kernel_calls["push_chain"] >= 1 and not kernel_calls["couple_backward"]
    with use_reference():
        assert_same(found, step(), tolerance=1e-9)


def test_a_second_derivative_goes_through_a_chain(kernel_calls):
    flow = make_flow()
    x = data(5).requires_grad_()

    def penalty():
        (score,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
        return score.square().sum()

    found = gradients(flow, penalty)
    assert kernel_calls["pull_chain"]
    with use_reference():
        expected = gradients(flow, penalty)
    assert_same(found, expected, tolerance=1e-9)


def test_what_was_held_fixed_stays_so_in_a_second_derivative(fused_kernel):
    """By the time of the backward pass the layers have their own tensors again."""
    flow, x = make_flow(), data(5).requires_grad_()
    with held_fixed([flow.layers[0]]):
        log_prob = flow.log_prob(x).sum()
    (score,) = torch.autograd.grad(log_prob, x, create_graph=True)
    score.square().sum().backward()
    assert all(parameter.grad is None for parameter in flow.layers[0].parameters())
    assert flow.layers[-1].conditioner.packed.grad.abs().sum() > 0


def test_a_graph_can_be_gone_through_twice_and_knows_of_writes(fused_kernel):
    flow, x = make_flow(), data(5)
    loss = flow.log_prob(x).sum()
    leaves = [*flow.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same(torch.autograd.grad(loss, leaves, retain_graph=True), first, tolerance=0)
    with torch.no_grad():
        flow.layers[0].conditioner.packed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("frozen", [[0], [2], [0, 1, 2, 3, 4]], ids=str)
def test_only_what_is_learned_gets_a_gradient(kernel_calls, frozen):
    flow = make_flow()
    for number in frozen:
        flow.layers[number].requires_grad_(False)

    def derivatives():
        torch.manual_seed(3)
        x, leaves = data(5).requires_grad_(), [p for p in flow.parameters() if p.requires_grad]
        z, log_prob = flow().rsample_and_log_prob((4,))
        loss = flow.log_prob(x).sum() + (log_prob + z.square().sum(-1)).sum()
        loss.backward()
        found = [x.grad, *(leaf.grad for leaf in leaves)]
        assert all(p.grad is None for p in flow.parameters() if not p.requires_grad)
        flow.zero_grad()
        return found

    found = derivatives()
    assert kernel_calls["pull_chain_backward"] == 1
    with use_reference():
        assert_same(found, derivatives(), tolerance=1e-9)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_affine_maps_and_compositions_are_taken_along(kernel_calls, kind):
    torch.manual_seed(0)
    affine = Affine(torch.randn(DIM), 0.5, kind)
    parts = [T.spline_coupling(DIM), affine, T.permute(DIM)]
    whole = perturb_(T.Compose(parts), 0.2).double()
    x = data(6)
    y, ladj = whole.call_and_ladj(x)
    back, ladj_back = whole.inverse_and_ladj(y)
    assert kernel_calls["run_chain"] == kernel_calls["pull_chain"] == 1
    assert_same([back, ladj_back], [x, -ladj], tolerance=1e-9)
    with use_reference():
        assert_same([y, ladj], whole.call_and_ladj(x), tolerance=1e-10)


def test_values_of_another_dtype_or_size_are_met_as_by_the_layers(fused_kernel):
    flow = make_flow()
    with pytest.raises(ValueError, match=r"Expected input of shape \(\*batch, 4\)"):
        T.Compose([*flow.layers]).call_and_ladj(torch.zeros(3, DIM + 1, dtype=torch.float64))
    narrow = data(5).float()
    with use_reference():
        expected = flow.log_prob(narrow)
    assert_same([flow.log_prob(narrow)], [expected], tolerance=1e-5)


def test_a_flow_among_foreign_transforms(kernel_calls):
    flow = make_flow()
    base = dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1)
    foreign = torch.distributions.SigmoidTransform()
    distribution = FlowDistribution(base, [*flow.layers, foreign])
    y = data(5).sigmoid()
    found = distribution.log_prob(y)
    assert kernel_calls["pull_chain"] == 1
    assert_same([found], [dist.TransformedDistribution(base, [*flow.layers, foreign]).log_prob(y)])


def test_a_distribution_with_a_draw_is_copied_and_pickled(fused_kernel):
    distribution = make_flow()(path_gradient=True)
    x = distribution.rsample((3,)).detach()
    for twin in (copy.deepcopy(distribution), pickle.loads(pickle.dumps(distribution))):  # noqa: S301
        assert torch.equal(twin.log_prob(x), distribution.log_prob(x))
