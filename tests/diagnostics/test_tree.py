"""The tree of a fit: groups, names, files, and the ArviZ that is installed."""

import importlib.metadata
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from pyro_flowkit.diagnostics import compare_guides, diagnose, from_svi, to_arviz

ARVIZ_MAJOR = int(importlib.metadata.version("arviz").split(".")[0])
SIGMA = torch.tensor([15.0, 10.0, 16.0])
Y = torch.tensor([28.0, 8.0, -3.0])
HISTORY = {
    "step": np.arange(5),
    "elbo": np.linspace(-20.0, -12.0, 5),
    "learning_rate": np.full(5, 1e-2),
    "grad_norm": np.ones(5),
    "seconds": np.linspace(0.1, 0.5, 5),
}


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 5.0))
        mean = theta + 0 * weights[..., 0]
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def make_tree(**options):
    options = {"num_samples": 300, "history": HISTORY, "seed": 0} | options
    guide = AutoNormal(schools, init_scale=0.5)
    return from_svi(schools, guide, args=(SIGMA, Y), **options)


def test_groups_and_dimensions_follow_the_schema():
    tree = make_tree(coords={"school": ["A", "B", "C"]}, dims={"weights": ["part"]})
    assert set(tree.children) == {
        *("posterior", "sample_stats", "log_likelihood", "observed_data", "constant_data"),
        *("log_prior", "posterior_predictive", "prior", "prior_predictive"),
        *("vi_trace", "vi_diagnostics"),
    }
    posterior = tree["posterior"].to_dataset()
    assert {str(n): v.dims for n, v in posterior.data_vars.items()} == {
        "mu": ("chain", "draw"),
        "weights": ("chain", "draw", "part"),
        "theta": ("chain", "draw", "school"),
    }
    assert posterior.sizes == {"chain": 1, "draw": 300, "school": 3, "part": 4}
    assert list(posterior["school"].values) == ["A", "B", "C"]
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "school")
    assert tree["log_prior"]["weights"].dims == ("chain", "draw")
    assert tree["log_prior"]["theta"].dims == ("chain", "draw", "school")
    prior, predicted = (tree[name].to_dataset() for name in ("prior", "prior_predictive"))
    assert set(prior.data_vars) == set(posterior.data_vars) and set(predicted) >= {"y"}
    assert prior.sizes["draw"] == predicted.sizes["draw"] == 500
    assert tree["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y.numpy())
    np.testing.assert_array_equal(tree["constant_data"]["sigma"], SIGMA.numpy())
    assert "y" not in tree["constant_data"]
    assert tree["vi_trace"]["elbo"].dims == ("chain", "step")


def test_densities_are_those_of_the_draws():
    tree = make_tree(dims={"weights": ["part"]})
    draws, stats = tree["posterior"].to_dataset(), tree["sample_stats"].to_dataset()
    theta, mu = (torch.tensor(draws[name].values[0]) for name in ("theta", "mu"))
    log_likelihood = dist.Normal(theta, SIGMA).log_prob(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"][0], log_likelihood, rtol=1e-5)
    prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.Normal(mu[:, None], 5.0).log_prob(theta).sum(
        -1
    )
    dirichlet = dist.Dirichlet(torch.ones(4)).log_prob(torch.tensor(draws["weights"].values[0]))
    joint = log_likelihood.sum(-1) + prior + dirichlet
    np.testing.assert_allclose(stats["lp"][0], joint, rtol=1e-4)
    np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"])
    elbo = float(tree["vi_diagnostics"]["elbo"])
    assert elbo == pytest.approx(float(stats["log_weight"].mean()))
    evidence = np.log(np.exp(stats["log_weight_psis"] + 100).mean()) - 100
    assert float(tree["vi_diagnostics"]["log_evidence"]) == pytest.approx(float(evidence))


def test_one_particle_at_a_time_gives_the_same_shapes():
    stacked, single = make_tree(num_samples=30), make_tree(num_samples=30, vectorize=False)
    for name, group in stacked.children.items():
        other = single[name].to_dataset()
        assert {n: v.shape for n, v in group.to_dataset().data_vars.items()} == {
            n: v.shape for n, v in other.data_vars.items()
        }
    np.testing.assert_array_equal(single["observed_data"]["y"], Y.numpy())


def test_attributes_can_be_stored():
    tree = make_tree()
    for group in tree.children.values():
        assert {"created_at", "inference_library", "creation_library"} <= set(group.attrs)
        for value in group.attrs.values():
            assert isinstance(value, (str, int, float, list)) and not isinstance(value, bool)
    assert tree["posterior"].attrs["sample_dims"] == ["chain", "draw"]
    assert tree["vi_trace"].attrs["sample_dims"] == ["chain", "step"]


def test_a_model_without_a_plate_has_scalar_sites():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.25))

    tree = from_svi(model, AutoNormal(model), num_samples=50, seed=0)
    assert tree["posterior"]["z"].dims == tree["log_likelihood"]["y"].dims == ("chain", "draw")
    assert tree["observed_data"]["y"].dims == ()
    assert tree["observed_data"]["y"].item() == 0.25


def test_optional_groups_are_left_out():
    options = {"history": None, "log_likelihood": False, "predictions": False}
    tree = make_tree(**options, num_prior_samples=0)
    assert set(tree.children) == {
        *("posterior", "sample_stats", "log_prior", "observed_data", "constant_data"),
        "vi_diagnostics",
    }


def chained(y):
    z = pyro.sample("z", dist.Normal(3.0, 2.0))
    first = pyro.sample("first", dist.Normal(z, 1.0), obs=y[0])
    pyro.sample("second", dist.Normal(10 * first, 1.0), obs=y[1])


@pytest.mark.parametrize("vectorize", [True, False])
def test_predictions_are_of_all_observed_sites_together(vectorize):
    guide, args = AutoNormal(chained, init_scale=0.5), (torch.tensor([1.0, 2.0]),)
    guide(*args)
    options = {"num_samples": 400, "num_prior_samples": 400, "vectorize": vectorize, "seed": 0}
    tree = from_svi(chained, guide, args=args, **options)
    z = tree["posterior"]["z"][0]
    predicted, prior = tree["posterior_predictive"], tree["prior_predictive"]
    assert float((predicted["first"] - z).std()) == pytest.approx(1.0, rel=0.1)
    assert float(predicted["first"].mean() - z.mean()) == pytest.approx(0.0, abs=0.2)
    for group in (predicted, prior):
        assert float((group["second"] - 10 * group["first"]).std()) == pytest.approx(1.0, rel=0.1)
    assert float(prior["first"].mean()) == pytest.approx(3.0, abs=0.4)
    assert float(tree["prior"]["z"].std()) == pytest.approx(2.0, rel=0.1)
    np.testing.assert_allclose(
        tree["log_prior"]["z"], dist.Normal(3.0, 2.0).log_prob(torch.tensor(z.values))[None], 1e-5
    )
    without = from_svi(chained, guide, args=args, **options, predictions=False)
    assert without["posterior"].to_dataset().equals(tree["posterior"].to_dataset())


def test_a_prior_that_cannot_be_drawn_is_said():
    def improper():
        prior = dist.ImproperUniform(dist.constraints.real, (), ())
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.25))

    guide = AutoNormal(improper, init_loc_fn=lambda site: torch.zeros(()))
    with pytest.warns(UserWarning, match="The prior cannot be drawn from"):
        tree = from_svi(improper, guide, num_samples=50, vectorize=False, seed=0)
    assert not {"prior", "prior_predictive"} & set(tree.children)
    assert "posterior_predictive" in tree.children


def test_predictions_beyond_memory_are_left_out_unless_asked_for(monkeypatch):
    monkeypatch.setattr("pyro_flowkit.diagnostics.tree.MAX_NUMBERS", 899)
    with pytest.warns(UserWarning, match="would be 900 numbers"):
        assert "posterior_predictive" not in make_tree().children
    assert "posterior_predictive" in make_tree(predictions=True).children


def test_bounds_per_datum_are_kept():
    pointwise = xr.Dataset({"elbo": ("obs_id", np.zeros(3))}, {"obs_id": np.arange(3)})
    assert make_tree(pointwise=pointwise)["vi_pointwise"]["elbo"].dims == ("obs_id",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"nobody": ["a"]}}, r"got \['nobody'\]"),
        ({"dims": {"mu": ["a"]}}, r"0 event dimensions for site 'mu' .* got dims \['a'\]"),
        ({"coords": {"school": ["A"]}}, "3 coordinate values for dimension 'school'"),
        ({"history": {"elbo": np.ones(3)}}, r"got \['elbo'\]"),
        ({"history": {"step": np.ones(3), "elbo": np.ones(2)}}, r"\(3,\).*\(2,\)"),
        ({"history": 3}, "got int"),
    ],
)
def test_names_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_tree(num_samples=30, **options)


def test_history_may_be_a_fit_result():
    class Result:
        history = HISTORY

    trace = make_tree(num_samples=30, history=Result())["vi_trace"]
    np.testing.assert_array_equal(trace["elbo"][0], HISTORY["elbo"])
    np.testing.assert_array_equal(trace["step"], HISTORY["step"])


def test_arviz_summary_works():
    import arviz

    data = to_arviz(make_tree())
    assert isinstance(data, xr.DataTree if ARVIZ_MAJOR >= 1 else arviz.InferenceData)
    summary = arviz.summary(data, kind="stats")
    assert {"mu", "theta[0]", "weights[3]"} <= set(summary.index)
    assert abs(float(summary.loc["mu", "sd"]) - 0.5) < 0.15


@pytest.mark.parametrize("write", ["tree", "arviz"])
@pytest.mark.parametrize("read", ["tree", "arviz"])
def test_netcdf_round_trip(tmp_path, write, read):
    import arviz

    tree, path = make_tree(), tmp_path / "fit.nc"
    (tree if write == "tree" else to_arviz(tree)).to_netcdf(str(path))
    if read == "tree":
        with xr.open_datatree(path) as stored:
            back = stored.load()
    else:
        back = arviz.from_netcdf(str(path))
    for name, group in tree.children.items():
        stored_group = back[name] if isinstance(back, xr.DataTree) else getattr(back, name)
        for variable, values in group.to_dataset().data_vars.items():
            np.testing.assert_array_equal(stored_group[variable].values, values.values)
    back_data = to_arviz(back) if isinstance(back, xr.DataTree) else back
    assert arviz.summary(back_data, kind="stats").loc["mu", "mean"] == pytest.approx(
        arviz.summary(to_arviz(tree), kind="stats").loc["mu", "mean"]
    )
    if isinstance(back, xr.DataTree):
        back.close()


def conjugate(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


def conjugate_tree(shift, scale, seed=0):
    x = torch.tensor([[0.9, 0.1], [-0.3, 1.0], [1.7, 0.2]], dtype=torch.float64)

    def guide(x):
        loc = x.sum(0) / 4 + shift
        pyro.sample("mu", dist.Normal(loc, torch.full_like(loc, scale / 2)).to_event(1))

    return from_svi(conjugate, guide, args=(x,), seed=seed, history=HISTORY)


def test_verdicts_name_the_numbers_and_what_to_do():
    good, wide = diagnose(conjugate_tree(0.0, 1.0)), diagnose(conjugate_tree(0.0, 1.15))
    far, narrow = diagnose(conjugate_tree(1.0, 1.0)), diagnose(conjugate_tree(0.7, 0.1))
    assert good and "can be used" in good.advice and "probe_modes" in good.limits
    assert str(good).startswith(
        "good: the gap between log evidence and ELBO is 0.0000 +- 0.0000 nats"
    )
    assert wide.level == "usable" and "reweight" in wide.advice
    assert re.match(r"the guide's sd of mu\[[01]\] is 1\.1\d of the weighted one", wide.reason)
    assert far.level == "bad" and "sd above the weighted one" in far.reason and "gap" in far.reason
    assert narrow.level == "bad" and "student_t" in narrow.advice and "at least" in narrow.reason


def test_verdict_without_diagnostics_is_refused():
    with pytest.raises(ValueError, match=r"vi_diagnostics, got \['posterior'\]"):
        diagnose(xr.DataTree.from_dict({"posterior": xr.Dataset({"x": 1.0})}))


def test_guides_are_compared_by_their_elbo():
    table = compare_guides({"far": conjugate_tree(1.0, 1.0), "right": conjugate_tree(0.0, 1.0)})
    assert list(table.index) == ["right", "far"]
    assert table.loc["right", "gap"] == pytest.approx(0.0, abs=1e-9)
    assert table.loc["far", "gap"] == pytest.approx(4.0, abs=1.5)  # KL = 2 * 1^2 / (2 * 0.5^2)
    assert list(table["verdict"]) == ["good", "bad"]
    assert list(table["iwae_particles"]) == [1000, 1000]
    assert table["seconds"].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="got none"):
        compare_guides({})
