"""Element-wise splines: bijections dimension by dimension, and what they refuse."""

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_flowkit.transforms as T
from pyro_flowkit.testing import perturb_


@pytest.fixture
def no_validation():
    with pyro.validation_enabled(False):
        yield


@given(
    seed=st.integers(0, 2**20),
    scale=st.floats(0.01, 5.0),
    input_dim=st.integers(1, 4),
    count_bins=st.integers(1, 16),
    bound=st.floats(0.5, 10.0),
    tails=st.sampled_from(["linear", "circular", None]),
)
@settings(derandomize=True, max_examples=30, deadline=None)
def test_any_spline_inverts(seed, scale, input_dim, count_bins, bound, tails):
    transform = T.spline(input_dim, count_bins, bound, tails=tails)
    transform = perturb_(transform, scale, seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = 2 * bound * torch.rand(20, input_dim, dtype=torch.float64, generator=generator) - bound
    if tails is not None:
        x = 2.5 * x
    y, ladj = transform.call_and_ladj(x)
    back, inverse_ladj = transform.inverse_and_ladj(y)
    assert (back - x).abs().max() <= 1e-8
    assert (ladj + inverse_ladj).abs().max() <= 1e-6


@pytest.mark.parametrize("value", [5.0, -5.0, 3.0, -3.0])
def test_every_dimension_is_a_bijection_on_its_own_outside_the_box_too(value):
    transform = perturb_(T.spline(3), 1.0)
    inside = torch.tensor([0.5, -0.5, 1.0])
    for i in range(3):
        x = inside.clone()
        x[i] = value
        y, ladj = transform.call_and_ladj(x)
        assert y[i] == value
        others = [j for j in range(3) if j != i]
        assert torch.equal(y[others], transform(inside)[others])
        zero = inside.clone()
        zero[i] = 0.0
        assert ladj != transform.call_and_ladj(zero)[1]


def test_without_tails_the_outside_is_an_error_where_validation_is_on():
    transform = T.spline(2, tails=None)
    for f in (transform, transform.inv):
        with pytest.raises(ValueError, match=r"Expected values within \[-3, 3\].* got .*3.5"):
            f(torch.tensor([0.0, 3.5]))


def test_without_tails_the_outside_is_nan_where_validation_is_off(no_validation):
    transform = T.spline(2, tails=None)
    y, ladj = transform.call_and_ladj(torch.tensor([[0.0, 3.5], [0.0, 1.0]]))
    assert y.isnan().tolist() == [[False, True], [False, False]]
    assert ladj.isnan().tolist() == [True, False]


def test_an_extreme_spline_without_tails_never_leaves_its_box():
    transform = T.spline(1, tails=None)
    x = torch.linspace(-3, 3, 101)[:, None]
    for seed in range(50):
        perturb_(transform, 8.0, seed)
        assert transform.inv(transform(x)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: T.spline(0), "input_dim .* got 0"),
        (lambda: T.spline(2.0), "input_dim .* got 2.0"),
        (lambda: T.spline(2, 0), "count_bins .* got 0"),
        (lambda: T.spline(2, 1000), "1000 \\* 0.001 = 1"),
        (lambda: T.spline(2, bound=-1.0), "bound .* got -1.0"),
        (lambda: T.spline(2, tails="flat"), "tails .* got 'flat'"),
        (lambda: T.spline(2, order="linear"), 'order="quadratic", got .linear.'),
        (lambda: T.conditional_spline(2, 3, order="linear"), "got .linear."),
        (lambda: T.conditional_spline(2, 0), "context_dim .* got 0"),
        (lambda: T.conditional_spline(2, 3, []), "hidden_dims .* got \\[\\]"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, r"context of shape \(\*batch, 3\) .* got none"),
        (torch.zeros(5, 2), r"context of shape \(\*batch, 3\) .* got shape \(5, 2\)"),
        (torch.zeros(()), r"context of shape \(\*batch, 3\) .* got shape \(\)"),
    ],
)
def test_a_bad_context_is_refused(context, message):
    with pytest.raises(ValueError, match=message):
        T.conditional_spline(2, 3).condition(context)
    with pytest.raises(ValueError, match=message):
        T.conditional_spline(2, 3).call_and_ladj(torch.zeros(5, 2), context)
