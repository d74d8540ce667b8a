"""Calibration of guides whose error is known: exact, shifted, too narrow, too wide, biased or not."""

import importlib.metadata

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
import xarray as xr
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy.special import ndtr, ndtri

from pyro_flowkit.diagnostics import (
    calibration_tests,
    diagnose,
    simulation_based_calibration,
    to_arviz,
)

ARVIZ = int(importlib.metadata.version("arviz").split(".")[0])
DOUBLE = torch.float64
DESIGN = torch.tensor([[1.0, -1.5], [1.0, -0.5], [1.0, 0.0], [1.0, 0.4], [1.0, 2.0]], dtype=DOUBLE)
DATA = torch.zeros(5, dtype=DOUBLE)
COVARIANCE = (DESIGN.T @ DESIGN + torch.eye(2, dtype=DOUBLE)).inverse()


def regression(design, y):
    """b ~ N(0, I), y ~ N(X b, 1): posterior N(S X'y, S), S = (X'X + I)^-1."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((design * b).sum(-1), 1.0), obs=y)


def guide_with(shift=0.0, scale=1.0):
    def guide(design, y):
        mean = COVARIANCE @ design.T @ y + shift * COVARIANCE.diagonal().sqrt()
        pyro.sample("b", dist.MultivariateNormal(mean, scale**2 * COVARIANCE))

    return guide


def calibrate(guide, seed=0, **settings):
    settings = {"args": (DESIGN, DATA), "num_samples": 300} | settings
    return simulation_based_calibration(regression, guide, seed=seed, **settings)


def pits(scores):
    """A group prior_sbc with a latent for every row of normal scores."""
    variables = {f"z{i}": (("chain", "draw"), ndtr(row)[None]) for i, row in enumerate(scores)}
    return xr.Dataset(variables)


def normal_scores(shift=0.0, scale=1.0, latents=1, n=200, seed=0):
    """What a guide shifted by ``shift`` of its sd and with ``scale`` times the right one leaves."""
    draws = np.random.default_rng(seed).standard_normal((latents, n))
    return draws / scale - shift


def test_correct_guide_passes_and_a_narrow_or_shifted_one_fails_at_200_simulations():
    tree = calibrate(guide_with())
    assert diagnose(tree).level == "good", diagnose(tree)
    narrow = calibrate(guide_with(scale=0.8))
    assert diagnose(narrow).level == "bad"
    assert "too narrow" in diagnose(narrow).reason
    shifted = calibrate(guide_with(shift=0.3))
    assert diagnose(shifted).level == "bad"
    assert "too high" in diagnose(shifted).reason


def test_pit_values_are_the_tail_probabilities_of_the_truth():
    tree = calibrate(guide_with(), num_simulations=20, num_samples=20_000, chunk_size=20_000)
    assert tree["prior_sbc"]["b"].dims == ("chain", "draw", "b_dim_0")
    assert tree["prior_sbc"]["b"].shape == (1, 20, 2)
    again = calibrate(guide_with(shift=0.5), num_simulations=20, num_samples=20_000)
    np.testing.assert_array_equal(again["prior"]["b"], tree["prior"]["b"])
    # P(z + 0.5 < s) = Phi(Phi^-1(P(z < s)) - 0.5)
    expected = ndtr(ndtri(tree["prior_sbc"]["b"]) - 0.5)
    np.testing.assert_allclose(again["prior_sbc"]["b"], expected, atol=0.02)


@pytest.mark.parametrize(
    ("shift", "scale", "together", "kolmogorov_smirnov"),
    [(0.0, 1.0, 0.008, 0.01), (0.3, 1.0, 0.93, 0.86), (0.0, 0.8, 0.95, 0.15)],
)
def test_one_latent_is_judged_at_the_documented_rates(shift, scale, together, kolmogorov_smirnov):
    tests = calibration_tests(pits(normal_scores(shift, scale, latents=1000)))
    # By hand, since p_value is corrected for 1000 latents.
    weighted = [tests["p_location"] / 0.45, tests["p_spread"] / 0.45, tests["p_shape"] / 0.1]
    tolerance = 0.007 if together < 0.5 else 0.025
    assert np.mean(np.min(weighted, axis=0) < 0.01) == pytest.approx(together, abs=tolerance)
    assert np.mean(tests["p_shape"] < 0.01) == pytest.approx(kolmogorov_smirnov, abs=0.03)
    expected = np.minimum(1.0, 1000 * np.min(weighted, axis=0))
    np.testing.assert_allclose(tests["p_value"], expected)


def test_three_latents_are_judged_right_for_ten_seeds_of_ten():
    for seed in range(10):
        levels = {
            diagnose(calibration_tests(pits(normal_scores(*fault, latents=3, seed=seed)))).level
            for fault in ((0.3, 1.0), (0.0, 0.8))
        }
        assert levels == {"bad"}
        exact = calibration_tests(pits(normal_scores(latents=3, seed=seed)))
        assert diagnose(exact).level == "good"


def test_shift_and_scale_are_recovered_with_their_sign():
    shifted = calibration_tests(pits(normal_scores(shift=0.5, n=20_000)))
    assert float(shifted["shift"][0]) == pytest.approx(0.5, abs=0.03)
    narrow = calibration_tests(pits(normal_scores(scale=0.7, n=20_000)))
    assert float(narrow["scale_ratio"][0]) == pytest.approx(0.7, abs=0.02)


def test_guide_that_is_only_too_wide_is_usable():
    verdict = diagnose(calibration_tests(pits(normal_scores(scale=1.5))))
    assert verdict.level == "usable"
    assert "too wide" in verdict.reason


def test_wrong_shape_with_right_mean_and_variance_is_seen():
    scores = np.random.default_rng(0).choice([-1.0, 1.0], (1, 200))
    scores += 0.05 * np.random.default_rng(1).standard_normal((1, 200))
    verdict = diagnose(calibration_tests(pits(scores / scores.std() - scores.mean())))
    assert verdict.level == "bad"
    assert "wrong shape" in verdict.reason


def test_symmetry_sees_a_shift_but_not_a_scale():
    biased = calibration_tests(pits(normal_scores(shift=0.4)), kind="symmetry")
    assert diagnose(biased).level == "bad"
    assert "too high" in diagnose(biased).reason
    narrow = calibration_tests(pits(normal_scores(scale=0.5)), kind="symmetry")
    assert diagnose(narrow).level == "good"
    assert float(biased["asymmetry"][0]) > 2 * float(narrow["asymmetry"][0])


@pytest.mark.parametrize(
    ("shift", "scale", "least", "most"), [(0.0, 0.6, 0.0, 0.03), (0.3, 1.0, 0.9, 0.98)]
)
def test_symmetry_of_one_latent_is_judged_at_the_documented_rates(shift, scale, least, most):
    scores = normal_scores(shift, scale, latents=200)
    alarms = [
        diagnose(calibration_tests(pits(row[None]), kind="symmetry")).level == "bad"
        for row in scores
    ]
    assert least <= np.mean(alarms) <= most


def local_model(x):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1), with a count that is observed by keyword elsewhere."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=DOUBLE), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_amortised_guide_of_local_latents_has_a_pit_for_each_row():
    tree = simulation_based_calibration(
        local_model, local_guide, args=(torch.zeros(3, dtype=DOUBLE),), num_simulations=40, seed=1
    )
    assert tree["prior_sbc"]["z"].dims == ("chain", "draw", "data")
    assert list(tree["vi_calibration"]["latent"].values) == ["z[0]", "z[1]", "z[2]"]
    assert diagnose(tree).level == "good"


def test_guide_is_trained_anew_in_a_param_store_of_its_own():
    x = torch.zeros(1, dtype=DOUBLE)
    pyro.param("AutoNormal.locs.z", torch.tensor([7.0], dtype=DOUBLE))
    starts = []

    def make_guide(x):
        guide = AutoNormal(local_model)
        svi = SVI(local_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=4))
        svi.step(x)
        starts.append(pyro.param("AutoNormal.locs.z").item())
        svi.step(x)
        return guide

    simulation_based_calibration(
        local_model, make_guide=make_guide, args=(x,), num_simulations=4, num_samples=20, seed=0
    )
    assert len(starts) == 4
    assert max(map(abs, starts)) < 0.5
    assert pyro.param("AutoNormal.locs.z").item() == 7.0


def test_make_guide_finds_the_parameters_of_the_model_and_does_not_change_them():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0, dtype=DOUBLE))
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=DOUBLE), scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(0.3, dtype=DOUBLE)
    pyro.param("scale", torch.tensor(5.0, dtype=DOUBLE))
    pyro.param("other", torch.tensor(1.0))
    seen = []

    def make_guide(x):
        seen.append({name: value.item() for name, value in pyro.get_param_store().items()})
        with torch.no_grad():
            pyro.param("scale").add_(1.0)
        return lambda x: pyro.sample("z", dist.Normal(x, 1.0))

    simulation_based_calibration(model, make_guide=make_guide, args=(x,), num_simulations=2)
    assert seen == [{"scale": 5.0}] * 2
    assert pyro.param("scale").item() == 5.0
    assert sorted(pyro.get_param_store()) == ["other", "scale"]


def test_as_args_says_where_the_data_belong():
    def model(batch):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch["x"])

    def guide(batch):
        pyro.sample("z", dist.Normal(batch["x"] / 2, 0.5**0.5))

    args = ({"x": torch.tensor(0.0, dtype=DOUBLE)},)
    with pytest.raises(ValueError, match="as_args"):
        simulation_based_calibration(model, guide, args=args)
    with pytest.raises(ValueError, match="observe the simulated values of 'x'"):
        simulation_based_calibration(model, guide, args=args, as_args=lambda _: (args, {}))
    tree = simulation_based_calibration(
        model, guide, args=args, as_args=lambda new: ((new,), {}), num_simulations=50, seed=0
    )
    assert diagnose(tree).level == "good"


def test_data_of_two_sites_go_where_they_were_observed():
    def model(covariate, x, *, y):
        z = pyro.sample("z", dist.Normal(covariate, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        pyro.sample("y", dist.Normal(z + 100, 0.1), obs=y)

    zero, seen = torch.tensor(0.0, dtype=DOUBLE), []

    def guide(covariate, x, *, y):
        seen.append((covariate.item(), x.item(), y.item()))
        pyro.sample("z", dist.Normal(x, 0.1))

    settings = {"num_simulations": 2, "num_samples": 5, "seed": 0}
    args, kwargs = (zero.clone(), zero.clone()), {"y": zero.clone()}
    simulation_based_calibration(model, guide, args=args, kwargs=kwargs, **settings)
    assert all(covariate == 0 and abs(x) < 5 and 95 < y < 105 for covariate, x, y in seen)
    assert len({x for _, x, _ in seen}) == 2
    with pytest.raises(ValueError, match="as_args"):
        simulation_based_calibration(model, guide, args=(zero, zero), kwargs=kwargs, **settings)


def test_discrete_latents_are_ranked_with_ties_spread_evenly():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        pyro.sample("x", dist.Normal(4 * k, 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Bernoulli(logits=4 * (x - 2)))

    tree = simulation_based_calibration(
        model, guide, args=(torch.tensor(0.0, dtype=DOUBLE),), num_samples=50, seed=0
    )
    assert diagnose(tree).level == "good", diagnose(tree)


def test_what_cannot_be_calibrated_is_refused():
    def with_factor(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(z**2))

    x = torch.tensor(0.0)
    with pytest.raises(ValueError, match="pyro.factor at 'f'"):
        simulation_based_calibration(with_factor, lambda x: None, args=(x,))
    with pytest.raises(ValueError, match="latents only"):
        simulation_based_calibration(
            lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), lambda x: None, args=(x,)
        )

    def subsampled(x):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="subsample of 2"):
        simulation_based_calibration(
            subsampled,
            lambda x: pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0)),
            args=(torch.zeros(2),),
        )
    with pytest.raises(ValueError, match="both or neither"):
        simulation_based_calibration(local_model, args=(x,))
    with pytest.raises(ValueError, match="level"):
        calibration_tests(pits(normal_scores()), level=0.0)
    with pytest.raises(ValueError, match='"uniformity" or "symmetry", got \'ks\''):
        calibration_tests(pits(normal_scores()), kind="ks")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        calibration_tests(pits(normal_scores()) + 1)


def test_seed_decides_all_and_leaves_the_generator_of_the_caller_alone():
    settings = {"num_simulations": 3, "num_samples": 10}
    state = torch.random.get_rng_state()
    first, second = (calibrate(guide_with(), seed=5, **settings) for _ in range(2))
    xr.testing.assert_equal(first["prior_sbc"].to_dataset(), second["prior_sbc"].to_dataset())
    assert torch.equal(state, torch.random.get_rng_state())
    other = calibrate(guide_with(), seed=6, **settings)
    assert not np.allclose(first["prior_sbc"]["b"], other["prior_sbc"]["b"])


def test_tree_goes_through_netcdf_and_arviz(tmp_path):
    tree = calibrate(guide_with(), num_simulations=20, num_samples=50)
    tree.to_netcdf(tmp_path / "sbc.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "sbc.nc", engine="h5netcdf") as opened:
        assert diagnose(opened) == diagnose(tree)
        np.testing.assert_array_equal(opened["prior_sbc"]["b"], tree["prior_sbc"]["b"])
    converted = to_arviz(tree)
    np.testing.assert_array_equal(converted["prior_sbc"]["b"], tree["prior_sbc"]["b"])


@pytest.mark.skipif(ARVIZ < 1, reason="plot_ecdf_pit came with ArviZ 1")
def test_arviz_1_draws_the_ecdf_of_the_group():
    import arviz

    tree = calibrate(guide_with(), num_simulations=20, num_samples=50)
    plots = arviz.plot_ecdf_pit(tree, backend="none")
    assert plots.viz["ecdf_lines"]["b"].sizes == {"b_dim_0": 2}


@pytest.mark.skipif(ARVIZ >= 1, reason="the plot_ecdf of ArviZ 0.23 is plot_ecdf_pit in ArviZ 1")
def test_arviz_0_draws_the_ecdf_of_one_latent():
    import arviz
    import matplotlib.pyplot as plt

    tree = calibrate(guide_with(), num_simulations=20, num_samples=50)
    pit = tree["prior_sbc"]["b"].values[0, :, 0]
    uniform = scipy.stats.uniform()
    _, axes = plt.subplots()
    arviz.plot_ecdf(
        pit,
        cdf=uniform.cdf,
        difference=True,
        eval_points=np.linspace(0, 1, 21),
        confidence_bands="simulated",
        rvs=uniform.rvs,
        ax=axes,
    )
    curve = axes.lines[0].get_xydata()
    plt.close("all")
    np.testing.assert_allclose(curve[10, 1], (pit <= 0.5).mean() - 0.5)
