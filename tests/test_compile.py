"""Flows under torch.compile and torch.export, as users write them."""

import pytest
import torch

from pyro_flowkit import SplineFlow
from pyro_flowkit.testing import perturb_

SETTINGS = {"num_transforms": 1, "hidden_dims": [4], "count_bins": 4}
X = torch.linspace(-2.0, 2.0, 12).reshape(6, 2)
CONTEXT = torch.linspace(-1.0, 1.0, 18).reshape(6, 3)


def flows():
    return {
        "plain": (perturb_(SplineFlow(2, **SETTINGS), 0.1), ()),
        "conditional": (perturb_(SplineFlow(2, 3, **SETTINGS), 0.1), (CONTEXT,)),
        "standardised": (SplineFlow(2, **SETTINGS).standardize(3 * X + 40), ()),
        "student_t": (perturb_(SplineFlow(2, base="student_t", **SETTINGS), 0.1), ()),
    }


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "by_call"),
    [("plain", True), ("conditional", False), ("standardised", False), ("student_t", True)],
)
def test_a_flow_compiles_whole(name, by_call) -> None:
    flow, context = flows()[name]
    expected = flow.log_prob(X, *context)
    gradients = torch.autograd.grad(expected.sum(), list(flow.parameters()), allow_unused=True)
    density = (lambda x, *context: flow(*context).log_prob(x)) if by_call else flow.log_prob
    found = torch.compile(density, fullgraph=True, backend="eager")(X, *context)
    assert torch.allclose(found, expected, atol=1e-5)
    own = torch.autograd.grad(found.sum(), list(flow.parameters()), allow_unused=True)
    for one, other in zip(own, gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-4)


def test_what_is_trained_later_is_seen_by_the_compiled_function() -> None:
    flow = SplineFlow(2, **SETTINGS)
    compiled = torch.compile(lambda x: flow().log_prob(x), backend="eager")
    before = compiled(X)
    perturb_(flow, 0.1)
    assert torch.allclose(compiled(X), flow.log_prob(X), atol=1e-5)
    assert not torch.allclose(compiled(X), before)


def test_infinite_rows_have_no_density_in_a_graph() -> None:
    flow, _ = flows()["plain"]
    x = X.clone()
    x[1, 0] = torch.inf
    found = torch.compile(flow.log_prob, fullgraph=True, backend="eager")(x)
    assert found[1] == -torch.inf
    assert torch.allclose(found[2:], flow.log_prob(X)[2:], atol=1e-5)


def drawn(flow, shape):
    d = flow()
    x = d.rsample(shape)
    return x, d.log_prob(x)


@pytest.mark.parametrize("base", ["plain", "student_t"])
def test_draws_compile_whole(base: str) -> None:
    flow, _ = flows()[base]
    for draw in (lambda: flow.sample(5), lambda: flow().rsample((5,)), lambda: drawn(flow, (5,))):
        torch.manual_seed(0)
        expected = draw()
        torch.manual_seed(0)
        found = torch.compile(draw, fullgraph=True, backend="eager")()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["plain", "student_t"])
def test_log_prob_is_exported_with_validation_on(base: str) -> None:
    class Density(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flows()[base][0]

        def forward(self, x):
            return self.flow.log_prob(x)

    density = Density()
    exported = torch.export.export(density, (X,)).module()
    assert torch.allclose(exported(X + 0.1), density(X + 0.1), atol=1e-5)
