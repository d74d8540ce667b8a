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

from pyro_flowkit.diagnostics import diagnose, latent_usage
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides import AmortizedSplineFlow
from tests.diagnostics.linear_gaussian import TwoLevels

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
    error = np.sqrt(2 / len(vae.data))  # the prior is drawn from once for every datum
    np.testing.assert_allclose(usage["prior_variance"] / scale**2, 1.0, atol=4 * error)
    assert usage["active"].to_numpy().tolist() == [True, True, False]
    verdict = diagnose(usage)
    assert verdict.level == "usable"
    assert "posterior collapse in part" in verdict.reason
    assert "along 2 of 3 directions of z, by more than 0.01 of the variance" in verdict.reason
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


class RankTwoVAE:
    """z in 8 dimensions, of which W sees the first two: r_d = |w_d|^2 / (|w_d|^2 + s^2), turned by Q."""

    GAINS = torch.tensor([15.6, 6.1] + [0.0] * 6, dtype=DOUBLE)

    def __init__(self, kind="full rank", turned=True):
        generator = torch.Generator().manual_seed(1)
        square = torch.randn(8, 8, generator=generator, dtype=DOUBLE)
        self.turn = torch.linalg.qr(square)[0] if turned else torch.eye(8, dtype=DOUBLE)
        self.kind, self.weight = kind, NOISE * torch.diag(self.GAINS) @ self.turn.T
        z = torch.randn(2000, 8, generator=generator, dtype=DOUBLE)
        noise = torch.randn(2000, 8, generator=generator, dtype=DOUBLE)
        self.data = z @ self.weight.T + NOISE * noise
        covariance = self.turn @ (1 / (1 + self.GAINS**2)).diag() @ self.turn.T
        self.tril = torch.linalg.cholesky(covariance)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8, dtype=DOUBLE), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=x)

    def mean(self, x):
        return x @ self.weight / NOISE**2 @ self.tril @ self.tril.T

    def guide(self, x):
        with pyro.plate("data", len(x)):
            if self.kind == "full rank":
                covariance = self.tril @ self.tril.T
                return pyro.sample("z", dist.MultivariateNormal(self.mean(x), covariance))
            if self.kind == "normal":
                return pyro.sample("z", dist.Normal(self.mean(x), self.tril.diag()).to_event(1))
            base = dist.Normal(torch.zeros_like(x), 1.0).to_event(1)
            moved = torch.distributions.AffineTransform(self.mean(x), 1.0, event_dim=1)
            turned = dist.transforms.LowerCholeskyAffine(torch.zeros(8, dtype=DOUBLE), self.tril)
            pyro.sample("z", dist.TransformedDistribution(base, [turned, moved]))


@pytest.mark.parametrize(
    ("kind", "turned"), [("normal", False), ("full rank", True), ("transformed", True)]
)
def test_directions_are_those_that_the_decoder_sees_however_latents_are_turned(kind, turned):
    vae = RankTwoVAE(kind, turned)
    usage = latent_usage(vae.model, vae.guide, vae.data, num_samples=40, batch_size=300, seed=0)
    exact = vae.GAINS**2 / (1 + vae.GAINS**2)
    assert [round(float(share), 3) for share in exact[:2]] == [0.996, 0.974]
    np.testing.assert_allclose(usage["direction_explained"], exact, atol=4e-3)
    assert usage["direction_active"].to_numpy().tolist() == [True] * 2 + [False] * 6
    assert usage["direction"].to_numpy().tolist() == [f"z:{i}" for i in range(8)]
    information = 0.5 * (1 + vae.GAINS**2).log()
    np.testing.assert_allclose(usage["direction_information"], information, atol=0.05)
    np.testing.assert_allclose(usage["site_kl"], usage["kl_total"].mean())
    message = usage.attrs["message"]
    assert "along 2 of 8 directions of z, by more than 0.01" in message
    coordinates = int(usage["active"].sum())
    assert coordinates >= 6 if turned else coordinates == 2
    assert (f"{coordinates} of 8 coordinates vary" in message) == turned


def test_the_shares_are_exact_where_the_data_are_known():
    vae = RankTwoVAE()
    data = vae.data[:50]
    usage = latent_usage(vae.model, vae.guide, data, num_samples=4000, seed=0)
    between = torch.cov(vae.mean(data).T)
    total = between + vae.tril @ vae.tril.T
    exact = torch.linalg.eigvals(torch.linalg.solve(total, between)).real.sort(descending=True)[0]
    np.testing.assert_allclose(usage["direction_explained"], exact, atol=1e-3)


@pytest.mark.parametrize("num_samples", [2, 10, 100])
@pytest.mark.parametrize("size", [2, 32])
def test_posteriors_that_are_all_the_same_have_no_active_direction(num_samples, size):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(size, dtype=DOUBLE), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.full((size,), 0.3, dtype=DOUBLE)
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    for seed in range(3):
        data = torch.zeros(150, dtype=DOUBLE)
        usage = latent_usage(model, guide, data, num_samples=num_samples, seed=seed)
        assert int(usage["active_directions"].sum()) == 0, seed
        assert diagnose(usage).level == "bad"


def test_levels_of_a_hierarchy_have_an_entry_each():
    vae = TwoLevels(4000)
    usage = latent_usage(vae.model, vae.guide, vae.data, num_samples=60, seed=0)
    assert usage["site"].to_numpy().tolist() == ["z2", "z1"]
    assert usage["active_directions"].to_numpy().tolist() == [2, 3]
    # the posterior is exact, B + W the covariance of the prior
    known2 = torch.linalg.eigvalsh(torch.eye(2, dtype=DOUBLE) - vae.cov2)
    gain = vae.of_z1 @ vae.weight.T @ vae.of_x.inverse() @ vae.weight
    known1 = torch.linalg.eigvals(gain).real.sort()[0]
    shares = usage["direction_explained"].to_numpy()
    np.testing.assert_allclose(shares[:2], known2.flip(0), atol=0.02)
    np.testing.assert_allclose(shares[2:], known1.flip(0), atol=0.02)
    kl2 = 0.5 * float(-vae.cov2.logdet())  # E KL(posterior || prior) is the information
    np.testing.assert_allclose(usage["site_kl"][0], kl2, atol=0.05)
    np.testing.assert_allclose(usage["site_kl"].sum(), usage["kl_total"].mean(), rtol=1e-6)
    message = usage.attrs["message"]
    assert "along 2 of 2 directions of z2" in message and "3 of 3 directions of z1 (KL" in message


def test_a_level_that_merely_follows_the_one_above_it_is_said():
    vae = TwoLevels(300)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x[:, :2], 0.5).to_event(1))
            pyro.sample("z1", dist.Normal(z2 @ vae.upper.T, vae.scale).to_event(1))

    usage = latent_usage(vae.model, guide, vae.data, seed=0)
    assert float(usage["site_kl"][1]) == 0.0 and int(usage["active_directions"][1]) > 0
    assert diagnose(usage).level == "usable"
    assert "z1 only follows the other latents" in usage.attrs["message"]


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
    assert not usage["active_directions"].any()
    assert "along 0 of 2 directions of a" in usage.attrs["message"]
    assert diagnose(usage).level == "bad"


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
    assert "the KL of 3 coordinates that do not vary is above 0.1 nats" in usage.attrs["message"]


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
    guide.affine.weight.data.add_(0.5 / guide.affine.weight_rate)
    usage = latent_usage(model, guide, data, seed=0)
    assert usage["latent"].to_numpy().tolist() == ["z", "rate"]
    assert usage["kl"].isnull().all() and usage["active"].all()
    assert usage["kl_total"].notnull().all()
    assert diagnose(usage).level == "good"


def test_the_dataset_goes_through_netcdf(tmp_path):
    usage = latent_usage(collapsed_model, collapsed_guide, torch.randn(5), seed=0)
    usage.to_netcdf(tmp_path / "usage.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "usage.nc", engine="h5netcdf") as opened:
        assert str(diagnose(opened.load())) == usage.attrs["message"]


def test_bad_arguments_are_refused_with_numbers():
    with pytest.raises(ValueError, match="2 data and 2 draws.*got 1 and 100"):
        latent_usage(collapsed_model, collapsed_guide, torch.zeros(1))
    with pytest.raises(ValueError, match="got 3 and 1"):
        latent_usage(collapsed_model, collapsed_guide, torch.zeros(3), num_samples=1)
    vae = RankTwoVAE()
    with pytest.raises(ValueError, match="data x .draws - 1. >= 8, the latents of site 'z'.*got 4"):
        latent_usage(vae.model, vae.guide, vae.data[:2], num_samples=3)


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
