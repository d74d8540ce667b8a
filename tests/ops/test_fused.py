"""The numbers of the fused kernel: the reference's in float64, no less accurate than the reference in float32."""

import functools
import itertools
import math

import pytest
import torch

from pyro_flowkit.ops import spline_columns
from tests.ops.kernel_cases import (
    BINS,
    BOUND,
    COLUMNS,
    TAILS,
    assert_same,
    column_inputs,
    edges,
    evaluate,
    points,
    random_params,
    with_gradients,
)
from tests.ops.test_rational_quadratic import knots

pytestmark = pytest.mark.usefixtures("instruction_set")


def each_spline(test):
    for name, values in (("count_bins", BINS), ("tails", TAILS), ("inverse", [False, True])):
        test = pytest.mark.parametrize(name, values)(test)
    return test


def check_elementwise(x, params, *, outputs=1e-11, gradients=1e-10, weights=(1.0, 1.0), **options):
    """Kernel and reference agree on values, log-dets and their derivatives."""
    got, got_grads = with_gradients(evaluate, (x, params), weights=weights, **options)
    want, want_grads = with_gradients(
        evaluate, (x, params), weights=weights, reference=True, **options
    )
    assert_same(got, want, tolerance=outputs)
    assert_same(got_grads, want_grads, tolerance=gradients)


@each_spline
def test_values_and_gradients_equal_the_reference(count_bins, tails, inverse):
    x = points(201)
    params = random_params(201, count_bins=count_bins, tails=tails)
    params[1::3] *= 0.1
    params[2::3] *= 5.0
    for given in (params, params[0], params[2]):  # a spline for every input, or one for all
        check_elementwise(x, given, count_bins=count_bins, tails=tails, inverse=inverse)


@each_spline
def test_bounds_their_neighbours_and_the_far_outside_equal_the_reference(
    count_bins, tails, inverse
):
    options = {"count_bins": count_bins, "tails": tails, "inverse": inverse}
    params = random_params(len(edges()), count_bins=count_bins, tails=tails)
    check_elementwise(edges(), params, **options)
    check_elementwise(edges(), params[0], **options)
    single = edges(torch.float32)
    check_elementwise(single, params.float(), outputs=2e-5, gradients=1e-3, **options)
    check_elementwise(single, params[0].float(), outputs=2e-5, gradients=1e-3, **options)


@each_spline
def test_knots_equal_the_reference(count_bins, tails, inverse):
    params = random_params(count_bins=count_bins, tails=tails)
    at = knots(params, count_bins, BOUND)[int(inverse)]
    options = {"count_bins": count_bins, "tails": tails, "inverse": inverse}
    for given in (params, params.expand(len(at), -1).clone()):
        # the derivative of the log-det jumps there: kernel and reference may take either side
        check_elementwise(at, given, weights=(1.0, 0.0), **options)


@each_spline
def test_extreme_parameters_equal_the_reference(count_bins, tails, inverse):
    params = random_params(200, count_bins=count_bins, tails=tails, seed=3)
    largest = 10.0 ** torch.linspace(1, 4, 200, dtype=torch.float64).unsqueeze(-1)
    params = largest * params / params.abs().amax(-1, keepdim=True)
    params[::3, 0] = -math.inf if count_bins > 1 else 0.0  # a bin of the smallest width
    params[1::3, 2 * count_bins - 1] = -math.inf if count_bins > 1 else 0.0  # and height
    options = {"count_bins": count_bins, "tails": tails, "inverse": inverse}
    check_elementwise(points(200), params, outputs=1e-8, gradients=1e-8, **options)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("count_bins", [1, 13])
@pytest.mark.parametrize("inverse", [False, True])
def test_any_choice_of_columns_equals_the_reference(name, count_bins, tails, inverse):
    columns, settings, tensors = column_inputs(name, 37, count_bins, tails)
    options = {"columns": columns, "settings": settings, "inverse": inverse}
    got, grads = with_gradients(spline_columns, tensors, **options)
    want, want_grads = with_gradients(spline_columns, tensors, reference=True, **options)
    assert_same(got, want)
    assert_same(grads, want_grads, tolerance=1e-10)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_in_its_row(tails, inverse, dtype):
    columns, settings, (x, own, shared) = column_inputs("all three", 41, 8, tails, dtype=dtype)
    options = {"columns": columns, "settings": settings, "inverse": inverse}
    x[10, 3] = 0.5
    want, (want_x, want_own, _) = with_gradients(spline_columns, (x, own, shared), **options)
    x[20, 3] = math.nan  # parameters of its own
    x[30, 4] = math.nan  # shared ones
    own[10, 2] = math.nan
    rows = torch.tensor([10, 20, 30])
    others = torch.ones(41, dtype=torch.bool).index_fill(0, rows, False)
    got, (grad_x, grad_own, grad_shared) = with_gradients(
        spline_columns, (x, own, shared), **options
    )
    assert got[1][rows].isnan().all() and got[0].isnan().sum() == 3
    assert grad_own[rows[:2]].isnan().any(-1).all() and grad_shared.isnan().any()
    for a, b in ((got[0], want[0]), (got[1], want[1]), (grad_x, want_x), (grad_own, want_own)):
        assert torch.equal(a[others], b[others])


@functools.cache
def reference_errors(inverse):
    """Per quantity, the errors of the reference in float32, over random parameters."""
    return pool_errors(functools.partial(with_gradients, reference=True), inverse)


@functools.cache
def exact(name, tails, count_bins, scale, inverse):
    columns, settings, tensors = column_inputs(
        name, 400, count_bins, tails, scale=scale, seed=1, dtype=torch.float32
    )
    options = {"columns": columns, "settings": settings, "inverse": inverse}
    in_double = [None if t is None else t.double() for t in tensors]
    return tensors, options, with_gradients(spline_columns, in_double, reference=True, **options)


def pool_errors(run, inverse):
    errors = {"value": [], "log-det": [], "input": [], "parameters": []}
    for name, tails, count_bins, scale in itertools.product(
        ["own", "shared", "all three"], TAILS, BINS, [0.1, 1.0, 5.0, 20.0, 100.0]
    ):
        tensors, options, (outputs, grads) = exact(name, tails, count_bins, scale, inverse)
        got, got_grads = run(spline_columns, tensors, **options)
        quantities = ["value", "log-det", "input", *("parameters" for _ in grads[1:])]
        for quantity, a, b in zip(quantities, got + got_grads, outputs + grads, strict=True):
            errors[quantity].append((a - b).abs().flatten())
    return {quantity: torch.cat(each) for quantity, each in errors.items()}


@pytest.mark.parametrize("inverse", [False, True])
def test_float32_is_as_accurate_as_the_reference(inverse):
    kernel_errors = pool_errors(with_gradients, inverse)
    # One badly conditioned input decides the maximum of the errors; a quantile does not depend on it.
    levels = torch.tensor([0.5, 0.99, 0.999, 1.0], dtype=torch.float64)
    for quantity, errors in kernel_errors.items():
        got = errors.quantile(levels)
        allowed = reference_errors(inverse)[quantity].quantile(levels)
        assert (got <= allowed).all(), f"{quantity}: {got.tolist()}, reference {allowed.tolist()}"
