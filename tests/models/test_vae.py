"""The VAE: four combinations of prior and posterior, on the data's own scale, in any batch."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from models.vae import POSTERIORS, PRIORS, VAE, train
from models.vae.likelihoods import DiscretizedLogistic
from models.vae.networks import stage_shapes
from models.vae.posterior import HeadsAffine
from pyro_flowkit.diagnostics import pointwise_bounds
from pyro_flowkit.testing import (
    check_context,
    check_log_det,
    check_pushed_derivative,
    check_round_trip,
)

SMALL = {"latent_dim": 2, "hidden_dims": (16,), "num_transforms": 2, "flow_hidden_dims": (8, 8)}


def rows(n=96):
    """Points on a noisy circle, seen through five dimensions."""
    t = 2 * math.pi * torch.rand(n)
    circle = torch.stack([t.cos(), t.sin()], -1)
    return 3.0 + 2.0 * circle @ torch.randn(2, 5) + 0.1 * torch.randn(n, 5)


@pytest.mark.parametrize(("prior", "posterior"), [*itertools.product(PRIORS, POSTERIORS)])
def test_every_combination_learns(prior, posterior):
    x = rows()
    vae = VAE(5, data_size=len(x), prior=prior, posterior=posterior, **SMALL).standardize(x)
    before = pointwise_bounds(vae.model, vae.guide, x, num_samples=30, seed=0)
    train(vae, x, x[:20], steps=60, batch_size=32, lr=1e-2, progress=False)
    after = pointwise_bounds(vae.model, vae.guide, x, num_samples=30, seed=0)
    assert float(after["elbo"].mean()) > float(before["elbo"].mean()) + 0.5
    assert (after["elbo"].mean() <= after["iwae"].isel(n_particles=-1).mean()).all()
    assert vae.sample(7).shape == (7, 5) and vae.sample(7).isfinite().all()


def test_a_minibatch_stands_for_all_data():
    x = rows(40)
    vae = VAE(5, data_size=40, **SMALL)
    guide = poutine.trace(vae.guide).get_trace(x[:10])
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x[:10])
    for site in (model.nodes["x"], model.nodes["z"], guide.nodes["z"]):
        assert site["scale"] == pytest.approx(4.0)


def test_bounds_need_not_have_the_size_of_the_training_data():
    vae, x = VAE(5, data_size=10, **SMALL), rows(30)
    many = pointwise_bounds(vae.model, vae.guide, x, num_samples=400, seed=0)
    few = pointwise_bounds(vae.model, vae.guide, x[:3], num_samples=400, seed=1)
    error = np.hypot(many["elbo_se"][:3], few["elbo_se"])
    assert (np.abs(many["elbo"][:3] - few["elbo"]) < 4 * error).all()


def test_densities_are_those_of_the_data_not_of_the_standardised_ones():
    x = rows()
    one, other = (VAE(5, data_size=len(x), name=name, **SMALL) for name in ("one", "other"))
    other.load_state_dict(one.state_dict())
    one.standardize(x)
    other.standardize(1.0 - 4.0 * x)  # mirrored: the networks see -x
    with torch.no_grad():
        other.encoder[0].weight.neg_()
        other.decoder[-1].weight.neg_()
        other.decoder[-1].bias.neg_()
    bounds = [
        pointwise_bounds(vae.model, vae.guide, data, num_samples=30, seed=0)
        for vae, data in ((one, x), (other, 1.0 - 4.0 * x))
    ]
    difference = bounds[0]["elbo"] - bounds[1]["elbo"]
    np.testing.assert_allclose(difference, 5 * math.log(4.0), atol=1e-3)


def test_a_fresh_flow_prior_is_the_standard_normal():
    z = torch.randn(9, 2)
    flow, standard = (VAE(5, data_size=9, prior=p, name=p, **SMALL) for p in ("flow", "standard"))
    torch.testing.assert_close(
        flow.p_z().log_prob(z), standard.p_z().log_prob(z), atol=1e-4, rtol=0
    )


def test_the_scale_of_a_constant_dimension_is_bounded_below():
    x = rows()
    x[:, 0] = 2.0
    vae = VAE(5, data_size=len(x), min_scale=0.05, **SMALL).standardize(x)
    with torch.no_grad():
        vae.raw_noise.fill_(-100.0)
    scale = vae.p_x(torch.zeros(1, 2)).base_dist.scale
    torch.testing.assert_close(scale[0], 0.05 * torch.cat([torch.ones(1), x[:, 1:].std(0)]))


def test_svi_sees_the_networks_and_the_flows():
    vae = VAE(5, data_size=8, prior="flow", posterior="flow", **SMALL)
    svi = pyro.infer.SVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
    )
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for _ in range(2):
        svi.step(rows(8))
    still = [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if "encoder" in name or "decoder" in name]
    assert {"prior", "posterior"} <= {name.split(".")[0] for name in before if name not in still}


def test_grey_pixels_are_no_binary_data():
    vae = VAE(5, data_size=4, likelihood="bernoulli", **SMALL)
    with pytest.raises(ValueError, match="support"):
        pointwise_bounds(vae.model, vae.guide, torch.full((4, 5), 0.3), num_samples=2)


def test_unknown_choices_say_what_there_is():
    with pytest.raises(
        ValueError,
        match="prior to be one of standard, flow, autoregressive, continuous, got 'vamp'",
    ):
        VAE(5, data_size=4, prior="vamp")
    with pytest.raises(ValueError, match=r"finite data of shape \(n, 5\), got \(4, 3\)"):
        VAE(5, data_size=4).standardize(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="levels for the logistic likelihood, got None"):
        VAE(5, data_size=4, likelihood="logistic")
    with pytest.raises(ValueError, match=r"image_shape of 6 pixels.*got \(2, 2\)"):
        VAE(6, data_size=4, networks="conv", image_shape=(2, 2))


def test_a_pixel_that_is_hardly_ever_on_does_not_become_a_large_input():
    x = torch.zeros(10_000, 3)
    x[0, 0] = x[::2, 1] = 1.0
    largest = {}
    for kind in ("columns", "common", "centre"):
        vae = VAE(3, data_size=len(x), name=kind, **SMALL).standardize(x, kind)
        largest[kind] = float(((x - vae.loc) / vae.scale).abs().max())
    assert largest["columns"] > 99 and largest["common"] < 4 and largest["centre"] <= 1


def test_the_discretised_logistic_is_a_distribution_over_its_levels():
    loc = torch.tensor([-30.0, 0.0, 3.7, 16.0, 500.0], dtype=torch.float64)
    for scale in (1e-3, 0.4, 50.0):
        p = DiscretizedLogistic(loc, torch.tensor(scale, dtype=torch.float64), 17)
        total = p.log_prob(torch.arange(17.0, dtype=torch.float64)[:, None]).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(loc))
    p = DiscretizedLogistic(torch.tensor(4.2), torch.tensor(1.3), 17)
    draws = p.sample((40_000,))
    seen = torch.bincount(draws.long(), minlength=17) / len(draws)
    assert (seen - p.log_prob(torch.arange(17.0)).exp()).abs().max() < 0.01
    far = DiscretizedLogistic(torch.tensor(0.0), torch.tensor(1e-4), 17).log_prob(torch.tensor(9.0))
    assert float(far) == pytest.approx(-85_000, rel=1e-4)  # a difference of sigmoids would be log 0
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor(17.0))


@pytest.mark.parametrize(
    "check", [check_round_trip, check_log_det, check_pushed_derivative, check_context]
)
def test_the_last_layer_of_a_flow_posterior_keeps_a_transform_s_contract(check):
    check(HeadsAffine(3))


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (16, 16), (17, 19)])
def test_convolutional_networks_take_images_of_any_shape(shape):
    height, width = shape
    vae = VAE(
        height * width,
        data_size=20,
        networks="conv",
        image_shape=shape,
        channels=2,
        likelihood="bernoulli",
        prior="flow",
        posterior="flow",
        **SMALL,
    )
    x = (torch.rand(20, height * width) < 0.3).float()
    bounds = pointwise_bounds(vae.model, vae.guide, x, num_samples=30, batch_size=7, seed=0)
    assert bounds["elbo"].shape == (20,) and bool(np.isfinite(bounds["elbo"]).all())
    vae.eval()
    several = vae.decode(torch.randn(3, 4, 2))
    torch.testing.assert_close(several, several.flatten(0, 1).reshape(3, 4, -1))
    assert several.shape == (3, 4, height * width)
    # the networks are told nothing of positions: a spot at the edge reaches the features
    spots = torch.eye(height * width)
    assert len(vae.encoder(spots).unique(dim=0)) == height * width


@pytest.mark.parametrize(
    ("shape", "stages"),
    [
        ((28, 28), [(14, 14), (7, 7), (4, 4)]),
        ((17, 19), [(9, 10), (5, 5), (3, 3)]),
        ((15, 28), [(15, 28), (8, 14), (4, 7)]),
    ],
)
def test_images_of_16_pixels_are_halved_before_the_first_stage(shape, stages):
    assert stage_shapes(shape) == stages
