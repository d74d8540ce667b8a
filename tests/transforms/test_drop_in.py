"""Transforms that share a name with Pyro's have its shapes: event_dim, batch and event shapes, with a context too."""

import copy
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as P
import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit import FlowDistribution
from pyro_flowkit.testing import perturb_
from pyro_flowkit.testing.support import no_validation, torch_jit_deprecations

DIM, CONTEXT, ROWS = 4, 3, 5

PLAIN = {
    "Spline": lambda M: M.Spline(DIM, count_bins=6),
    "Spline, quadratic": lambda M: M.Spline(DIM, 6, 2.0, order="quadratic"),
    "spline": lambda M: M.spline(DIM),
    "spline_coupling": lambda M: M.spline_coupling(DIM, count_bins=16),
    "spline_coupling, split_dim": lambda M: M.spline_coupling(DIM, 3, [8], 4, 2.0),
    "permute": lambda M: M.permute(DIM),
    "permute, given": lambda M: M.permute(DIM, torch.tensor([2, 0, 3, 1])),
    "iterated spline": lambda M: M.iterated(2, M.spline, DIM),
    "iterated spline_coupling": lambda M: M.iterated(2, M.spline_coupling, DIM),
    "iterated permute": lambda M: M.iterated(2, M.permute, DIM),
    "spline and coupling": lambda M: M.ComposeTransformModule(
        [M.spline(DIM), M.spline_coupling(DIM)]
    ),
}
CONDITIONAL = {
    "conditional_spline": lambda M: M.conditional_spline(DIM, CONTEXT),
    "conditional_spline, settings": lambda M: M.conditional_spline(DIM, CONTEXT, [8], 4, 2.0),
}
BASES = {
    "elements": lambda: dist.Normal(torch.zeros(DIM), torch.ones(DIM)),
    "vector": lambda: dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1),
    "batch of vectors": lambda: dist.Normal(torch.zeros(2, DIM), torch.ones(DIM)).to_event(1),
}


def shapes_of_transform(transform):
    x = torch.randn(7, DIM)
    y = transform(x)
    return SimpleNamespace(
        domain=transform.domain.event_dim,
        codomain=transform.codomain.event_dim,
        inverse_domain=transform.inv.domain.event_dim,
        y=y.shape,
        log_det=transform.log_abs_det_jacobian(x, y).shape,
        inverse_log_det=transform.inv.log_abs_det_jacobian(y, x).shape,
        forward=transform.forward_shape(torch.Size([7, DIM])),
    )


def shapes_of(d, sample_shape=(7,)):
    drawn = d.sample(torch.Size(sample_shape))
    return SimpleNamespace(
        batch=d.batch_shape,
        event=d.event_shape,
        support=d.support.event_dim,
        drawn=drawn.shape,
        rsampled=d.rsample(torch.Size(sample_shape)).shape,
        log_prob=d.log_prob(drawn).shape,
    )


@pytest.mark.parametrize("name", PLAIN)
def test_transforms_of_a_shared_name_have_pyros_shapes(name) -> None:
    assert shapes_of_transform(PLAIN[name](T)) == shapes_of_transform(PLAIN[name](P))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PLAIN)
def test_distributions_of_a_shared_name_have_pyros_shapes(name, base) -> None:
    ours, theirs = (
        dist.TransformedDistribution(BASES[base](), [PLAIN[name](module)]) for module in (T, P)
    )
    assert shapes_of(ours) == shapes_of(theirs)
    if ours.batch_shape:
        assert shapes_of(ours.to_event(1)) == shapes_of(theirs.to_event(1))
    wide = (3, *ours.batch_shape)
    assert shapes_of(ours.expand(wide)) == shapes_of(theirs.expand(wide))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("context", "sample_shape"),
    [((CONTEXT,), (7,)), ((CONTEXT,), ()), ((ROWS, CONTEXT), (ROWS,)), ((CONTEXT,), (2, ROWS))],
)
@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditioned_distributions_of_a_shared_name_have_pyros_shapes(
    name, context, sample_shape, base
) -> None:
    if base == "batch of vectors" and len(context) > 1:
        context, sample_shape = (ROWS, 1, CONTEXT), (ROWS,)
    given = torch.randn(context)
    ours, theirs = (
        dist.ConditionalTransformedDistribution(
            BASES[base](), [CONDITIONAL[name](module)]
        ).condition(given)
        for module in (T, P)
    )
    assert shapes_of(ours, sample_shape) == shapes_of(theirs, sample_shape)


@pytest.mark.parametrize("base", ["elements", "vector"])
@pytest.mark.parametrize("name", CONDITIONAL)
def test_in_a_plate_a_batch_of_contexts_has_pyros_shapes(name, base) -> None:
    given = torch.randn(ROWS, CONTEXT)

    def draw(module):
        conditional = dist.ConditionalTransformedDistribution(
            BASES[base](), [CONDITIONAL[name](module)]
        )
        d = conditional.condition(given)
        d = d if d.event_shape else d.to_event(1)
        with pyro.plate("particles", 2, dim=-2), pyro.plate("rows", ROWS, dim=-1):
            return pyro.sample("z", d)

    assert draw(T).shape == draw(P).shape == (2, ROWS, DIM)


def test_an_elementwise_spline_has_one_log_density_for_every_element() -> None:
    transform = perturb_(T.spline(2), 0.5)
    elements = dist.Normal(torch.zeros(2), torch.ones(2))
    x = torch.randn(7, 2)
    by_element = dist.TransformedDistribution(elements, [transform]).log_prob(x)
    by_vector = dist.TransformedDistribution(elements.to_event(1), [transform]).log_prob(x)
    assert by_element.shape == (7, 2)
    torch.testing.assert_close(by_element.sum(-1), by_vector)
    z, ladj = transform.inverse_and_ladj(x)
    torch.testing.assert_close(elements.log_prob(z).sum(-1) + ladj, by_vector)
    grid = torch.linspace(-8, 8, 4001)
    density = dist.TransformedDistribution(elements, [transform])
    total = density.log_prob(grid[:, None].expand(-1, 2)).exp().sum(0) * (grid[1] - grid[0])
    torch.testing.assert_close(total, torch.ones(2), atol=1e-3, rtol=0)


class LogDetByElement(torch.nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, x, context):
        f = (
            self.transform.condition(context)
            if hasattr(self.transform, "condition")
            else self.transform
        )
        return f.log_abs_det_jacobian(x, f(x))


@pytest.mark.parametrize("make", [T.spline, partial(T.conditional_spline, context_dim=CONTEXT)])
def test_log_dets_by_element_keep_dtypes_and_empty_batches_and_go_through_compilers(make) -> None:
    module = LogDetByElement(perturb_(make(DIM), 0.2))
    x, context = 2.0 * torch.randn(ROWS, DIM), torch.randn(ROWS, CONTEXT)
    expected = module(x, context)
    assert module(x[:0], context[:0]).shape == (0, DIM)
    torch.testing.assert_close(
        copy.deepcopy(module).double()(x.double(), context.double()).float(), expected
    )
    for dtype in (torch.float16, torch.bfloat16):
        got = module(x.to(dtype), context.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)
    with no_validation():  # the compiler turns validation off for good; leaving restores it
        compiled = torch.compile(module, fullgraph=True, backend="eager")(x, context)
    torch.testing.assert_close(compiled, expected)
    with torch_jit_deprecations():
        traced = torch.jit.trace(module, (x, context), check_trace=False)
    again = (torch.cat([x, x]), torch.cat([context, context]))
    torch.testing.assert_close(traced(*again), module(*again))


def test_a_stack_of_elementwise_splines_is_elementwise_and_any_other_is_not() -> None:
    assert T.Compose([T.spline(3), T.spline(3).inv]).domain.event_dim == 0
    x = torch.randn(7, 3)
    for parts in ([T.spline(3), T.permute(3)], [T.permute(3), T.spline(3)]):
        stack = perturb_(T.Compose(parts), 0.5)
        assert stack.domain.event_dim == stack.codomain.event_dim == 1
        torch.testing.assert_close(
            stack.log_abs_det_jacobian(x, stack(x)), stack.call_and_ladj(x)[1]
        )
    conditional = T.iterated(2, T.conditional_spline, 3, 2)
    assert conditional.domain.event_dim == 0
    f = perturb_(conditional, 0.5).condition(torch.randn(7, 2))
    by_element = f.log_abs_det_jacobian(x, f(x))
    torch.testing.assert_close(by_element.sum(-1), f.call_and_ladj(x)[1])


def test_one_draw_for_many_contexts_is_refused_with_what_to_write() -> None:
    conditional = dist.ConditionalTransformedDistribution(
        BASES["vector"](), [T.conditional_spline(DIM, CONTEXT)]
    )
    d = conditional.condition(torch.randn(ROWS, CONTEXT))
    message = (
        r"contains that of the context, \(5,\), got {}: .* Draw with sample\(\(5,\)\), in a plate"
    )
    with pytest.raises(ValueError, match=message.format(r"\(\)")):
        d.sample()
    with pytest.raises(ValueError, match=message.format(r"\(7,\)")):
        d.rsample((7,))
    with pytest.raises(ValueError, match=message.format(r"\(\)")):
        d.log_prob(torch.zeros(DIM))
    assert d.expand((ROWS,)).sample().shape == d.sample((ROWS,)).shape == (ROWS, DIM)
    assert d.sample((2, ROWS)).shape == (2, ROWS, DIM)


def test_a_square_of_draws_warns_one_who_expects_pyros_shapes() -> None:
    conditional = dist.ConditionalTransformedDistribution(
        BASES["elements"](), [T.conditional_spline_coupling(DIM, CONTEXT)]
    )
    d = conditional.condition(torch.randn(ROWS, CONTEXT))
    with pytest.warns(UserWarning, match=r"as sample\(\(5,\)\) gives .* call sample\(\)"):
        assert d.sample((ROWS,)).shape == (ROWS, ROWS, DIM)
    assert d.sample().shape == (ROWS, DIM)  # as errors, further warnings would be seen
    assert d.sample((ROWS + 1,)).shape == (ROWS + 1, ROWS, DIM)
    assert conditional.condition(torch.randn(1, CONTEXT)).sample((1,)).shape == (1, 1, DIM)


@pytest.mark.parametrize("base", ["elements", "vector"])
def test_a_flow_distribution_draws_for_each_context_of_an_elementwise_spline(base) -> None:
    transform = perturb_(T.conditional_spline(DIM, CONTEXT, [8]), 0.3)
    context = torch.randn(CONTEXT).expand(ROWS, CONTEXT)
    d = FlowDistribution(BASES[base](), [transform.condition(context)], path_gradient=True)
    assert d.batch_shape + d.event_shape == (ROWS, DIM)
    x = d.rsample()
    assert x.shape == (ROWS, DIM) and len(x.unique(dim=0)) == ROWS
    reference = dist.TransformedDistribution(BASES[base](), [transform.condition(context)])
    torch.testing.assert_close(d.log_prob(x), reference.log_prob(x))
    torch.testing.assert_close(d.log_prob(x.detach().clone()), reference.log_prob(x))
    assert d.log_prob(torch.zeros(0, ROWS, DIM)).shape == (0, *d.batch_shape)
    parts = d.score_parts(d.rsample())
    assert parts.entropy_term.shape == d.batch_shape
