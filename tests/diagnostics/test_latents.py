r"""KL, active units and collapse where all of them are known.

z ~ N(0, t^2 I), x | z ~ N(W z, s^2 I) with orthogonal columns w_d of W, the last one zero: the
posterior has independent dimensions of variance v_d = 1 / (1 / t^2 + |w_d|^2 / s^2), the latents
know I_d = 1/2 log(t^2 / v_d) nats of the data, which is the KL in the mean over data, and the
posterior means vary by t^2 - v_d.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch.distributions import kl_divergence

from pyro_flowkit.diagnostics import latent_usage, latent_verdict
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides import AmortizedSplineFlow

DOUBLE = torch.float64
NOISE = 0.7
WEIGHT = torch.zeros(4, 3, dtype=DOUBLE)
WEIGHT[0, 0], WEIGHT[1, 1] = 1.5, 0.4


class OrthogonalVAE:
    def __init__(self, scale=1.0, full_rank=False):
        self.scale, self.full_rank = scale, full_rank
        self.weight = WEIGHT / scale
        self.variance = 1 / (1 / scale**2 + self.weight.square().sum(0) / NOISE**2)
        generator = torch.Generator().manual_seed(0)
        z = scale * torch.randn(3000, 3, generator=generator, dtype=DOUBLE)
        noise = torch.randn(3000, 4, generator=generator, dtype=DOUBLE)
        self.data = z @ self.weight.T + NOISE * noise

    def model(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(3, dtype=DOUBLE), self.scale).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=x)

    def posterior(self, x):
        mean = x @ self.weight * self.variance / NOISE**2
        if self.full_rank:
            return dist.MultivariateNormal(mean, scale_tril=self.variance.sqrt().diag())
        return dist.Normal(mean, self.variance.sqrt()).to_event(1)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_all_measures_are_the_analytic_ones_in_units_of_the_prior(scale):
    vae = OrthogonalVAE(scale)
    usage = latent_usage(vae.model, vae.guide, vae.data, num_samples=50, seed=0)
    assert usage["latent"].to_numpy().tolist() == ["z[0]", "z[1]", "z[2]"]
    posterior = vae.posterior(vae.data).base_dist
    exact = kl_divergence(posterior, dist.Normal(0.0, torch.tensor(scale, dtype=DOUBLE)))
    np.testing.assert_allclose(usage["kl"], exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(usage["kl_total"], exact.sum(-1), rtol=1e-9)
    information = 0.5 * (scale**2 / vae.variance).log()
    np.testing.assert_allclose(usage["information"], information, atol=0.02)
    np.testing.assert_allclose(
        usage["mean_variance"] / scale**2, 1 - vae.variance / scale**2, atol=0.02
    )
    np.testing.assert_allclose(usage["prior_variance"] / scale**2, 1.0, atol=0.02)
    assert usage["active"].to_numpy().tolist() == [True, True, False]
    verdict = latent_verdict(usage)
    assert verdict.level == "usable"
    assert "posterior collapse of 1 of 3 latents (z[2])" in verdict.reason
    assert usage.attrs["message"] == str(verdict)


def test_a_posterior_without_independent_dimensions_has_a_kl_of_all_together_only():
    vae = OrthogonalVAE(full_rank=True)
    data = vae.data[:300]
    usage = latent_usage(vae.model, vae.guide, data, num_samples=400, seed=0)
    assert usage["kl"].isnull().all()
    prior = dist.MultivariateNormal(torch.zeros(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE))
    exact = kl_divergence(vae.posterior(data), prior)
    assert abs(float(usage["kl_total"].mean()) - float(exact.mean())) < 0.02
    assert usage["active"].to_numpy().tolist() == [True, True, False]


def collapsed_model(x):
    with pyro.plate("rows", len(x), dim=-2):
        with pyro.plate("two", 2, dim=-1):
            pyro.sample("a", dist.Normal(x.new_zeros(len(x), 2), 1.0))
        scale = pyro.sample("scale", dist.Gamma(x.new_full((len(x), 1), 3.0), 2.0))
        pyro.sample("x", dist.Normal(scale, 1.0), obs=x[:, None])


def collapsed_guide(x, offset=0.0):
    with pyro.plate("rows", len(x), dim=-2):
        with pyro.plate("two", 2, dim=-1):
            pyro.sample("a", dist.Normal(x.new_full((len(x), 2), offset), 1.0))
        pyro.sample("scale", dist.LogNormal(x.new_zeros(len(x), 1), 0.5))


def test_the_noise_of_few_draws_is_not_taken_for_information():
    usage = latent_usage(collapsed_model, collapsed_guide, torch.randn(800), num_samples=2, seed=0)
    assert usage["latent"].to_numpy().tolist() == ["a[0]", "a[1]", "scale"]
    assert not usage["active"].any()
    assert float(usage["mean_variance"].max()) < 0.1
    assert "posterior collapse of 3 of 3 latents" in usage.attrs["message"]
    assert latent_verdict(usage).level == "bad"


def test_a_kl_without_closed_form_comes_from_draws():
    usage = latent_usage(collapsed_model, collapsed_guide, torch.randn(40), num_samples=500, seed=0)
    q, p = torch.distributions.LogNormal(0.0, 0.5), torch.distributions.Gamma(3.0, 2.0)
    draws = q.sample((200_000,))
    exact = float((q.log_prob(draws) - p.log_prob(draws)).mean())
    np.testing.assert_allclose(usage["kl"], [0.0, 0.0, exact], atol=0.02)


def test_a_collapsed_latent_that_is_not_the_prior_is_said():
    usage = latent_usage(
        collapsed_model, lambda x: collapsed_guide(x, 2.0), torch.randn(40), seed=0
    )
    assert "the KL of 3 of these is above 0.1 nats" in usage.attrs["message"]


def test_flows_as_prior_and_posterior_are_measured():
    pyro.clear_param_store()
    torch.manual_seed(0)
    prior, posterior = SplineFlow(2).double(), SplineFlow(2, 2, base="conditional_normal").double()

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", posterior(x))

    data = torch.randn(50, 2, dtype=DOUBLE)
    usage = latent_usage(model, guide, data, batch_size=20, seed=0)
    assert usage["kl"].isnull().all() and not usage["active"].any()
    np.testing.assert_allclose(usage["kl_total"], 0.0, atol=1e-6)  # both fresh: standard normal
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert float(latent_usage(model, guide, data, seed=0)["kl_total"].mean()) > 0.01


def test_the_latents_of_an_amortised_guide_are_those_of_the_model():
    pyro.clear_param_store()

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            rate = pyro.sample("rate", dist.Gamma(torch.full_like(x, 3.0), 3.0))
            pyro.sample("x", dist.Normal(z, rate.rsqrt()), obs=x)

    data = torch.linspace(-2.0, 2.0, 30, dtype=DOUBLE)
    guide = AmortizedSplineFlow(model, lambda x: x[:, None], context_dim=1)
    guide(data)
    guide.affine.weight.data.add_(0.5)
    usage = latent_usage(model, guide, data, seed=0)
    assert usage["latent"].to_numpy().tolist() == ["z", "rate"]
    assert usage["kl"].isnull().all() and usage["active"].all()
    assert usage["kl_total"].notnull().all()
    assert latent_verdict(usage).level == "good"


def test_the_dataset_goes_through_netcdf(tmp_path):
    usage = latent_usage(collapsed_model, collapsed_guide, torch.randn(5), seed=0)
    usage.to_netcdf(tmp_path / "usage.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "usage.nc", engine="h5netcdf") as opened:
        assert str(latent_verdict(opened.load())) == usage.attrs["message"]


def test_bad_arguments_are_refused_with_numbers():
    with pytest.raises(ValueError, match="2 data and 2 draws.*got 1 and 100"):
        latent_usage(collapsed_model, collapsed_guide, torch.zeros(1))
    with pytest.raises(ValueError, match="got 3 and 1"):
        latent_usage(collapsed_model, collapsed_guide, torch.zeros(3), num_samples=1)
    with pytest.raises(ValueError, match=r"active, got \['elbo'\]"):
        latent_verdict(xr.Dataset({"elbo": 1.0}))


def test_a_point_estimate_is_no_posterior():
    def guide(x, fn):
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("two", 2, dim=-1):
                pyro.sample("a", dist.Delta(x[:, None].expand(-1, 2)))
            pyro.sample("scale", fn(x.new_ones(len(x), 1)))

    with pytest.raises(ValueError, match="got point estimates"):
        latent_usage(collapsed_model, lambda x: guide(x, dist.Delta), torch.randn(5))
    mixed = latent_usage(
        collapsed_model, lambda x: guide(x, lambda one: dist.LogNormal(one, 1.0)), torch.randn(5)
    )
    assert mixed["active"].to_numpy().tolist() == [True, True, False]


def test_a_latent_that_never_varies_explains_nothing():
    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("two", 2, dim=-1):
                pyro.sample("a", dist.Normal(x.new_zeros(len(x), 2), 1.0))
            pyro.sample("scale", dist.Delta(x.new_ones(len(x), 1)))

    usage = latent_usage(collapsed_model, guide, torch.randn(5)).sel(latent="scale")
    assert float(usage["variance_explained"]) == float(usage["information"]) == 0.0
