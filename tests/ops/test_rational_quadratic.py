"""The spline kernel: the identity at zero, exact edges, gradients, and accuracy in float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_flowkit.ops import (
    SplineSettings,
    num_spline_params,
    rational_quadratic_forward,
    rational_quadratic_inverse,
)

TAILS = ["linear", "circular", None]
BOTH = [rational_quadratic_forward, rational_quadratic_inverse]


def random_params(shape, count_bins, tails, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    size = num_spline_params(count_bins, tails)
    return scale * torch.randn(*shape, size, generator=generator, dtype=dtype)


def knots(params, count_bins, bound, minimum=1e-3):
    """Knot positions on both axes, computed independently of the kernel."""
    axes = []
    for logits in (params[:count_bins], params[count_bins : 2 * count_bins]):
        exp = torch.exp(logits - logits.max())
        share = minimum + (1 - minimum * count_bins) * exp / exp.sum()
        edges = torch.cat([torch.zeros(1, dtype=share.dtype), share.cumsum(0)])
        axes.append(2 * bound * edges - bound)
    return axes


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("count_bins", [1, 2, 8, 64])
def test_zero_parameters_give_the_identity(count_bins, tails, function):
    x = torch.linspace(-3, 3, 601)
    params = torch.zeros(num_spline_params(count_bins, tails))
    y, ladj = function(x, params, count_bins=count_bins, bound=3.0, tails=tails)
    assert (y - x).abs().max() <= 2e-6
    assert ladj.abs().max() <= 2e-6


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("count_bins", [1, 2, 8, 64])
def test_inverse_undoes_forward_in_float64(count_bins, tails):
    params = random_params((200,), count_bins, tails, scale=2.0)
    x = torch.linspace(-3, 3, 200, dtype=torch.float64)
    kwargs = {"count_bins": count_bins, "bound": 3.0, "tails": tails}
    y, ladj = rational_quadratic_forward(x, params, **kwargs)
    back, inverse_ladj = rational_quadratic_inverse(y, params, **kwargs)
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(inverse_ladj, -ladj, atol=1e-8, rtol=0)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tails", TAILS)
def test_log_derivative_is_the_log_of_the_autograd_derivative(tails, function):
    params = random_params((101,), 8, tails)
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    y, ladj = function(x, params, count_bins=8, bound=3.0, tails=tails)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ladj, derivative.log(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tails", TAILS)
def test_gradients_of_inputs_and_parameters(tails, function):
    params = random_params((4,), 3, tails, scale=0.5).requires_grad_()
    x = torch.tensor([-2.3, -0.4, 0.7, 2.1], dtype=torch.float64, requires_grad=True)

    def spline(x, params):
        return function(x, params, count_bins=3, bound=3.0, tails=tails)

    assert torch.autograd.gradcheck(spline, (x, params))
    assert torch.autograd.gradgradcheck(spline, (x, params), fast_mode=True)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tails", TAILS)
def test_float32_agrees_with_float64(tails, function):
    params = random_params((500,), 8, tails, dtype=torch.float32)
    x = torch.linspace(-3, 3, 500)
    kwargs = {"count_bins": 8, "bound": 3.0, "tails": tails}
    y, ladj = function(x, params, **kwargs)
    want_y, want_ladj = function(x.double(), params.double(), **kwargs)
    assert y.dtype == ladj.dtype == torch.float32
    assert (y - want_y).abs().max() <= 2e-5
    assert (ladj - want_ladj).abs().max() <= 2e-4


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("count_bins", [1, 2, 8, 64])
def test_knots_map_to_knots_and_the_slope_does_not_jump_there(count_bins, tails):
    params = random_params((), count_bins, tails, seed=count_bins)
    xs, ys = knots(params, count_bins, 3.0)
    kwargs = {"count_bins": count_bins, "bound": 3.0, "tails": tails}
    y, at = rational_quadratic_forward(xs, params, **kwargs)
    torch.testing.assert_close(y, ys, atol=1e-12, rtol=0)
    x, _ = rational_quadratic_inverse(ys, params, **kwargs)
    torch.testing.assert_close(x, xs, atol=1e-10, rtol=0)
    for side in (-1e-9, 1e-9):
        near = (xs + side).clamp(-3.0, 3.0)
        _, beside = rational_quadratic_forward(near, params, **kwargs)
        torch.testing.assert_close(beside, at, atol=1e-4, rtol=0)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_tails_have_slope_one_at_the_bounds_and_are_the_identity_outside(dtype, function):
    params = random_params((4,), 8, "linear", scale=3.0, dtype=dtype)
    edge = torch.tensor(3.0, dtype=dtype)
    outside = torch.nextafter(edge, 2 * edge)
    x = torch.stack([-outside, -edge, edge, outside]).requires_grad_()
    y, ladj = function(x, params, count_bins=8, bound=3.0)
    assert y[[0, 3]].tolist() == x[[0, 3]].tolist()
    torch.testing.assert_close(y, x, rtol=torch.finfo(dtype).eps, atol=0)
    assert ladj.abs().max() <= 4 * torch.finfo(dtype).eps
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope - 1).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("function", BOTH)
def test_circular_tails_commute_with_whole_turns_and_join_smoothly(function):
    params = random_params((), 5, "circular")
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    kwargs = {"count_bins": 5, "bound": 3.0, "tails": "circular"}
    y, ladj = function(x, params, **kwargs)
    for turns in (-7, -1, 1, 2, 100):
        shifted, shifted_ladj = function(x + 6.0 * turns, params, **kwargs)
        torch.testing.assert_close(shifted, y + 6.0 * turns, atol=1e-10, rtol=0)
        torch.testing.assert_close(shifted_ladj, ladj, atol=1e-8, rtol=0)
    _, ends = function(torch.tensor([-3.0, 3.0], dtype=torch.float64), params, **kwargs)
    assert abs(ends[0] - ends[1]) <= 1e-12
    assert abs(ends[0]) > 1e-3  # the shared slope is free


@pytest.mark.parametrize("function", BOTH)
def test_without_tails_the_outside_is_nan_and_the_slopes_at_the_bounds_are_free(function):
    params = random_params((), 4, None)
    x = torch.tensor([-3.0001, -3.0, 3.0, 3.0001], dtype=torch.float64)
    y, ladj = function(x, params, count_bins=4, bound=3.0, tails=None)
    assert y.isnan().tolist() == ladj.isnan().tolist() == [True, False, False, True]
    torch.testing.assert_close(y[1:3], x[1:3], rtol=4e-16, atol=0)
    assert (ladj[1:3].abs() > 1e-3).all()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tails", TAILS)
def test_nan_stays_nan_and_does_not_spread(tails, function):
    params = random_params((3,), 4, tails)
    x = torch.tensor([0.5, math.nan, -0.5], dtype=torch.float64)
    y, _ = function(x, params, count_bins=4, bound=3.0, tails=tails)
    assert y.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tails", ["linear", "circular"])
@pytest.mark.parametrize("value", [1e19, -1e19, math.inf, -math.inf])
def test_huge_inputs_have_finite_log_derivatives_and_gradients(value, tails, function):
    params = random_params((2,), 8, tails, dtype=torch.float32).requires_grad_()
    x = torch.tensor([value, 0.5], requires_grad=True)
    y, ladj = function(x, params, count_bins=8, bound=3.0, tails=tails)
    assert y[0] == value
    assert ladj.isfinite().all()
    (ladj.sum() + y[1]).backward()
    assert params.grad.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_invert(dtype, tails):
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-13}[dtype]
    kwargs = {"count_bins": 8, "bound": 3.0, "tails": tails}
    params = random_params((200, 50), 8, tails, scale=8.0, dtype=dtype)
    x = torch.linspace(-3, 3, 50, dtype=dtype).expand(200, 50)
    y, ladj = rational_quadratic_forward(x, params, **kwargs)
    back, inverse_ladj = rational_quadratic_inverse(y, params, **kwargs)
    again, _ = rational_quadratic_forward(back, params, **kwargs)
    for value in (y, ladj, back, inverse_ladj):
        assert value.isfinite().all()
    # slopes reach 1e3 both ways: where the map is flat, y tells two x apart no better than rounding lets it
    assert torch.minimum((back - x).abs(), (again - y).abs()).max() <= tolerance


@given(
    seed=st.integers(0, 2**20),
    scale=st.floats(0.01, 5.0),
    bound=st.floats(0.1, 50.0),
    count_bins=st.integers(1, 32),
    tails=st.sampled_from(TAILS),
)
@settings(derandomize=True, max_examples=50, deadline=None)
def test_any_spline_is_an_increasing_bijection_of_the_box(seed, scale, bound, count_bins, tails):
    params = random_params((), count_bins, tails, scale=scale, seed=seed)
    kwargs = {"count_bins": count_bins, "bound": bound, "tails": tails}
    x = torch.linspace(-1, 1, 64, dtype=torch.float64) * bound
    y, ladj = rational_quadratic_forward(x, params, **kwargs)
    assert (y.diff() > 0).all()
    assert y.abs().max() <= bound
    torch.testing.assert_close(y[[0, -1]], x[[0, -1]], rtol=4e-16, atol=0)
    back, inverse_ladj = rational_quadratic_inverse(y, params, **kwargs)
    assert (back - x).abs().max() <= 1e-9 * bound
    assert (ladj + inverse_ladj).abs().max() <= 1e-6


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_in_kind(dtype, function):
    params = random_params((50,), 8, "linear").to(dtype)
    x = torch.linspace(-4, 4, 50).to(dtype)
    y, ladj = function(x, params, count_bins=8, bound=3.0)
    want, want_ladj = function(x.double(), params.double(), count_bins=8, bound=3.0)
    assert y.dtype == ladj.dtype == dtype
    assert (y - want).abs().max() <= 4 * torch.finfo(dtype).eps
    assert (ladj - want_ladj).abs().max() <= 4 * torch.finfo(dtype).eps


def test_parameters_and_inputs_broadcast():
    params = random_params((3, 1), 4, "linear")
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    y, ladj = rational_quadratic_forward(x, params, count_bins=4)
    assert y.shape == ladj.shape == (3, 5)
    alone, _ = rational_quadratic_forward(x, params[1, 0], count_bins=4)
    assert torch.equal(y[1], alone)


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((0, 3.0), {}, ["count_bins", ">= 1", "got 0"]),
        ((2.0, 3.0), {}, ["count_bins", "got 2.0"]),
        ((True, 3.0), {}, ["count_bins", "got True"]),
        ((8, 0.0), {}, ["bound", "positive", "got 0.0"]),
        ((8, math.inf), {}, ["bound", "finite", "got inf"]),
        ((8, math.nan), {}, ["bound", "got nan"]),
        ((8, 3.0, "flat"), {}, ["tails", "circular", "got 'flat'"]),
        ((1000, 3.0), {}, ["min_bin_width", "1000 * 0.001 = 1"]),
        ((8, 3.0), {"min_bin_height": 0.2}, ["min_bin_height", "8 * 0.2 = 1.6"]),
        ((8, 3.0), {"min_bin_width": 0.0}, ["min_bin_width", "> 0"]),
        ((8, 3.0), {"min_slope": 1.0}, ["min_slope", "(0, 1)", "got 1.0"]),
    ],
)
def test_bad_settings_are_refused_with_the_numbers(arguments, options, expected):
    with pytest.raises(ValueError) as error:
        SplineSettings(*arguments, **options)
    for text in expected:
        assert text in str(error.value)


def test_a_wrong_number_of_parameters_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"Expected .* 23 .* got shape \(5, 24\)"):
        rational_quadratic_forward(torch.zeros(5), torch.zeros(5, 24), count_bins=8)
