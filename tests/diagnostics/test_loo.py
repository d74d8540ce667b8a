"""Leave-one-out values from guide draws: against the plain formula, ArviZ 1, and in ArviZ's hands."""

import importlib.metadata
import math
import warnings

import numpy as np
import pytest
import xarray as xr

from pyro_flowkit.diagnostics import loo_approximate_posterior, reweight, to_arviz

ARVIZ_1 = int(importlib.metadata.version("arviz").split(".")[0]) >= 1
DRAWS = ("chain", "draw")


def make_tree(spread=0.4, chains=1, draws=900, sites=("y",), influence=0.3):
    """Log weights and log likelihoods of a light tail, with two dimensions of data."""
    rng = np.random.default_rng(0)
    log_weight = spread * rng.normal(size=(chains, draws)) - 20.0
    likelihood = influence * rng.normal(size=(chains, draws, 3, 4)) - 1.0
    stats = {"lp": log_weight - 5.0, "log_q": np.full_like(log_weight, -5.0)}
    stats["log_weight"] = log_weight
    coords = {"row": ["a", "b", "c"]}
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"z": (DRAWS, rng.normal(size=(chains, draws)))}),
            "sample_stats": xr.Dataset({name: (DRAWS, v) for name, v in stats.items()}),
            "log_likelihood": xr.Dataset(
                {site: ((*DRAWS, "row", "column"), likelihood) for site in sites}, coords
            ),
        }
    )


def numbers(elpd):
    names = ("elpd", "p", "elpd_i") if ARVIZ_1 else ("elpd_loo", "p_loo", "loo_i")
    return [getattr(elpd, name) for name in names]


@pytest.mark.parametrize("chains", [1, 2])
def test_values_are_near_plain_importance_sampling_where_tails_are_light(chains):
    tree = make_tree(chains=chains)
    total, p, per_datum = numbers(loo_approximate_posterior(tree))
    weight = tree["sample_stats"]["log_weight"]
    likelihood = tree["log_likelihood"]["y"]
    ratio = np.exp(weight - likelihood - float(weight.max()))
    plain = np.log((ratio * np.exp(likelihood)).sum(DRAWS) / ratio.sum(DRAWS))
    assert per_datum.dims == ("row", "column")
    assert list(per_datum["row"].values) == ["a", "b", "c"]
    np.testing.assert_allclose(per_datum, plain, atol=0.005)
    assert total == pytest.approx(float(per_datum.sum()))
    posterior = np.exp(weight - float(weight.max()))
    with_all = np.log((posterior * np.exp(likelihood)).sum(DRAWS) / posterior.sum(DRAWS))
    assert p == pytest.approx(float((with_all - plain).sum()), abs=0.05)


def arviz_loo(tree):
    """Values and pareto k of what ArviZ has for this: a function in 1, PSIS in 0.23."""
    import arviz

    stats, likelihood = tree["sample_stats"].to_dataset(), tree["log_likelihood"]["y"]
    if ARVIZ_1:
        elpd = arviz.loo_approximate_posterior(tree, stats["lp"], stats["log_q"], pointwise=True)
        return elpd.elpd_i, elpd.pareto_k
    likelihood = likelihood.stack(__sample__=DRAWS)
    ratios = stats["log_weight"].stack(__sample__=DRAWS) - likelihood
    smoothed, pareto_k = arviz.psislw(ratios.transpose(..., "__sample__"))
    return np.log(np.exp(smoothed + likelihood).sum("__sample__")), pareto_k


def test_arviz_has_the_same_values():
    tree = make_tree(spread=0.8)
    ours, (values, pareto_k) = loo_approximate_posterior(tree), arviz_loo(tree)
    np.testing.assert_allclose(numbers(ours)[2], values, atol=1e-10)
    np.testing.assert_allclose(ours.pareto_k, pareto_k, atol=1e-10)
    assert numbers(ours)[0] == pytest.approx(float(values.sum()), abs=1e-9)
    assert ours.se == pytest.approx(math.sqrt(values.size) * float(values.std()), abs=1e-9)


def test_arviz_prints_compares_and_keeps_the_values():
    import arviz

    better, worse = make_tree(), make_tree()
    worse["log_likelihood"]["y"] = worse["log_likelihood"]["y"] - 0.1
    results = {name: loo_approximate_posterior(t) for name, t in (("a", better), ("b", worse))}
    assert isinstance(results["a"], arviz.ELPDData)
    assert f"{numbers(results['a'])[0]:.2f}" in str(results["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about ArviZ 0.23
        table = arviz.compare(results)
    assert list(table.index) == ["a", "b"]
    assert abs(float(table.loc["b", "elpd_diff"])) == pytest.approx(1.2, abs=0.05)
    total = loo_approximate_posterior(better, pointwise=False)
    assert numbers(results["a"])[0] == pytest.approx(total["elpd" if ARVIZ_1 else "elpd_loo"])
    assert ARVIZ_1 or "loo_i" not in total


def test_mcse_is_the_spread_over_independent_draws():
    tree = make_tree(draws=40_000, spread=0.3, influence=0.2)
    stats, likelihood = tree["sample_stats"].to_dataset(), tree["log_likelihood"].to_dataset()
    parts = []
    for start in range(0, 40_000, 400):
        some = {"draw": slice(start, start + 400)}
        part = {"sample_stats": stats.isel(some), "log_likelihood": likelihood.isel(some)}
        parts.append(loo_approximate_posterior(xr.DataTree.from_dict(part)))
    values = np.array([numbers(part)[0] for part in parts])
    errors = np.array([part.mcse for part in parts])
    assert values.std() == pytest.approx(math.sqrt((errors**2).mean()), rel=0.25)
    whole = loo_approximate_posterior(tree)
    assert abs(values.mean() - numbers(whole)[0]) < 4 * errors.mean() / 10 + 4 * whole.mcse


def test_heavy_tails_are_said():
    with pytest.warns(UserWarning, match=r"above for 12 of 12 data .* for the guide itself.*NUTS"):
        elpd = loo_approximate_posterior(make_tree(spread=6.0))
    assert elpd.warning
    with pytest.warns(UserWarning, match="These data move the posterior a lot"):
        assert loo_approximate_posterior(make_tree(spread=0.1, influence=4.0)).warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not loo_approximate_posterior(make_tree()).warning


def without(tree, group):
    return xr.DataTree.from_dict(
        {name: node.to_dataset() for name, node in tree.children.items() if name != group}
    )


def test_what_has_no_leave_one_out_values_is_refused():
    tree = make_tree()
    with pytest.raises(ValueError, match=r"log_likelihood, got \['posterior', 'sample_stats'\]"):
        loo_approximate_posterior(without(tree, "log_likelihood"))
    with pytest.raises(ValueError, match=r"log_weight in the group sample_stats"):
        loo_approximate_posterior(without(tree, "sample_stats"))
    with pytest.raises(ValueError, match="reweighted before"):
        loo_approximate_posterior(reweight(tree))
    with pytest.raises(ValueError, match=r"one of the observed sites \['x', 'y'\], got None"):
        loo_approximate_posterior(make_tree(sites=("x", "y")))
    with pytest.raises(ValueError, match=r"one of \['y'\], got 'x'"):
        loo_approximate_posterior(tree, var_name="x")
    infinite = make_tree()
    infinite["log_likelihood"]["y"][0, 7, 1, 2] = -np.inf
    with pytest.raises(ValueError, match="got 1 of 10800 values that are not"):
        loo_approximate_posterior(infinite)
    short = make_tree()
    short["log_likelihood"] = xr.DataTree(short["log_likelihood"].to_dataset().isel(draw=slice(9)))
    with pytest.raises(ValueError, match=r"\(chain, draw\) of \(1, 900\), got \(1, 9\)"):
        loo_approximate_posterior(short)


def test_one_of_several_sites_can_be_chosen():
    tree = make_tree(sites=("x", "y"))
    assert numbers(loo_approximate_posterior(tree, var_name="x"))[0] == pytest.approx(
        numbers(loo_approximate_posterior(make_tree()))[0]
    )


def test_a_reweighted_tree_goes_to_arviz():
    import arviz

    tree = make_tree(draws=4000)
    ours = loo_approximate_posterior(tree)
    theirs = arviz.loo(to_arviz(reweight(tree, seed=0)))
    assert abs(numbers(theirs)[0] - numbers(ours)[0]) < 4 * ours.mcse


def test_masked_data_are_no_data_points():
    tree = make_tree()
    likelihood = tree["log_likelihood"]["y"]
    whole = loo_approximate_posterior(tree)
    likelihood[..., 0, 1] = 0.0
    masked = loo_approximate_posterior(tree)
    assert (whole.n_data_points, masked.n_data_points) == (12, 11)
    values = np.delete(numbers(whole)[2].to_numpy(), 1)
    assert numbers(masked)[0] == pytest.approx(values.sum())
    assert masked.se == pytest.approx(math.sqrt(11) * values.std())
