"""Iterates that have settled or not, and restarts that agree or not."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_flowkit.diagnostics import compare_restarts, diagnose, iterate_convergence


def autoregressive(correlation, *shape, seed=0):
    """A stationary AR(1) process of variance 1 along the next to last axis."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    path = noise.copy()
    for i in range(1, shape[-2]):
        step = math.sqrt(1 - correlation**2) * noise[..., i, :]
        path[..., i, :] = correlation * path[..., i - 1, :] + step
    return path


def fit_tree(elbo, error=0.01, mean=0.0):
    draws = np.random.default_rng(0).standard_normal((1, 4000)) + mean
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"mu": (("chain", "draw"), draws)}),
            "vi_diagnostics": xr.Dataset({"elbo": elbo, "elbo_se": error}),
        }
    )


def test_standard_error_of_a_stationary_process_is_the_known_one():
    rho, n = 0.9, 20_000
    result = iterate_convergence(autoregressive(rho, 2 * n, 3), last=0.5)
    exact = math.sqrt((1 + rho) / (1 - rho) / n)
    np.testing.assert_allclose(result["mcse"], exact, rtol=0.2)
    np.testing.assert_allclose(result["ess"], n * (1 - rho) / (1 + rho), rtol=0.3)
    assert (np.abs(result["mean"]) < 4 * exact).all()
    assert diagnose(result).level == "good"


def test_parameter_that_drifts_is_named():
    path = autoregressive(0.5, 2000, 3)
    path[:, 1] += np.linspace(0, 10, 2000)
    result = iterate_convergence(torch.tensor(path), names=["a", "drifting", "c"])
    verdict = diagnose(result)
    assert verdict.level == "bad"
    assert "drifting" in verdict.reason
    assert float(result["rhat"].sel(parameter="drifting")) > 1.5
    assert float(result["rhat"].sel(parameter="a")) < 1.05


def test_the_way_to_the_optimum_does_not_count():
    path = autoregressive(0.5, 2000, 1)
    path[:1000] += np.linspace(50, 0, 1000)[:, None]
    assert diagnose(iterate_convergence(path)).level == "good"
    assert diagnose(iterate_convergence(path, last=1.0)).level == "bad"


def test_chains_at_different_optima_have_not_converged():
    path = autoregressive(0.5, 2, 1000, 1)
    assert diagnose(iterate_convergence(path)).level == "good"
    path[1] += 5.0
    assert diagnose(iterate_convergence(path)).level == "bad"


def test_mean_that_is_not_known_well_enough_is_usable_only():
    path = autoregressive(0.9, 2000, 1)
    assert diagnose(iterate_convergence(path, scale=[100.0])).level == "good"
    assert diagnose(iterate_convergence(path, scale=0.1)).level == "usable"


def test_frozen_parameter_has_settled_and_chains_frozen_apart_have_not():
    path = autoregressive(0.5, 2, 400, 2)
    path[..., 1] = 3.0
    result = iterate_convergence(path)
    assert float(result["rhat"][1]) == 1.0
    assert float(result["mcse"][1]) == 0.0
    path[1, :, 1] = 4.0
    assert float(iterate_convergence(path)["rhat"][1]) == math.inf


def test_iterates_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 8 iterates"):
        iterate_convergence(np.zeros((10, 2)))
    with pytest.raises(ValueError, match="finite iterates, got 1"):
        path = np.zeros((100, 2))
        path[-1, 0] = np.nan
        iterate_convergence(path)
    with pytest.raises(ValueError, match=r"\(iterate, parameter\)"):
        iterate_convergence(np.zeros(100))
    with pytest.raises(ValueError, match="Expected 2 names, got 1"):
        iterate_convergence(np.zeros((100, 2)), names=["a"])


def test_restarts_that_agree_are_good_and_one_behind_is_named():
    good = compare_restarts([-10.0, -10.02, -10.05])
    assert diagnose(good).level == "good"
    np.testing.assert_allclose(good["vi_restarts"]["behind"], [0.0, 0.02, 0.05], atol=1e-12)
    behind = diagnose(compare_restarts({"a": -10.0, "b": -13.5, "c": -10.1}))
    assert behind.level == "usable"
    assert "b by 3.50 nats" in behind.reason
    assert diagnose(compare_restarts([-10.0, math.nan])).level == "usable"


def test_difference_within_its_standard_error_does_not_count():
    trees = [fit_tree(-10.0, 0.5), fit_tree(-10.8, 0.5)]
    assert diagnose(compare_restarts(trees)).level == "good"
    trees = [fit_tree(-10.0, 0.01), fit_tree(-10.8, 0.01)]
    assert diagnose(compare_restarts(trees)).level == "usable"


def test_equally_good_restarts_at_different_places_are_bad():
    result = compare_restarts({"left": fit_tree(-10.0), "right": fit_tree(-10.01, mean=2.0)})
    assert float(result["vi_restarts"]["max_shift"].sel(restart="right")) == pytest.approx(
        2.0, abs=0.1
    )
    verdict = diagnose(result)
    assert verdict.level == "bad"
    assert "right" in verdict.reason


def test_restarts_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="two restarts, got 1"):
        compare_restarts([-1.0])
    with pytest.raises(ValueError, match="finite ELBO"):
        compare_restarts([math.nan, -math.inf])
    other = fit_tree(-10.0)
    other["posterior"] = other["posterior"].to_dataset().rename(mu="nu")
    with pytest.raises(ValueError, match=r"\['mu'\].*\['nu'\]"):
        compare_restarts([fit_tree(-9.0), other])
