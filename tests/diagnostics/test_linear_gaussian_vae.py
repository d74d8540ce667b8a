r"""The one VAE whose log p(x) is known: z ~ N(0, I), x | z ~ N(W z + b, s^2 I).

p(x)      = N(b, W W' + s^2 I)
p(z | x)  = N(S W'(x - b) / s^2, S),   S = (I + W'W / s^2)^-1
gap       = log p(x) - ELBO = KL(q(z | x) || p(z | x))      in closed form for a Gaussian q
"""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch.distributions import kl_divergence

from pyro_flowkit.diagnostics import evidence_bounds, pointwise, pointwise_bounds
from tests.diagnostics.linear_gaussian import X_DIM, LinearGaussian

NUM_DATA, NOISE = 60, 0.7


class LinearGaussianVAE(LinearGaussian):
    def __init__(self, seed=0):
        super().__init__(NUM_DATA, NOISE, seed=seed)

    def exact_gap(self):
        mean = self.posterior_mean(self.data)
        guide = torch.distributions.MultivariateNormal(
            mean + self.shift, torch.diag_embed(self.scale.square())
        )
        posterior = torch.distributions.MultivariateNormal(mean, self.covariance)
        return kl_divergence(guide, posterior)


class NegatedNormal(dist.Normal):
    """A guide's distribution with the sign of its density wrong."""

    def log_prob(self, value):
        return -super().log_prob(value)


class NegatedVAE(LinearGaussianVAE):
    guide_family = NegatedNormal


def check_bounds(vae):
    """Asserts that all numbers of the VAE agree with the closed form."""
    exact, gap = vae.exact_log_prob(), vae.exact_gap()
    bounds = pointwise_bounds(
        vae.model, vae.guide, vae.data, num_samples=4000, batch_size=25, seed=0
    )
    num_data = bounds.sizes["obs_id"]
    assert num_data == len(vae.data)

    def mean_and_error(name, **select):
        values = (bounds[name] - xr_exact(exact)).sel(**select)
        errors = bounds[f"{name}_se"].sel(**select)
        assert bool((errors > 0).all())
        return float(values.mean()), float(np.sqrt((errors**2).sum()) / num_data)

    elbo, elbo_error = mean_and_error("elbo")
    iwae_10, error_10 = mean_and_error("iwae", n_particles=10)
    iwae_1000, error_1000 = mean_and_error("iwae", n_particles=1000)
    evidence, evidence_error = mean_and_error("log_evidence")
    assert elbo < iwae_10 < iwae_1000 < 3 * error_1000, "ELBO <= IWAE-10 <= IWAE-1000 <= exact"
    assert iwae_10 < 3 * error_10 and elbo < 3 * elbo_error
    assert abs(evidence) < 3 * evidence_error + 1e-3, "PSIS evidence = exact"
    estimated_gap = -elbo
    assert abs(estimated_gap - float(gap.mean())) < 0.01, "gap = KL(q || posterior)"
    per_datum = np.abs(bounds["elbo"] - xr_exact(exact - gap)) / bounds["elbo_se"]
    assert float((per_datum < 4).mean()) == 1.0, "every ELBO within its standard error"
    assert float(bounds["pareto_k"].max()) < 0.7 and float(bounds["ess"].min()) > 400


def xr_exact(values):
    return xr.DataArray(values.numpy(), dims="obs_id")


def test_bounds_bracket_the_exact_value_and_the_gap_matches():
    vae = LinearGaussianVAE()
    assert 0.1 < float(vae.exact_gap().mean()) < 1.0  # there is something to find
    check_bounds(vae)


def test_a_sign_error_in_log_q_is_caught():
    with pytest.raises(AssertionError, match="ELBO <= IWAE-10 <= IWAE-1000 <= exact"):
        check_bounds(NegatedVAE())


def test_a_sign_error_in_the_log_weights_is_caught(monkeypatch):
    def sum_instead_of_difference(particles, dim, batch_size):
        log_prob = [site["log_prob"] for _, _, site in pointwise._sites(particles)]
        return sum(log_prob).reshape(particles.size, batch_size)

    monkeypatch.setattr(pointwise, "datum_log_weights", sum_instead_of_difference)
    with pytest.raises(AssertionError, match="ELBO <= IWAE-10 <= IWAE-1000 <= exact"):
        check_bounds(LinearGaussianVAE())


def test_standard_errors_are_the_spread_over_repetitions():
    vae = LinearGaussianVAE()
    runs = [
        pointwise_bounds(vae.model, vae.guide, vae.data[:1], num_samples=1000, seed=seed)
        for seed in range(60)
    ]
    for name, select in (
        ("elbo", {}),
        ("iwae", {"n_particles": 10}),
        ("iwae", {"n_particles": 100}),
        ("iwae", {"n_particles": 1000}),
        ("log_evidence", {}),
    ):
        values = [float(run[name].sel(**select)[0]) for run in runs]
        errors = [float(run[f"{name}_se"].sel(**select)[0]) for run in runs]
        ratio = np.sqrt(np.mean(np.square(errors))) / np.std(values, ddof=1)
        assert 0.75 < ratio < 1.4, (name, select, ratio)  # 60 repetitions: +- 9 % at one sigma


def test_sum_over_data_is_the_evidence_of_all_data():
    vae = LinearGaussianVAE()
    data = vae.data[:3]
    exact = float(vae.exact_log_prob()[:3].sum())
    bounds = evidence_bounds(vae.model, vae.guide, args=(data,), exact_log_evidence=exact, seed=1)
    gap = float(vae.exact_gap()[:3].sum())
    assert abs(float(bounds["gap"]) - gap) < 4 * float(bounds["elbo_se"])
    assert abs(float(bounds["log_evidence"]) - exact) < 4 * float(bounds["log_evidence_se"])


def test_exact_values_give_a_gap_per_datum():
    vae = LinearGaussianVAE()
    bounds = pointwise_bounds(
        vae.model,
        vae.guide,
        vae.data,
        num_samples=500,
        exact_log_evidence=vae.exact_log_prob(),
        seed=2,
    )
    assert bounds["gap"].dims == ("obs_id",)
    assert abs(float(bounds["gap"].mean()) - float(vae.exact_gap().mean())) < 0.02
    assert list(bounds["n_particles"]) == [1, 10, 100]
    assert bounds.attrs["event_size"] == X_DIM
    assert math.isclose(bounds.attrs["pareto_k_threshold"], 1 - 1 / math.log10(500))
