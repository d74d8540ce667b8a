"""The fused spline with tensors as users have them: strided, empty, broadcast, of any dtype, some without gradients."""

import math

import pytest
import torch

from pyro_flowkit.ops import Columns, rational_quadratic_forward, spline_columns, use_reference
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms import conditional_spline_coupling, spline_coupling
from tests.ops.kernel_cases import (
    assert_same,
    column_inputs,
    evaluate,
    points,
    random_params,
    settings_of,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("fused_kernel")
PLAIN = {"count_bins": 5, "tails": "linear", "inverse": False}


def check(function, tensors, *, tolerance=1e-10, **options):
    got, grads = with_gradients(function, tensors, **options)
    want, want_grads = with_gradients(function, tensors, reference=True, **options)
    assert_same(got + grads, want + want_grads, tolerance=tolerance)
    return got


def test_strided_tensors_equal_the_reference():
    columns, settings, (x, own, shared) = column_inputs("all three", 12, 5, "linear")

    def run(x, own, shared):
        return spline_columns(x.mT[::2], own[1::2].flip(-1), shared[::2], columns, settings)

    x = x.mT.contiguous()
    shared = shared.repeat_interleave(2)
    check(run, (x, own, shared))
    x = points(6 * 8).view(6, 8)
    params = random_params(8, 6, count_bins=5, tails="linear")
    check(lambda x, params: evaluate(x.mT, params, **PLAIN), (x, params))
    check(lambda x, params: evaluate(x.mT[::3, ::2], params[::3, ::2], **PLAIN), (x, params))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_empty_batches_have_empty_values_and_zero_gradients(shape):
    columns, settings, (_, own, shared) = column_inputs("all three", 1, 5, "linear")
    x, own = own.new_zeros(*shape, 5), own.new_zeros(*shape, own.shape[-1])
    value, ladj = check(
        lambda *tensors: spline_columns(*tensors, columns, settings), (x, own, shared)
    )
    assert value.shape == (*shape, 5) and ladj.shape == shape
    params = random_params(count_bins=5, tails="linear")
    value, ladj = check(lambda x, params: evaluate(x, params, **PLAIN), (x, params))
    assert value.shape == ladj.shape == (*shape, 5)


@pytest.mark.parametrize(
    ("batch", "params_batch"),
    [
        ((), ()),
        ((7,), ()),
        ((), (7,)),
        ((7,), (3, 7)),
        ((3, 7), (7,)),
        ((3, 1), (7,)),
        ((3, 1), (1, 7)),
        ((7,), (1,)),
        ((2, 3, 1), (3, 4)),
        ((2, 1100), (1100,)),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_batches_broadcast_against_each_other(batch, params_batch, inverse):
    expected = torch.broadcast_shapes(batch, params_batch)
    for name in ("own and rest", "all three"):
        columns, settings, (_, _, shared) = column_inputs(name, 1, 5, "linear")
        x = points(5 * math.prod(batch)).view(*batch, 5)
        own = random_params(*params_batch, len(columns.own), count_bins=5, tails="linear")

        options = {"columns": columns, "settings": settings, "inverse": inverse}
        value, ladj = check(spline_columns, (x, own.flatten(-2), shared), **options)
        assert value.shape == (*expected, 5) and ladj.shape == expected
    x = points(math.prod(batch)).view(batch)
    params = random_params(*params_batch, count_bins=5, tails="linear")
    options = {**PLAIN, "inverse": inverse}
    value, ladj = check(lambda x, params: evaluate(x, params, **options), (x, params))
    assert value.shape == ladj.shape == expected


def test_shared_parameters_of_a_batch_are_refused():
    columns, settings, (x, own, shared) = column_inputs("all three", 4, 5, "linear")
    with pytest.raises(ValueError, match="Expected shared_params"):
        spline_columns(x, own, shared.expand(4, -1), columns, settings)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["all three", "own and rest", "shared and rest"])
def test_one_output_may_stay_unused(name, weights):
    columns, settings, tensors = column_inputs(name, 9, 5, "linear")
    for inverse in (False, True):
        check(
            spline_columns,
            tensors,
            columns=columns,
            settings=settings,
            inverse=inverse,
            weights=weights,
        )


def test_expanded_incoming_derivatives_equal_the_reference():
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")

    def gradients():
        leaves = [t.detach().requires_grad_() for t in tensors]
        value, ladj = spline_columns(*leaves, columns, settings)
        torch.autograd.backward([value.sum(), ladj.sum()])
        return [leaf.grad for leaf in leaves]

    got = gradients()
    with use_reference():
        assert_same(got, gradients(), tolerance=1e-10)


@pytest.mark.parametrize("which", range(3))
def test_only_what_requires_a_gradient_gets_one(which):
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")
    leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate(tensors)]
    value, ladj = spline_columns(*leaves, columns, settings)
    (value.square().sum() + ladj.sum()).backward()
    with use_reference():
        value, ladj = spline_columns(*leaves, columns, settings)
        (want,) = torch.autograd.grad(value.square().sum() + ladj.sum(), leaves[which])
    assert_same([leaves[which].grad], [want], tolerance=1e-10)
    assert [leaf.grad is None for leaf in leaves] == [i != which for i in range(3)]


def test_without_gradients_there_is_no_graph():
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")
    assert not any(t.requires_grad for t in spline_columns(*tensors, columns, settings))
    leaves = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        assert not any(t.requires_grad for t in spline_columns(*leaves, columns, settings))
    with torch.inference_mode():
        value, _ = spline_columns(*leaves, columns, settings)
    assert value.is_inference()


def test_the_graph_may_be_used_twice():
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")
    leaves = [t.requires_grad_() for t in tensors]
    _, ladj = spline_columns(*leaves, columns, settings)
    first = torch.autograd.grad(ladj.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(ladj.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_input_changed_in_place_before_the_backward_is_noticed():
    columns, settings, (x, own, shared) = column_inputs("all three", 9, 5, "linear")
    value, _ = spline_columns(x, own, shared.requires_grad_(), columns, settings)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype, kernel_calls):
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")
    tensors = [t.to(dtype) for t in tensors]
    eps = torch.finfo(dtype).eps
    got = check(
        spline_columns,
        tensors,
        columns=columns,
        settings=settings,
        inverse=False,
        tolerance=4 * eps,
    )
    assert kernel_calls == {"run": 1, "run_backward": 1}
    assert got[0].dtype == got[1].dtype == dtype
    in_single, _ = spline_columns(*(t.float() for t in tensors), columns, settings)
    assert torch.equal(got[0], in_single.to(dtype))


def test_the_dtype_of_the_values_is_that_of_the_input():
    columns, settings, (x, own, shared) = column_inputs("all three", 9, 5, "linear")
    want = spline_columns(x, own, shared, columns, settings)
    value, ladj = spline_columns(x.float(), own, shared.float(), columns, settings)
    assert value.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(value, want[0].float(), atol=1e-5, rtol=1e-5)


def test_complex_numbers_are_refused():
    x, params = torch.zeros(3, dtype=torch.complex64), torch.zeros(14)
    with pytest.raises((NotImplementedError, RuntimeError, TypeError, ValueError)):
        rational_quadratic_forward(x, params, count_bins=5)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_coupling_under_autocast_equals_the_reference(context_dim):
    make = {0: spline_coupling, 2: conditional_spline_coupling}[context_dim]
    sizes = (4, context_dim) if context_dim else (4,)
    coupling = perturb_(make(*sizes, hidden_dims=[8], count_bins=4), 0.1)
    x = points(9 * 4, dtype=torch.float32).view(9, 4)
    context = (points(9 * 2, dtype=torch.float32).view(9, 2),) if context_dim else ()

    def gradients():
        coupling.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, ladj = coupling.call_and_ladj(x, *context)
        (y.square().sum() + ladj.sum()).backward()
        return [y.detach(), ladj.detach()], [p.grad.clone() for p in coupling.parameters()]

    got, grads = gradients()
    with use_reference():
        want, want_grads = gradients()
    assert got[0].dtype == want[0].dtype
    assert_same(got, want, tolerance=1e-5)
    assert_same(grads, want_grads, tolerance=0.02)  # the network's derivatives are sums in bfloat16


def test_one_column_and_one_bin_and_no_column_at_all():
    settings = settings_of(1, "linear")
    x = points(6).view(6, 1)
    own = random_params(6, count_bins=1, tails="linear")
    check(lambda x, own: spline_columns(x, own, None, Columns(1, (0,)), settings), (x, own))
    value, ladj = check(lambda x: spline_columns(x, None, None, Columns(1, ()), settings), (x,))
    assert torch.equal(value, x) and torch.equal(ladj, torch.zeros(6, dtype=x.dtype))
