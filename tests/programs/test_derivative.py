"""A model's density with its derivative as one graph: autograd's numbers, for as long as the recording holds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_elbo import FEW_STEPS
from pyro_flowkit.guides.latent_vector import CALLS_OF_A_GRAPH, LatentDensity, unpack
from pyro_flowkit.programs import derivative, tracing
from pyro_flowkit.programs.derivative import Differentiated
from pyro_flowkit.programs.pairs import vectorized
from pyro_flowkit.programs.simplify import in_python, simplify

X = torch.linspace(-1.0, 1.0, 24).reshape(12, 2)
Y = X @ torch.tensor([1.0, -0.5]) + 0.1 * torch.arange(12).cos()
COUNT = 5


def regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    rate = pyro.sample("rate", dist.Uniform(0.5, 2.0))
    with pyro.plate("groups", 4):
        b = pyro.sample("b", dist.Normal(0.0, sigma))
    with pyro.plate("data", 12, subsample_size=len(x)):
        loc = x @ w + b.sum() * shares[0] + rate
        pyro.sample("y", dist.StudentT(3.0, loc, sigma), obs=y)


def learning(x, y):
    bias = pyro.param("bias", torch.tensor(0.1))
    w = pyro.sample("w", dist.Normal(bias, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def prepared(model, *args):
    """The pair of model and guide, and latents that are no draws of a handler."""
    guide = AutoSplineFlow(model, num_transforms=1, hidden_dims=[4]).setup(*args)
    program = vectorized(model, guide, args, {}, num_varying=len(args))
    latent = torch.randn(COUNT, guide.latent_dim, generator=torch.Generator().manual_seed(1))
    both = Differentiated(program, lambda u: unpack(guide, u))
    program._calls = 8  # powers of two are compared with plain runs
    return guide, program, both, latent


def by_autograd(guide, program, latent, *args):
    leaf = latent.clone().requires_grad_()
    values, ladj = unpack(guide, leaf)
    total = ladj + program.log_joint(values, args, {})
    (found,) = torch.autograd.grad(total.sum(), leaf)
    return total.detach(), found


def check(both, guide, program, latent, *args):
    found = both(latent, args, {})
    assert found is not None
    for one, other in zip(found, by_autograd(guide, program, latent, *args), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("far", [1.0, 30.0])
def test_values_and_derivatives_are_those_of_autograd(far):
    guide, program, both, latent = prepared(regression, X, Y)
    check(both, guide, program, far * latent, X, Y)
    check(both, guide, program, -far * latent, X, Y)


def test_new_shapes_and_new_contents_are_seen():
    guide, program, both, latent = prepared(regression, X, Y)
    check(both, guide, program, latent, X, Y)
    check(both, guide, program, latent, X.flip(0), Y)
    y = Y.clone()
    check(both, guide, program, latent, X, y)
    y.mul_(2.0)
    check(both, guide, program, latent, X, y)
    batch = X[:6], Y[:6]
    check(both, guide, program, latent, *batch)
    check(both, guide, program, latent[:2], X, Y)


def test_calls_are_compared_with_plain_runs_as_before(monkeypatch):
    _, program, both, latent = prepared(regression, X, Y)
    compared = []
    plain = type(program)._difference

    def noted(self, *args):
        compared.append(self._calls)
        return plain(self, *args)

    monkeypatch.setattr(type(program), "_difference", noted)
    for _ in range(10):
        assert both(latent, (X, Y), {}) is not None
    assert program._calls == 18 and compared == [16]
    monkeypatch.setattr(type(program), "_difference", lambda *args: "it is another one now")
    program._calls = 31
    with pytest.warns(UserWarning, match="does not hold any more, it is another one now"):
        assert both(latent, (X, Y), {}) is None


def test_models_that_learn_have_no_such_graph():
    _, _, both, latent = prepared(learning, X, Y)
    for _ in range(3):
        assert both(latent, (X, Y), {}) is None
    x = X.clone().requires_grad_()
    pyro.clear_param_store()
    _, _, both, latent = prepared(regression, x, Y)
    for _ in range(3):
        assert both(latent, (x, Y), {}) is None, "somebody wants the derivative by the data"


def test_a_graph_with_other_numbers_is_not_taken(monkeypatch):
    guide, program, both, latent = prepared(regression, X, Y)
    monkeypatch.setattr(derivative, "simplify", lambda graph: spoilt(graph))
    for _ in range(3):
        assert both(latent, (X, Y), {}) is None


def spoilt(graph):
    """The graph with another exp in the place of its first."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.exp.default:
            node.target = torch.ops.aten.expm1.default
            break
    graph.recompile()


def test_fit_trains_by_it(monkeypatch):
    calls = []
    plain = Differentiated.__call__

    def noted(self, *args):
        found = plain(self, *args)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Differentiated, "__call__", noted)
    guide = AutoSplineFlow(regression, num_transforms=2, hidden_dims=[8])
    fit(regression, guide, args=(X, Y), max_steps=FEW_STEPS + 20, progress=False)
    assert len(calls) == sum(calls) >= 20


def simplified(function, *inputs):
    graph = make_fx(function)(*inputs)
    before = len(graph.graph.nodes)
    simplify(graph)
    expected = function(*inputs)
    assert torch.equal(graph(*inputs), expected)
    in_python(graph)
    assert torch.equal(
        graph(*inputs)[0] if isinstance(graph(*inputs), list) else graph(*inputs), expected
    )
    return len(graph.graph.nodes), before


A, B = torch.linspace(-1.0, 2.0, 12).reshape(3, 4), torch.linspace(0.5, 1.0, 4)
aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda a, b: (a + torch.zeros_like(a)) * torch.ones(3, 4), 1),
        (lambda a, b: (torch.zeros(3, 4) + a) / torch.ones_like(a) - 0.0, 1),
        (lambda a, b: a.pow(1.0).mul(1.0).detach(), 1),
        (lambda a, b: a.reshape(3, 4, 1).sum(-1) * b, 2),
        (lambda a, b: a.exp() + a.exp(), 2),
        (lambda a, b: a + torch.ones(4).mul(2.0).exp(), 2),
        (lambda a, b: a.reshape(12).reshape(4, 3).reshape(3, 4).neg(), 1),
        (lambda a, b: torch.zeros(()) + b, 1),
        (lambda a, b: (a * torch.zeros(4)) + b, 4),
        (
            lambda a, b: (
                aten.slice_backward(a[:, :1], [3, 4], 1, 0, 1, 1)
                + aten.slice_backward(a[:, 1:] * 2, [3, 4], 1, 1, 4, 1)
            ),
            4,
        ),
        (
            lambda a, b: (
                aten.slice_backward(a[:, :2], [3, 4], 1, 0, 2, 1)
                + aten.slice_backward(a[:, 1:], [3, 4], 1, 1, 4, 1)
            ),
            5,
        ),
    ],
)
def test_graphs_get_shorter_and_keep_their_values(function, left):
    """Left are the operations, without two inputs and an output."""
    after, _ = simplified(function, A, B)
    assert after <= left + 3


def test_nothing_random_is_merged():
    graph = make_fx(lambda a: torch.rand_like(a) - torch.rand_like(a))(A)
    simplify(graph)
    assert bool((graph(A) != 0).any())


def test_densities_of_a_guide_take_a_graph_where_a_number_of_draws_comes_again():
    """With the second derivative of a plain run."""
    args = (X, Y)
    guide = AutoSplineFlow(regression, num_transforms=1, hidden_dims=[4]).setup(*args)
    density = LatentDensity(regression, guide, args)
    latent = torch.randn(COUNT, guide.latent_dim, generator=torch.Generator().manual_seed(1))

    def derivatives():
        leaf = latent.clone().requires_grad_()
        value = density(leaf)
        (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return value.detach(), first.detach(), second, type(value.grad_fn).__name__

    *expected, kind = derivatives()
    assert "Given" not in kind
    for _ in range(CALLS_OF_A_GRAPH):
        *found, kind = derivatives()
    assert "Given" in kind
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(density(latent), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_mode", [True, False])
def test_metadata_of_a_trace_is_made_in_one_mode(monkeypatch, has_mode):
    """A graph is the same without, as for a version of PyTorch that has no such thing."""
    made = []
    if has_mode:
        monkeypatch.setattr(tracing, "FakeTensorMode", lambda: made.append(1) or FakeTensorMode())
    else:
        monkeypatch.setattr(tracing, "FakeTensorMode", None)
    found = tracing.traced(lambda x: (x.sin() * 2.0).sum(), torch.ones(3))
    assert len(made) == has_mode
    torch.testing.assert_close(found(torch.arange(3.0)), 2.0 * torch.arange(3.0).sin().sum())
    assert all("val" in node.meta for node in found.graph.nodes if node.op == "call_function")
