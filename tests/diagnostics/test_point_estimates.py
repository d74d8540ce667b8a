"""Guides without a density: a point has no bound on the evidence, and no weights."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
    init_to_value,
)

from pyro_flowkit import fit
from pyro_flowkit.diagnostics import (
    compare_guides,
    diagnose,
    evidence_bounds,
    from_svi,
    pointwise_bounds,
    probe_modes,
    reweight,
)
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import FitResult

X = torch.tensor([0.3, 1.2, 0.9])
START = init_to_value(values={"a": torch.tensor(0.6), "s": torch.tensor(0.8)})


def model(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a, s), obs=x)


def by_hand(x):
    pyro.sample("a", dist.Delta(pyro.param("a_at", torch.tensor(0.6))))
    pyro.sample("s", dist.Delta(torch.tensor(0.8)))


def auto_delta():
    return AutoDelta(model, init_loc_fn=START)


def in_parts():
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["s"]), init_loc_fn=START))
    guide.append(AutoNormal(poutine.block(model, expose=["a"]), init_loc_fn=START, init_scale=0.45))
    return guide


def tree_of(guide, **options):
    return from_svi(model, guide, args=(X,), num_samples=200, seed=0, **options)


@pytest.mark.parametrize("make", [auto_delta, lambda: by_hand], ids=["AutoDelta", "by hand"])
def test_a_point_has_no_bound_and_the_words_name_laplace(make):
    tree = tree_of(make())
    verdict = diagnose(tree)
    joint = poutine.trace(
        poutine.condition(model, {"a": torch.tensor(0.6), "s": torch.tensor(0.8)})
    ).get_trace(X)
    assert verdict.level == "bad" and "point estimate" in verdict.reason
    assert "AutoLaplaceApproximation" in verdict.advice
    assert set(tree["vi_diagnostics"].data_vars) == {"log_joint"}
    assert float(tree["vi_diagnostics"]["log_joint"]) == pytest.approx(
        float(joint.log_prob_sum()), abs=1e-5
    )
    assert set(tree["sample_stats"].data_vars) == {"lp"}
    np.testing.assert_allclose(tree["posterior"]["a"], 0.6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"point estimate \(Delta\).*'a', 's'.*Laplace"):
        evidence_bounds(model, make(), args=(X,))
    with pytest.raises(ValueError, match="no weights"):
        reweight(tree)
    with pytest.raises(ValueError, match="Laplace"):
        probe_modes(model, make(), args=(X,))


def test_a_part_at_a_point_is_kept_apart_from_latents_with_a_density():
    guide = in_parts()
    bounds = evidence_bounds(model, guide, args=(X,), num_samples=2000, seed=0)
    assert bounds.attrs["point_estimates"] == "s"
    assert list(bounds["latent"].values) == ["a"]
    # given s the model is conjugate: log p(x, s) = log p(s) + log N(x; 0, s^2 I + 1 1')
    covariance = 0.64 * torch.eye(3) + torch.ones(3, 3)
    evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X)
    evidence = evidence + dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(0.8))
    assert float(bounds["log_evidence"]) == pytest.approx(float(evidence), abs=0.05)
    assert float(bounds["elbo"]) < float(evidence)
    verdict = diagnose(bounds)
    assert not verdict and "s is at a point estimate" in verdict.reason
    with pytest.raises(ValueError, match="no exact_log_evidence"):
        evidence_bounds(model, guide, args=(X,), exact_log_evidence=-1.0)


def test_a_table_of_guides_has_no_numbers_for_a_point():
    table = compare_guides({"delta": tree_of(auto_delta()), "flow": tree_of(flow_guide())})
    header, *lines = str(table).splitlines()
    assert header.split() == ["elbo", "elbo_se", "gap", "pareto_k", "ess", "verdict"]
    assert max(map(len, lines)) <= 80 and lines[-1].endswith("seconds")
    assert list(table.index) == ["flow", "delta"]
    assert list(table.columns)[:2] == ["elbo", "elbo_se"]
    assert table.loc["delta"].drop("verdict").isna().all()
    assert np.isfinite(table.loc["flow", "elbo"])


def flow_guide():
    return AutoSplineFlow(model, num_transforms=1, hidden_dims=(4,))


def test_guides_that_pass_draws_on_as_deltas_are_no_points():
    laplace = AutoLaplaceApproximation(model, init_loc_fn=START)
    with pytest.raises(ValueError, match="point estimate"):
        evidence_bounds(model, laplace, args=(X,))
    for guide in (laplace.laplace_approximation(X), AutoNormal(model), flow_guide()):
        bounds = evidence_bounds(model, guide, args=(X,), num_samples=200, seed=0)
        assert "point_estimates" not in bounds.attrs
        assert np.isfinite(float(bounds["elbo"]))


def test_a_datum_at_a_point_has_no_bound():
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    with pytest.raises(ValueError, match=r"point estimate \(Delta\).*'z'"):
        pointwise_bounds(local, guide, X, num_samples=10)


def follows(x):
    a = pyro.sample("a", dist.Normal(0.5, 0.4))
    pyro.sample("s", dist.Delta((a / 2).exp()))


def follows_a_kind(x):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("a", dist.Delta(torch.tensor([0.3, 0.9])[k.long()]))


def test_a_point_that_follows_from_another_latent_has_no_density_of_its_own():
    bounds = evidence_bounds(model, follows, args=(X,), num_samples=4000, seed=0)
    assert bounds.attrs["point_estimates"] == "s" and list(bounds["latent"].values) == ["a"]
    a = torch.linspace(-8.0, 8.0, 4001)
    s = (a / 2).exp()
    joint = dist.Normal(0.0, 1.0).log_prob(a) + dist.LogNormal(0.0, 1.0).log_prob(s)
    joint = joint + dist.Normal(a[:, None], s[:, None]).log_prob(X).sum(-1)
    right = joint.logsumexp(0) + torch.log(a[1] - a[0])
    assert float(bounds["log_evidence"]) == pytest.approx(float(right), abs=0.05)
    assert "s is at a point estimate" in diagnose(bounds).reason

    def mixture(x):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        a = pyro.sample("a", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0).expand([len(x)]).to_event(1), obs=x)

    bounds = evidence_bounds(mixture, follows_a_kind, args=(X,), num_samples=200, seed=0)
    assert bounds.attrs["point_estimates"] == "a"


def from_one_number(x):
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("a", dist.Delta(0.4 * u, log_density=torch.tensor(0.4).log().neg()))
    pyro.sample("s", dist.Delta(u.exp(), log_density=-u))


def from_nowhere(x):
    pyro.sample("a", dist.Normal(0.5, 0.4))
    pyro.sample("s", dist.Delta(torch.randn(()).exp()))


@pytest.mark.parametrize(
    ("guide", "counts"), [(from_one_number, "2 .* 1"), (from_nowhere, "1 .* 0")]
)
def test_more_numbers_in_deltas_than_behind_them_have_no_density(guide, counts):
    words = counts.replace(".*", "numbers in Delta sites, .*, that follow from")
    with pytest.raises(ValueError, match=f"a guide with a density, got {words} of auxiliary sites"):
        evidence_bounds(model, guide, args=(X,), num_samples=50)


def test_a_delta_with_as_many_auxiliary_numbers_has_a_density():
    def guide(x):
        u = pyro.sample(
            "u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True}
        )
        log_density = -torch.tensor(0.4).log()
        pyro.sample("a", dist.Delta(0.5 + 0.4 * u[..., 0], log_density=log_density))
        s = (0.4 * u[..., 1]).exp()
        pyro.sample("s", dist.Delta(s, log_density=log_density - s.log()))

    def plain(x):
        pyro.sample("a", dist.Normal(0.5, 0.4))
        pyro.sample("s", dist.LogNormal(0.0, 0.4))

    found = [evidence_bounds(model, g, args=(X,), num_samples=4000, seed=0) for g in (guide, plain)]
    assert "point_estimates" not in found[0].attrs
    assert float(found[0]["elbo"]) == pytest.approx(float(found[1]["elbo"]), abs=0.1)


def test_a_delta_whose_map_is_not_counted_is_refused():
    def guide(x):
        u = pyro.sample(
            "u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True}
        )
        pyro.sample("a", dist.Delta(0.5 + 0.4 * u[..., 0]))
        pyro.sample("s", dist.Delta((0.4 * u[..., 1]).exp()))

    # -log 0.4 twice, and what the exponential is at this draw
    with pytest.raises(ValueError, match=r"log_density = .* Delta sites \['a', 's'\], .* got 0:"):
        evidence_bounds(model, guide, args=(X,), num_samples=50)


@pytest.mark.parametrize("make", [auto_delta, lambda: by_hand], ids=["AutoDelta", "by hand"])
def test_a_fit_of_a_point_has_no_elbo(make, tmp_path):
    pyro.clear_param_store()
    guide = make()
    result = fit(model, guide, args=(X,), max_steps=2, progress=False)
    assert result.is_point and "log_joint=" in repr(result) and "elbo=" not in repr(result)
    assert "log p(x, z) at the point" in result._repr_html_()
    assert result.plot().get_ylabel() == "log p(x, z) at the point (nats)"
    result.save(tmp_path / "fit.pt")
    assert FitResult.load(tmp_path / "fit.pt", model, guide).is_point


@pytest.mark.parametrize("make", [in_parts, lambda: flow_guide(), lambda: AutoNormal(model)])
def test_a_fit_of_a_guide_with_a_density_has_an_elbo(make):
    pyro.clear_param_store()
    result = fit(model, make(), args=(X,), max_steps=1, num_particles=1, progress=False)
    assert not result.is_point and "elbo=" in repr(result)


def test_a_certain_discrete_latent_has_a_density():
    def coin(x):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Delta(torch.tensor(1.0)))

    bounds = evidence_bounds(coin, guide, args=(X[0],), num_samples=100)
    right = dist.Normal(1.0, 1.0).log_prob(X[0]) + torch.tensor(0.5).log()
    assert float(bounds["elbo"]) == pytest.approx(float(right), abs=1e-6)
