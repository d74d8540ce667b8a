"""Restarts as chains of one tree."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flowkit.diagnostics import compare_guides, compare_restarts, diagnose, from_svi, to_arviz


def model(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def restart(loc: float, steps: int = 3, num_samples: int = 400, y=(0.5, -0.5, 0.0)):
    pyro.clear_param_store()
    guide = AutoNormal(model, init_scale=0.5)
    data = torch.tensor(y)
    guide(data)
    with torch.no_grad():
        guide.locs.mu.fill_(loc)
    history = {"step": np.arange(1, steps + 1), "elbo": np.linspace(-5.0, -4.0, steps)}
    return from_svi(
        model, guide, args=(data,), history=history, num_samples=num_samples, seed=int(steps)
    )


def test_restarts_are_chains_of_every_group_and_data_stay_as_they_are():
    joined = compare_restarts([restart(0.0), restart(0.0, steps=5), restart(2.0)])
    for group in ("posterior", "sample_stats", "log_likelihood", "posterior_predictive"):
        assert joined[group].sizes["chain"] == 3
        assert joined[group]["chain"].values.tolist() == [0, 1, 2]
    assert joined["observed_data"]["y"].dims == ("data",)
    elbo = joined["vi_trace"]["elbo"]
    assert elbo.sizes == {"chain": 3, "step": 5}
    assert np.isnan(elbo[0]).sum() == 2 and not np.isnan(elbo[1]).any()
    assert joined["vi_diagnostics"]["pareto_k"].dims == ("chain",)
    import arviz as az

    rhat = float(az.rhat(to_arviz(joined))["mu"])
    assert rhat > 1.2, "one restart ended elsewhere"


def test_the_worst_restart_is_judged_and_named():
    good, bad = restart(0.0), restart(2.0)
    verdict = diagnose(compare_restarts([good, good]))
    assert (
        verdict.level == diagnose(good).level == "good" and verdict.limits == diagnose(good).limits
    )
    assert verdict.reason.startswith("all 2 restarts agree: ") and "of restart 0" in verdict.reason
    verdict = diagnose(compare_restarts([good, bad, good]))
    assert verdict.level == "bad" and verdict.reason.startswith("of restart 1 of 3, the worst: ")
    with pytest.raises(ValueError, match="got the 2 joined restarts of 'both'"):
        compare_guides({"both": compare_restarts([good, bad])})


def test_good_guides_at_different_places_are_bad_together():
    left, right = restart(0.0), restart(0.0)
    draws = right["posterior"].to_dataset()
    right["posterior"] = draws.assign(mu=draws["mu"] + 5.0)
    assert diagnose(left).level == "good"
    verdict = diagnose(compare_restarts({"left": left, "right": right}))
    assert verdict.level == "bad" and "standard deviations apart" in verdict.reason


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (lambda: [], "at least two restarts, got 0"),
        (lambda: [restart(0.0), restart(0.0, num_samples=300)], r"got \[400, 300\]"),
        (lambda: [restart(0.0), restart(0.0, y=(1.0, 2.0, 3.0))], r"observed_data .* in \[1\]"),
    ],
)
def test_trees_that_do_not_belong_together_are_refused(trees, message):
    with pytest.raises(ValueError, match=message):
        compare_restarts(trees())
