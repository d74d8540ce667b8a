"""The two programs with a latent for every datum: what they print, and that their models are what they say."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from models import factor, hierarchical


def test_robust_regression_compares_both_guides(capsys) -> None:
    result = hierarchical.main(["--fast"])
    assert list(result.summary.index) == ["intercept", *hierarchical.NAMES, "sigma", "nu"]
    assert bool((result.summary.filter(like="spread") > 0).all(axis=None))
    assert result.weights.shape == (hierarchical.SIZE,) and bool((result.weights > 0).all())
    printed = capsys.readouterr().out
    assert "amortised median" in printed and "marginal spread" in printed
    assert f"patient {int(result.weights.argmin()):>3}" in printed


def test_marginal_model_is_the_hierarchy_without_its_weights() -> None:
    x, y = (rows.double() for rows in hierarchical.data())
    rows = torch.tensor([0, 123, 256])
    latents = {
        "beta": torch.linspace(-0.5, 0.5, 11).double(),
        "sigma": torch.tensor(0.6).double(),
        "nu": torch.tensor(5.0).double(),
    }
    with torch.no_grad():
        conditioned = poutine.condition(hierarchical.marginal, data=latents)
        trace = poutine.trace(conditioned).get_trace(x[rows], y[rows])
        trace.compute_log_prob()
        mean, sigma, nu = trace.nodes["y"]["fn"].loc, latents["sigma"], latents["nu"]
    weight = torch.linspace(1e-4, 30.0, 300_001).double()[:, None]
    joint = dist.Normal(mean, sigma * weight.rsqrt()).log_prob(y[rows])
    joint = joint + dist.Gamma(nu / 2, nu / 2).log_prob(weight)
    integral = torch.trapezoid(joint.exp(), weight, dim=0).log()
    assert torch.allclose(integral, trace.nodes["y"]["unscaled_log_prob"], atol=1e-4)
    assert trace.nodes["y"]["scale"] == pytest.approx(hierarchical.SIZE / 3)


def test_regression_is_vectorised_over_particles() -> None:
    x, y = hierarchical.data()
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(hierarchical.model).get_trace(x[:7], y[:7])
    assert trace.nodes["y"]["fn"].batch_shape == (4, 7)


def test_factor_model_bounds_training_and_test_images(capsys) -> None:
    result = factor.main(["--fast", "--factors", "3"])
    printed = capsys.readouterr().out
    for value in (result.amortised, result.auto_normal, result.heldout):
        assert math.isfinite(value) and f"{value:8.2f}" in printed
    assert "3 factors, 200 training images" in printed


def test_auto_normal_learns_of_the_rows_it_is_given() -> None:
    model = factor.make_model(20, 2)
    guide = factor.normal_guide(model, 20)
    x, rows = torch.rand(20, 64), torch.arange(20)
    guide(x, rows)
    loss = Trace_ELBO().differentiable_loss(model, guide, x[5:8], rows[5:8])
    loss.backward()
    touched = guide.locs.z_unconstrained.grad.abs().sum(-1) > 0
    assert touched.nonzero()[:, 0].tolist() == [5, 6, 7]


def test_heldout_bound_rises_with_importance_draws() -> None:
    model = factor.make_model(20, 2)
    guide = factor.amortised_guide(model)
    x = torch.rand(20, 64)
    guide(x, torch.arange(20))
    pyro.set_rng_seed(0)
    one = sum(factor.heldout_bound(model, guide, x, 1) for _ in range(20)) / 20
    assert factor.heldout_bound(model, guide, x, 200) > one + 0.1
