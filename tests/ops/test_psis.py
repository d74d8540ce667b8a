"""PSIS against both generations of ArviZ, and the weights that have no tail to fit."""

import importlib.metadata
import math

import numpy as np
import pytest
import torch

from pyro_flowkit.ops.psis import psis

ARVIZ_MAJOR = int(importlib.metadata.version("arviz").split(".")[0])


def arviz_psislw(log_weights):
    """Normalised smoothed log weights and pareto k from the ArviZ that is installed."""
    if ARVIZ_MAJOR >= 1:
        from arviz_stats.base import array_stats

        return array_stats.psislw(-log_weights)  # ArviZ 1 takes negative log weights
    import arviz

    # ArviZ 0.23 takes the ceiling of 3 sqrt(S / reff) draws for the tail, ArviZ 1 the floor.
    num_draws = log_weights.shape[-1]
    num_tail = math.floor(3 * math.sqrt(num_draws)) if num_draws > 225 else num_draws // 5
    return arviz.psislw(log_weights, reff=num_draws / ((num_tail - 0.5) / 3) ** 2)


def normalised(log_weights):
    return log_weights - log_weights.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("num_draws", [40, 100, 225, 400, 1000, 4000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_weights_and_pareto_k_equal_arviz(num_draws, scale):
    log_weights = np.random.default_rng(1).standard_t(5, size=(3, num_draws)) * scale - 700.0
    expected, expected_k = arviz_psislw(log_weights)
    smoothed, k = psis(torch.from_numpy(log_weights))
    np.testing.assert_allclose(k.numpy(), expected_k, rtol=0, atol=1e-10)
    np.testing.assert_allclose(normalised(smoothed).numpy(), expected, rtol=0, atol=1e-9)


def test_pareto_k_is_the_shape_of_a_known_tail():
    # w = u^-k is Pareto with shape k.
    uniform = torch.rand(20_000, dtype=torch.float64)
    for shape in (0.2, 0.5, 0.9):
        assert abs(float(psis(-shape * uniform.log())[1]) - shape) < 0.15


def test_sign_is_log_p_minus_log_q():
    # A guide too narrow has unbounded weights, one too wide bounded ones.
    z = torch.randn(10_000, dtype=torch.float64)
    narrow = -0.5 * (0.5 * z) ** 2 + 0.5 * z**2  # q = N(0, .5^2) for p = N(0, 1), z scaled
    wide = -0.5 * (2.0 * z) ** 2 + 0.5 * z**2
    assert psis(narrow)[1] > 0.6
    assert psis(wide)[1] < 0.3


def test_normalisation_is_kept():
    log_weights = torch.randn(1000, dtype=torch.float64) * 0.1
    shifted = psis(log_weights - 900.0)[0]
    torch.testing.assert_close(shifted, psis(log_weights)[0] - 900.0, rtol=0, atol=1e-9)
    evidence = shifted.logsumexp(0) - math.log(1000)
    assert abs(float(evidence) - (-900.0 + 0.005)) < 0.02


def test_batches_and_dim_are_smoothed_one_by_one():
    log_weights = torch.randn(2, 400, 3, dtype=torch.float64)
    smoothed, k = psis(log_weights, dim=1)
    assert smoothed.shape == (2, 400, 3) and k.shape == (2, 3)
    one, one_k = psis(log_weights[1, :, 2])
    torch.testing.assert_close(smoothed[1, :, 2], one, rtol=0, atol=0)
    torch.testing.assert_close(k[1, 2], one_k, rtol=0, atol=0)
    last, _ = psis(log_weights.movedim(1, -1))
    torch.testing.assert_close(smoothed.movedim(1, -1), last, rtol=0, atol=0)


def test_the_input_is_left_as_it_was_and_the_dtype_is_kept():
    log_weights = torch.randn(400)
    before = log_weights.clone()
    smoothed, k = psis(log_weights)
    assert torch.equal(log_weights, before)
    assert smoothed.dtype == k.dtype == torch.float32
    assert not torch.equal(smoothed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_have_pareto_k_zero(dtype):
    # What is left between the weights of an exact guide is rounding.
    rounding = torch.finfo(dtype).eps * 300.0 * torch.randn(400, dtype=dtype)
    log_weights = torch.full((400,), -300.0, dtype=dtype) + rounding
    smoothed, k = psis(log_weights)
    assert k == 0.0
    assert torch.equal(smoothed, log_weights)


def test_fewer_than_25_draws_are_left_alone_and_said():
    log_weights = torch.randn(2, 24)
    with pytest.warns(UserWarning, match="at least 25 draws for Pareto smoothing, got 24"):
        smoothed, k = psis(log_weights)
    assert torch.equal(smoothed, log_weights)
    assert torch.equal(k, torch.full((2,), math.inf))


def test_draws_outside_of_the_support_keep_weight_zero():
    log_weights = torch.randn(1000, dtype=torch.float64)
    log_weights[::2] = -math.inf
    smoothed, k = psis(log_weights)
    assert torch.equal(smoothed == -math.inf, log_weights == -math.inf)
    assert math.isfinite(k)


def test_a_few_weights_above_nothing_have_pareto_k_inf():
    log_weights = torch.full((2, 400), -math.inf)
    log_weights[1, :4] = torch.randn(4)
    smoothed, k = psis(log_weights)
    assert torch.equal(smoothed, log_weights)
    assert torch.equal(k, torch.full((2,), math.inf))


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.tensor([0.0, math.nan] * 20), "got 20 of 40"),
        (torch.tensor([0.0, math.inf] * 20), "got 20 of 40"),
        (torch.zeros(40, dtype=torch.long), "torch.int64"),
        (torch.tensor(0.0), r"shape \(\)"),
        (torch.zeros(3, 0), "got 0"),
    ],
)
def test_bad_input_is_refused_with_numbers(log_weights, message):
    with pytest.raises(ValueError, match=message):
        psis(log_weights)


@pytest.mark.parametrize("scale", [300.0, 700.0, 1e4])
def test_weights_that_differ_by_hundreds_of_nats_are_no_error(scale):
    generator = torch.Generator().manual_seed(0)
    log_weights = scale * torch.randn(100, 1000, generator=generator, dtype=torch.float64)
    smoothed, k = psis(log_weights)
    assert bool((k > 0.7).all()) and not bool(smoothed.isnan().any())
