"""Eight schools: two parametrisations of one model, three guides, one known evidence."""

import math

import pyro
import pytest
import torch
from pyro import poutine

from models.eight_schools import EXACT_LOG_EVIDENCE, GUIDES, centred, data, main, non_centred


@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_gives_bounds_below_the_evidence_and_a_summary(guide, capsys, tmp_path):
    result = main(["--fast", "--guide", guide, "--output", str(tmp_path / "schools.nc")])
    bounds = result.tree["vi_diagnostics"].to_dataset()
    elbo, tightest = float(bounds["elbo"]), float(bounds["iwae"][-1])
    assert elbo <= tightest <= EXACT_LOG_EVIDENCE + 3 * float(bounds["iwae_se"][-1])
    assert float(bounds["gap"]) == pytest.approx(EXACT_LOG_EVIDENCE - elbo)
    assert {"mu", "tau", "eta[A]", "eta[H]"} <= set(result.summary.index)
    printed = capsys.readouterr().out
    assert f"{elbo:.3f}" in printed and "-31.311" in printed and "pareto k" in printed
    assert str(result.verdict) in printed
    assert (tmp_path / "schools.nc").stat().st_size > 10_000


def test_centred_draws_are_those_of_the_effects(capsys):
    result = main(["--fast", "--centred", "--guide", "auto_normal"])
    assert result.tree["posterior"]["theta"].sizes == {"chain": 1, "draw": 1000, "school": 8}
    assert "Eight schools, centred, auto_normal" in capsys.readouterr().out


def test_both_parametrisations_are_the_same_model():
    mu, tau = torch.tensor(4.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    eta = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    shared = {"mu": mu, "tau": tau}
    log_joint = {}
    for model, latents in (
        (centred, {**shared, "theta": mu + tau * eta}),
        (non_centred, {**shared, "eta": eta}),
    ):
        conditioned = poutine.condition(model, data=latents)
        log_joint[model] = poutine.trace(conditioned).get_trace(*data()).log_prob_sum().item()
    # eight times d eta / d theta = 1 / tau
    assert log_joint[non_centred] - log_joint[centred] == pytest.approx(8 * math.log(3.0))


def test_the_exact_evidence_is_that_of_this_model():
    """log p(y) by quadrature over tau; given tau, y is jointly normal."""
    sigma, y = data()
    tau = torch.tan(torch.linspace(1e-6, math.pi / 2 - 1e-6, 4001, dtype=torch.float64))
    tau = 5.0 * tau  # the quantiles of HalfCauchy(5) at equal steps of probability
    covariance = torch.diag_embed(tau[:, None] ** 2 + sigma**2) + 25.0
    log_prob = pyro.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    likelihood = torch.trapezoid(log_prob.exp(), dx=1.0 / 4000)
    assert likelihood.log().item() == pytest.approx(EXACT_LOG_EVIDENCE, abs=1e-3)
