"""Importance resampling: the right draws in the right groups, honest about their number and tails."""

import math
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_flowkit.diagnostics import diagnose, reweight, to_arviz

DRAWS = ("chain", "draw")


def normal_tree(scale=1.5, shift=0.5, chains=1, draws=4000, seed=0):
    """Draws of N(shift, scale^2) as a guide of N(0, 1)."""
    rng = np.random.default_rng(seed)
    z = shift + scale * rng.normal(size=(chains, draws))
    lp = -0.5 * z**2
    log_q = -0.5 * ((z - shift) / scale) ** 2 - np.log(scale)
    pairs = np.stack([z, 2 * z], -1)
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"z": (DRAWS, z), "both": ((*DRAWS, "part"), pairs)}),
            "sample_stats": xr.Dataset(
                {
                    "lp": (DRAWS, lp),
                    "log_q": (DRAWS, log_q),
                    "log_weight": (DRAWS, lp - log_q),
                    "log_weight_psis": (DRAWS, lp - log_q),
                }
            ),
            "log_likelihood": xr.Dataset({"y": ((*DRAWS, "data"), -(pairs**2))}),
            "posterior_predictive": xr.Dataset({"y": ((*DRAWS, "data"), 3 * pairs)}),
            "prior": xr.Dataset({"z": (DRAWS, np.zeros((1, 7)))}),
            "observed_data": xr.Dataset({"y": ("data", [1.0, 2.0])}),
            "vi_diagnostics": xr.Dataset({"pareto_k": 0.1}),
        }
    )


def test_draws_become_those_of_the_target():
    corrected = reweight(normal_tree(), seed=0)
    draws = corrected["posterior"]["z"].values[0]
    attrs = corrected["posterior"].attrs
    error = attrs["ess"] ** -0.5
    assert abs(draws.mean()) < 4 * error
    assert abs(draws.std() - 1.0) < 4 * error
    assert attrs["num_guide_draws"] == 4000 and attrs["pareto_k"] < 0.2
    assert attrs["mcse_factor"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("chains", [1, 2])
def test_groups_stay_in_step_and_say_where_they_come_from(chains):
    tree = normal_tree(chains=chains, draws=500)
    corrected = reweight(tree, num_samples=300, seed=0)
    posterior = corrected["posterior"].to_dataset()
    assert posterior.sizes == {"chain": 1, "draw": 300, "part": 2}
    assert posterior["both"].dims == (*DRAWS, "part")
    z = posterior["z"].values
    np.testing.assert_array_equal(posterior["both"].values[..., 1], 2 * z)
    np.testing.assert_array_equal(corrected["log_likelihood"]["y"].values[..., 0], -(z**2))
    np.testing.assert_array_equal(corrected["posterior_predictive"]["y"].values[..., 0], 3 * z)
    stats = corrected["sample_stats"].to_dataset()
    assert set(stats.data_vars) == {"lp", "log_q", "guide_chain", "guide_draw"}
    np.testing.assert_array_equal(stats["lp"].values, -0.5 * z**2)
    origin = tree["posterior"]["z"].values[stats["guide_chain"], stats["guide_draw"]]
    np.testing.assert_array_equal(origin, z)
    assert set(stats["guide_chain"].values.ravel()) == set(range(chains))


def test_other_groups_are_as_they_were_but_for_the_judgement_of_the_guide():
    tree = normal_tree(draws=500)
    corrected = reweight(tree, seed=0)
    assert set(corrected.children) == set(tree.children) - {"vi_diagnostics"}
    for name in ("prior", "observed_data"):
        xr.testing.assert_identical(corrected[name].to_dataset(), tree[name].to_dataset())
    assert "log_weight" in tree["sample_stats"]  # the tree that was given is left alone
    with pytest.raises(ValueError, match="vi_diagnostics"):
        diagnose(corrected)
    with pytest.raises(ValueError, match="reweighted before"):
        reweight(corrected)


def test_copies_are_as_many_as_the_weights_say():
    tree = normal_tree(draws=1000)
    weight = np.exp(tree["sample_stats"]["log_weight"].values[0])
    expected = 5000 * weight / weight.sum()
    chosen = reweight(tree, num_samples=5000, seed=0)["sample_stats"]["guide_draw"].values[0]
    copies = np.bincount(chosen, minlength=1000)
    assert np.abs(copies - expected).max() < 2.5
    assert (np.diff(chosen) >= 0).all()


@pytest.mark.parametrize(("scale", "shift"), [(1.5, 0.5), (0.8, 0.6)])
def test_arviz_sees_the_copies(scale, shift):
    import arviz

    tree = normal_tree(scale, shift)
    mcse = float(arviz.mcse(to_arviz(reweight(tree, seed=0)))["z"])
    weight = np.exp(tree["sample_stats"]["log_weight"].values[0])
    weight /= weight.sum()
    z = tree["posterior"]["z"].values[0]
    expected = math.sqrt((weight**2 * (z - weight @ z) ** 2).sum())
    assert mcse == pytest.approx(expected, rel=0.3)


def test_attributes_can_be_stored(tmp_path):
    corrected = reweight(normal_tree(draws=500), seed=0)
    corrected.to_netcdf(tmp_path / "corrected.nc")
    with xr.open_datatree(tmp_path / "corrected.nc") as stored:
        assert stored["posterior"].attrs["resampling"].startswith("stratified")
        xr.testing.assert_equal(
            stored["posterior"].to_dataset(), corrected["posterior"].to_dataset()
        )


def test_the_seed_repeats_and_leaves_the_callers_generator_alone():
    tree, state = normal_tree(draws=500), torch.random.get_rng_state()
    first, again = reweight(tree, seed=1), reweight(tree, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    xr.testing.assert_identical(first["posterior"].to_dataset(), again["posterior"].to_dataset())
    other = reweight(tree, seed=2)["posterior"].to_dataset()
    assert not first["posterior"].to_dataset().equals(other)


def test_guides_that_weights_cannot_repair_are_said_or_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reweight(normal_tree(), seed=0)
    with pytest.warns(UserWarning, match=r"\+- 0.1\d, not surely below the 0.70 .* 4000 draws"):
        corrected = reweight(normal_tree(scale=0.4, shift=0.0), seed=0)
    assert corrected["posterior"].attrs["mcse_factor"] > 2
    hopeless = normal_tree()
    hopeless["sample_stats"]["log_weight"] = 10 * hopeless["posterior"]["z"]
    with pytest.raises(ValueError, match=r"at most 0.70 .* got \d\.\d+: .*more flexible guide"):
        reweight(hopeless, seed=0)


def test_what_has_no_draws_or_weights_is_refused():
    tree = normal_tree(draws=100)
    with pytest.raises(ValueError, match="num_samples >= 1, got 0"):
        reweight(tree, num_samples=0)
    stats = xr.DataTree.from_dict({"sample_stats": tree["sample_stats"].to_dataset()})
    with pytest.raises(ValueError, match=r"posterior, got \['sample_stats'\]"):
        reweight(stats)
    uneven = normal_tree(draws=100)
    uneven["log_likelihood"] = xr.DataTree(uneven["prior"].to_dataset())
    with pytest.raises(ValueError, match=r"\(1, 100\) in the group log_likelihood.*got \(1, 7\)"):
        reweight(uneven)
    draws = xr.DataTree.from_dict({"posterior": tree["posterior"].to_dataset()})
    with pytest.raises(ValueError, match=r"sample_stats.*got \['posterior'\]"):
        reweight(draws)
