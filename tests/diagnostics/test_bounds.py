"""Bounds of the evidence on a conjugate model, and the models that have no such bounds."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

from pyro_flowkit.diagnostics import evidence_bounds
from pyro_flowkit.diagnostics.bounds import importance_weighted_bound

DATA = torch.tensor([0.9, -0.3, 1.7, 0.4], dtype=torch.float64)


def model(data):
    """mu ~ N(0, 1), x_i ~ N(mu, 1): posterior N(sum x / (n + 1), 1 / (n + 1))."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=data)


def guide_with(shift=0.0, scale=1.0):
    def guide(data):
        precision = len(data) + 1
        pyro.sample("mu", dist.Normal(data.sum() / precision + shift, scale * precision**-0.5))

    return guide


def exact_log_evidence(data=DATA):
    covariance = torch.eye(len(data), dtype=data.dtype) + 1.0
    return float(dist.MultivariateNormal(torch.zeros_like(data), covariance).log_prob(data))


def test_exact_guide_has_every_bound_equal_to_the_evidence():
    bounds = evidence_bounds(
        model, guide_with(), args=(DATA,), exact_log_evidence=exact_log_evidence()
    )
    assert list(bounds["n_particles"]) == [1, 10, 100, 1000]
    for name in ("elbo", "iwae", "log_evidence"):
        np.testing.assert_allclose(bounds[name], exact_log_evidence(), atol=1e-10)
        np.testing.assert_allclose(bounds[f"{name}_se"], 0.0, atol=1e-10)
    assert abs(float(bounds["gap"])) < 1e-10
    assert float(bounds["pareto_k"]) == 0.0
    assert float(bounds["ess"]) == pytest.approx(4000)


@pytest.mark.parametrize(("shift", "scale"), [(0.3, 1.0), (0.0, 0.7), (0.2, 1.5)])
def test_wrong_guide_has_bounds_below_and_the_known_gap(shift, scale):
    exact = exact_log_evidence()
    kl = 0.5 * (scale**2 + shift**2 * 5 - 1) - math.log(scale)
    bounds = evidence_bounds(
        model, guide_with(shift, scale), args=(DATA,), exact_log_evidence=exact, seed=3
    )
    assert abs(float(bounds["gap"]) - kl) < 4 * float(bounds["elbo_se"])
    ladder, errors = bounds["iwae"].to_numpy(), bounds["iwae_se"].to_numpy()
    assert (np.diff(ladder) > 0).all()
    assert (ladder < exact + 3 * errors).all()
    assert abs(float(bounds["log_evidence"]) - exact) < 4 * float(bounds["log_evidence_se"])
    assert 100 < float(bounds["ess"]) < 4000
    assert 0 < float(bounds["pareto_k_sd"]) < 0.3


def test_a_guide_that_is_much_too_narrow_has_a_large_pareto_k():
    bounds = evidence_bounds(model, guide_with(0.5, 0.15), args=(DATA,), seed=0)
    assert float(bounds["pareto_k"]) > 0.7


def test_every_number_says_what_kind_it_is():
    bounds = evidence_bounds(
        model, guide_with(0.3), args=(DATA,), num_samples=100, exact_log_evidence=-6.0
    )
    kinds = {name: bounds[name].attrs["kind"] for name in bounds.data_vars}
    assert kinds["elbo"] == kinds["iwae"] == "lower bound"
    assert kinds["log_evidence"] == "estimate"
    assert kinds["exact_log_evidence"] == "exact"
    assert all(bounds.attrs[f"kind_{name}"] == kind for name, kind in kinds.items())
    assert {f"{name}_se" for name in ("elbo", "iwae", "log_evidence")} <= set(kinds)


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoMultivariateNormal])
def test_pyros_own_guides_are_set_up_and_bounded(make_guide):
    guide = make_guide(model, init_loc_fn=init_to_value(values={"mu": DATA.mean()}), init_scale=0.6)
    bounds = evidence_bounds(model, guide, args=(DATA,), vectorize=True, seed=0)
    exact = exact_log_evidence()
    assert float(bounds["elbo"]) < float(bounds["iwae"][-1])
    assert abs(float(bounds["log_evidence"]) - exact) < 4 * float(bounds["log_evidence_se"])


def test_chunks_and_single_particles_give_the_same_answer():
    guide = guide_with(0.3)
    options = {"args": (DATA,), "num_samples": 400, "num_particles": (1, 10)}
    whole = evidence_bounds(model, guide, seed=5, **options)
    chunks = evidence_bounds(model, guide, seed=6, chunk_size=150, **options)
    single = evidence_bounds(model, guide, seed=7, vectorize=False, **options)
    for other in (chunks, single):
        assert int(other.attrs["num_samples"]) == 400
        error = math.hypot(float(whole["elbo_se"]), float(other["elbo_se"]))
        assert 0 < abs(float(whole["elbo"] - other["elbo"])) < 4 * error


def mixing_model(data):
    """Under a plate of particles, ``mean`` would average over all of them."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=data[0])


def python_float_model(data):
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(float(z.mean(-1)), 1.0), obs=data[0])


def two_latents_guide(data):
    pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def bounds_of_two_latents(model, **options):
    bounds = evidence_bounds(
        model, two_latents_guide, args=(DATA,), num_samples=500, seed=0, **options
    )
    exact = float(dist.Normal(0.0, math.sqrt(1.5)).log_prob(DATA[0]))
    assert abs(float(bounds["log_evidence"]) - exact) < 4 * float(bounds["log_evidence_se"])


def test_models_that_mix_particles_in_a_plate_are_recorded():
    bounds_of_two_latents(mixing_model, vectorize=True)


def test_models_that_read_numbers_are_run_one_by_one_and_said():
    with pytest.warns(UserWarning, match="cannot be vectorised over particles.*'z'.*reads the"):
        bounds_of_two_latents(python_float_model)
    with pytest.raises(ValueError, match="can be vectorised over particles, got it cannot be"):
        bounds_of_two_latents(python_float_model, vectorize=True)


@pytest.mark.parametrize("n", [2, 8000])
def test_a_mean_of_a_latent_is_no_mean_over_particles_however_many_the_data(n):
    """The ELBO of float32 particles in a plate lay above the evidence."""
    generator = torch.Generator().manual_seed(1)
    y = 0.5 + torch.randn(n, generator=generator)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z.mean(), 1.0))
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    precision = 1 / 2 + n  # of w, given y
    mean, variance = float(y.double().sum()) / precision, 1 / precision

    def guide():
        w = pyro.sample("w", dist.Normal(mean, math.sqrt(variance)))
        pyro.sample("z", dist.Normal(w / 2, math.sqrt(0.5)))

    bounds = evidence_bounds(model, guide, num_samples=200, seed=0)
    covariance = torch.eye(n, dtype=torch.float64) if n < 100 else None
    squares = float(y.double().square().sum())
    exact = 0.5 * (-n * math.log(2 * math.pi) - math.log(1 + 2 * n) - squares + mean**2 * precision)
    if covariance is not None:
        whole = dist.MultivariateNormal(torch.zeros(n).double(), covariance + 2.0)
        assert exact == pytest.approx(float(whole.log_prob(y.double())), abs=1e-9)
    assert float(bounds["elbo"]) == pytest.approx(exact, rel=2e-6, abs=1e-4)


def test_minibatches_have_no_evidence():
    def subsampled(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(data), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])

    with pytest.raises(ValueError, match="all 4 data in plate 'rows' .* subsample of 2"):
        evidence_bounds(subsampled, guide_with(), args=(DATA,))


def test_latents_must_be_in_both_programs():
    def empty_guide(data):
        pass

    with pytest.raises(ValueError, match=r"\['mu'\] in the model only"):
        evidence_bounds(model, empty_guide, args=(DATA,))


def test_a_guide_outside_of_the_support_has_elbo_minus_inf():
    def positive(data):
        pyro.sample("mu", dist.Uniform(torch.zeros((), dtype=torch.float64), 1.0))

    def half_outside(data):
        zero = torch.zeros((), dtype=torch.float64)
        pyro.sample("mu", dist.Uniform(zero - 1.0, zero + 1.0))

    pyro.enable_validation(False)
    try:
        bounds = evidence_bounds(positive, half_outside, args=(DATA,), seed=0)
    finally:
        pyro.enable_validation(True)
    assert float(bounds["elbo"]) == -math.inf
    assert float(bounds["elbo_se"]) == math.inf
    assert abs(float(bounds["log_evidence"])) < 0.1


def test_particles_above_the_number_of_draws():
    options = {"args": (DATA,), "num_samples": 50}
    assert list(evidence_bounds(model, guide_with(0.1), **options)["n_particles"]) == [1, 10]
    with pytest.raises(ValueError, match=r"num_samples = 50, got \(1, 100\)"):
        evidence_bounds(model, guide_with(0.1), num_particles=(1, 100), **options)


def test_the_seed_repeats_and_leaves_the_callers_generator_alone():
    state = torch.random.get_rng_state()
    first = evidence_bounds(model, guide_with(0.1), args=(DATA,), num_samples=100, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = evidence_bounds(model, guide_with(0.1), args=(DATA,), num_samples=100, seed=1)
    assert float(first["elbo"]) == float(again["elbo"])


def test_modules_are_evaluated_in_eval_mode_and_put_back():
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)
            self.frozen = torch.nn.BatchNorm1d(1).eval()

        def forward(self, data):
            assert not self.dropout.training
            pyro.sample("mu", dist.Normal(self.dropout(data.new_ones(8)).mean(), 1.0))

    guide = Guide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence_bounds(model, guide, args=(DATA,), num_samples=50)
    assert guide.training and guide.dropout.training and not guide.frozen.training


def test_standard_error_of_few_blocks_is_the_larger_of_two():
    log_weights = torch.randn(1000, dtype=torch.float64)
    _, error = importance_weighted_bound(log_weights, 1000)
    weights = log_weights.exp()
    expected = float(weights.std() / weights.mean() / math.sqrt(1000))
    assert float(error) == pytest.approx(expected, rel=1e-9)
    bound, two_blocks = importance_weighted_bound(log_weights, 500)
    blocks = log_weights.view(2, 500).logsumexp(-1) - math.log(500)
    assert float(bound) == pytest.approx(float(blocks.mean()))
    assert float(two_blocks) >= float(blocks.std()) / math.sqrt(2)
