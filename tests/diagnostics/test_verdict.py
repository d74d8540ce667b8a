"""The rule by which guides are judged, on posteriors that are known: N(0, I), of evidence 1, unless said otherwise."""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from pyro_flowkit.diagnostics import (
    Verdict,
    calibration_tests,
    compare_guides,
    compare_restarts,
    diagnose,
    evidence_bounds,
    from_svi,
    iterate_convergence,
    loo_approximate_posterior,
    pointwise_bounds,
    reweight,
)
from pyro_flowkit.diagnostics.rule import Check, Marginal, Numbers, Probe, judge

GOOD = Numbers(
    num_draws=4000,
    elbo=-1.0,
    gap=0.002,
    gap_error=1e-4,
    exact=False,
    pareto_k=0.2,
    pareto_k_error=0.09,
    largest_weight=5e-4,
    ess=3980.0,
    spread_error=1e-3,
)
LARGE_K = {"pareto_k": 0.9, "pareto_k_error": 0.14}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(loc, scale):
    """A program that draws z, used as model and as guide."""

    def program():
        pyro.sample("z", dist.Normal(tensor(*loc), tensor(*scale)).to_event(1))

    return program


def bounds(loc, scale, **options):
    model = normal([0.0] * len(loc), [1.0] * len(loc))
    return evidence_bounds(model, normal(loc, scale), **({"seed": 0} | options))


def changed(**values):
    return judge(dataclasses.replace(GOOD, **values))


def test_a_guide_that_is_nearly_right_is_good_and_says_what_draws_cannot_see():
    verdict = judge(GOOD)
    assert verdict and verdict.level == "good"
    assert "a mode that the guide never visits" in verdict.limits
    assert str(verdict).endswith(verdict.limits)


def test_a_pareto_k_counts_only_where_weights_are_large():
    assert changed(**LARGE_K).level == "good"
    heavy = changed(**LARGE_K, largest_weight=0.02, ess=1200.0, spread_error=0.2)
    assert heavy.level == "bad"
    assert "20% of the evidence may lie where there are no draws" in heavy.reason
    assert 'base="student_t"' in heavy.advice and "NeuTraReparam" in heavy.advice
    light = changed(pareto_k=-0.1, pareto_k_error=0.0, largest_weight=0.02, spread_error=0.2)
    assert light.level == "good"


@pytest.mark.parametrize(
    ("gap", "level"), [(0.05, "good"), (0.3, "usable"), (0.8, "bad"), (math.nan, "bad")]
)
def test_the_gap_decides(gap, level):
    verdict = changed(gap=gap, gap_error=0.01)
    assert verdict.level == level
    assert "num_transforms" in verdict.advice or level != "bad"


@pytest.mark.parametrize(("share", "level"), [(0.8, "good"), (0.5, "usable"), (0.2, "bad")])
def test_the_ess_decides(share, level):
    assert changed(ess=4000 * share).level == level


@pytest.mark.parametrize(
    ("name", "value", "size", "level"),
    [
        ("shift", 0.05, 0.05, "good"),
        ("shift", 0.15, 0.15, "usable"),
        ("shift", -0.3, 0.3, "bad"),
        ("scale", 1.05, math.log(1.05), "good"),
        ("scale", 1.15, math.log(1.15), "usable"),
        ("scale", 0.8, -math.log(0.8), "bad"),
    ],
)
def test_marginals_decide(name, value, size, level):
    verdict = changed(**{name: Marginal("z[3]", value, size, size - 0.01, size + 0.01)})
    assert verdict.level == level
    words = {
        "shift": f"the guide's z[3] is {abs(value):.2f} sd {'above' if value > 0 else 'below'}",
        "scale": f"the guide's sd of z[3] is {value:.2f} of the weighted one",
    }
    assert (words[name] in verdict.reason) == (level != "good")


def test_an_exact_gap_that_is_small_leaves_nothing_else_to_ask():
    worst = LARGE_K | {"largest_weight": 0.5, "ess": 2.0, "exact": True}
    verdict = changed(gap=0.0005, gap_error=1e-4, **worst)
    assert verdict.level == "good" and verdict.limits == ""
    assert judge(dataclasses.replace(GOOD, gap=0.0005, exact=True, **LARGE_K), PROBE_OF_HALF)
    assert changed(gap=0.7, gap_error=0.01, exact=True).level == "bad"
    above = changed(gap=-0.7, gap_error=0.01, exact=True)
    assert above.level == "bad" and "above the exact log evidence" in above.reason


PROBE_OF_HALF = Probe(24, 0.48, "z = -9.99")


def test_a_probe_lifts_the_limits_or_names_what_is_missed():
    probed = judge(GOOD, Probe(24, 0.001, "z = 0"))
    assert probed.level == "good" and probed.limits == "" and "24 searches" in probed.reason
    missed = judge(GOOD, PROBE_OF_HALF)
    assert missed.level == "bad" and "48% of the posterior" in missed.reason
    assert "z = -9.99" in missed.reason and "num_components=2" in missed.advice


def test_few_draws_do_not_tell():
    few = changed(
        num_draws=26,
        pareto_k=0.23,
        pareto_k_error=0.55,
        largest_weight=0.042,
        ess=25.9,
        gap_error=0.01,
    )
    assert few.level == "usable"
    assert "too few draws: 26" in few.reason and few.advice == "Take about 1,000 draws."
    wide = changed(scale=Marginal("z", 1.15, 0.14, 0.05, 0.23))
    assert wide.level == "usable" and "too few draws: 4,000" in wide.reason


def test_an_elbo_that_is_not_finite_is_bad():
    verdict = changed(elbo=-math.inf, gap=math.inf)
    assert verdict.level == "bad" and "support" in verdict.advice


def test_a_check_knows_what_its_error_leaves_open():
    def check(value, error):
        return Check(value, value - error, value + error, 1.0, 2.0)

    assert check(0.5, 0.4).is_settled and check(0.5, 0.4).level == 0
    assert not check(0.9, 0.4).is_settled and check(0.9, 0.4).level == 0
    assert check(1.5, 0.9).cannot_tell and check(1.5, 0.9).level == 1
    assert check(3.0, 0.9).surely_bad and not check(2.5, 0.9).surely_bad
    assert check(0.8, 0.4).more_draws == pytest.approx(4.0)


def test_a_verdict_is_true_if_it_is_good_and_has_errors_if_it_is_bad():
    assert Verdict("good", "a", "B.") and not Verdict("usable", "a", "B.")
    assert not Verdict("bad", "a", "B.")
    assert str(Verdict("good", "a", "B.", "C.")) == "good: a. B. C."
    for loc, has_errors in ((0.0, False), (0.15, False), (1.0, True)):
        assert diagnose(bounds([loc], [1.0]), return_diagnostics=True)[0] is has_errors


@pytest.mark.parametrize(
    ("loc", "scale", "words"),
    [
        ([0.3, 0.0], [1.0, 1.0], r"the guide's z\[0\] is 0\.(29|3\d) sd above"),
        ([0.0, 0.0], [1.0, 0.8], r"the guide's sd of z\[1\] is 0\.(79|8\d) of"),
        ([0.0, 0.0], [1.3, 1.0], r"the guide's sd of z\[0\] is 1\.(29|3\d) of"),
    ],
)
def test_guides_that_are_off_in_one_latent_are_bad(loc, scale, words):
    """The gap is 0.04 to 0.08 nats."""
    for seed in range(3):
        verdict = diagnose(bounds(loc, scale, seed=seed))
        assert verdict.level == "bad"
        assert re.search(words, verdict.reason)


def test_verdicts_on_good_guides_do_not_change_with_the_seed():
    """Weights of 1 +- 0.04 whose pareto k is above the threshold at many seeds."""
    scale = tensor(0.15)
    posterior = dist.LogNormal(tensor(0.0), scale)
    a = float(1 / scale**2)
    guide = dist.Gamma(tensor(a + 0.5), tensor(a))

    def judged(seed):
        found = evidence_bounds(
            lambda: pyro.sample("z", posterior.to_event(1)),
            lambda: pyro.sample("z", guide.to_event(1)),
            seed=seed,
            max_samples=4000,
        )
        return diagnose(found).level, float(found["pareto_k"])

    levels, pareto_k = zip(*map(judged, range(12)), strict=True)
    assert Counter(levels) == {"good": 12}
    assert sum(k > 0.7 for k in pareto_k) >= 3


def test_draws_are_added_while_the_verdict_hangs_on_noise():
    few = bounds([0.03], [0.98], num_samples=26, max_samples=26)
    assert int(few["num_draws"]) == 26
    assert "too few draws: 26" in diagnose(few).reason
    more = bounds([0.03], [0.98], num_samples=26)
    assert 26 < int(more["num_draws"]) <= 16 * 26
    assert more.attrs["num_samples"] == int(more["num_draws"])
    assert diagnose(more).level == "good"
    assert int(bounds([0.03], [0.98])["num_draws"]) == 4000
    with pytest.raises(ValueError, match="max_samples >= num_samples = 26, got 25"):
        bounds([0.03], [0.98], num_samples=26, max_samples=25)


def test_a_tree_keeps_the_draws_that_were_asked_for():
    model, guide = normal([0.0], [1.0]), normal([0.0], [0.97])
    tree = from_svi(model, guide, num_samples=30, seed=0)
    assert tree["posterior"].sizes["draw"] == 30
    found = tree["vi_diagnostics"].to_dataset()
    assert int(found["num_draws"]) > 30
    same = evidence_bounds(model, guide, num_samples=30, max_samples=30, seed=0)
    alone = from_svi(model, guide, num_samples=30, max_samples=30, seed=0)["vi_diagnostics"]
    assert float(alone["elbo"]) == float(same["elbo"]) != float(found["elbo"])


def vae(data):
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


@pytest.mark.parametrize(
    ("shift", "scale", "level"), [(0.0, 1.0, "good"), (0.6, 1.0, "usable"), (2.0, 1.0, "bad")]
)
def test_pointwise_bounds_are_judged_datum_by_datum(shift, scale, level):
    """The posterior is N(x / 2, 1 / 2), so that a shift of d sd is a gap of d^2 / 2."""
    sd = math.sqrt(0.5)

    def guide(data):
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(data / 2 + shift * sd, sd * scale))

    data = torch.linspace(-1, 1, 20, dtype=torch.float64)
    verdict = diagnose(pointwise_bounds(vae, guide, data, seed=0))
    assert verdict.level == level
    count = {"good": "20 have a good guide", "usable": "20 a usable one", "bad": "20 a bad one"}
    assert count[level] in verdict.reason
    assert f"{shift**2 / 2:.1f}" in verdict.reason
    assert bool(verdict.limits) == (level == "good")


def uniform_pits(shift=0.0):
    scores = np.random.default_rng(0).standard_normal((1, 400)) + shift
    import scipy.special

    return xr.Dataset({"z": (("chain", "draw"), scipy.special.ndtr(scores))})


@pytest.mark.parametrize(
    ("result", "level"),
    [
        (lambda: calibration_tests(uniform_pits()), "good"),
        (lambda: calibration_tests(uniform_pits(0.5)), "bad"),
        (lambda: calibration_tests(uniform_pits(), kind="symmetry"), "good"),
        (lambda: compare_restarts([-10.0, -10.01]), "good"),
        (lambda: compare_restarts([-10.0, -13.0]), "usable"),
        (lambda: iterate_convergence(np.random.default_rng(0).standard_normal((400, 1))), "good"),
    ],
)
def test_every_result_has_the_same_kind_of_verdict(result, level):
    found = result()
    verdict = diagnose(found)
    assert isinstance(verdict, Verdict) and verdict.level == level
    assert bool(verdict) == (level == "good") == bool(verdict.limits)
    has_errors, checks = diagnose(found, return_diagnostics=True)
    assert has_errors == (level == "bad") and set(checks) == {"verdict"}
    with pytest.raises(ValueError, match="Expected a probe together with the result of from_svi"):
        diagnose(found, probe=found)


def test_what_is_no_result_is_refused():
    guide = pyro.infer.autoguide.AutoNormal(lambda: None)
    for ask in (diagnose, reweight, loo_approximate_posterior, lambda g: compare_guides({"a": g})):
        with pytest.raises(TypeError, match="got AutoNormal: from_svi\\(model, guide\\) makes one"):
            ask(guide)
    with pytest.raises(ValueError, match=r"one pareto_k for all data or each datum, got \['a'\]"):
        diagnose(xr.Dataset({"a": 1.0}))
    with pytest.raises(ValueError, match="Expected the result of probe_modes, got"):
        diagnose(bounds([0.0], [1.0]), probe=xr.Dataset({"a": 1.0}))


def test_a_heavy_tail_that_carries_little_is_said():
    verdict = changed(pareto_k=1.2, pareto_k_error=0.15)
    assert verdict.level == "good" and "heavy tail" in verdict.limits
    probed = judge(dataclasses.replace(GOOD, pareto_k=1.2, pareto_k_error=0.15), Probe(24, 0.0, ""))
    assert probed.level == "good" and probed.limits.startswith("The weights have a heavy tail")
    assert changed(pareto_k=1.2, pareto_k_error=0.15, exact=True).limits == ""


def test_one_large_weight_is_never_sure():
    """Of 4,000 weights one is 350 times as large as the others."""
    largest = 350 / 4349
    ess = 1 / (largest**2 + 3999 / 4349**2)
    numbers = dataclasses.replace(GOOD, largest_weight=largest, ess=ess, spread_error=0.1)
    check = numbers.checks["spread"]
    assert check.value > check.bad and check.low == pytest.approx(0.0, abs=1e-3)
    assert numbers.hangs_on_noise


def test_a_tail_without_a_mean_is_not_smoothed_for_the_ess():
    """Its fit is cut off at the largest weight, and would make many as large."""
    model = lambda: pyro.sample("z", dist.StudentT(tensor(30.0), 0.0, 1.0).to_event(1))  # noqa: E731
    guide = normal([0.0], [1.03])
    found = evidence_bounds(model, guide, seed=0, max_samples=4000)
    assert float(found["pareto_k"]) > 1
    tree = from_svi(model, guide, seed=0, max_samples=4000)
    log_weight = torch.as_tensor(tree["sample_stats"]["log_weight"].values[0].copy())
    weights = log_weight.softmax(0)
    assert float(found["ess"]) == pytest.approx(float(1 / weights.square().sum()), rel=1e-6)
    assert float(found["largest_weight"]) == pytest.approx(float(weights.max()), rel=1e-6)


def test_a_notebook_shows_level_reason_advice_and_limits_as_text():
    shown = Verdict("bad", "gap > 1", "Train <longer>.", "Blind.")._repr_html_()
    for part in ("<strong>bad</strong>", "gap &gt; 1.", "Train &lt;longer&gt;.", "Blind."):
        assert part in shown
    assert Verdict("good", "a", "b")._repr_html_().count("<p>") == 2
