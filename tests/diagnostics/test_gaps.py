r"""The split of a VAE's gap against its closed form, families of posteriors, and what is refused.

z ~ N(0, I), x | z ~ N(W z + b, s^2 I): the posterior is N(m(x), P^-1) with P = I + W'W / s^2, and
the best posterior with independent dimensions is N(m(x), diag(1 / P_dd)), so that

approximation gap = 1/2 (sum_d log P_dd - log det P),   amortisation gap = KL(q || p) - that.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import kl_divergence

from models.vae import VAE
from pyro_flowkit.diagnostics import inference_gaps, pointwise_bounds
from pyro_flowkit.diagnostics.local_posterior import FreePosterior, family_of
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides import AmortizedSplineFlow
from pyro_flowkit.testing import perturb_
from tests.diagnostics.linear_gaussian import DOUBLE, Z_DIM, LinearGaussian, TwoLevels

NUM_DATA, NOISE = 30, 0.9


class LinearGaussianVAE(LinearGaussian):
    """The posterior is correlated; the encoder's is shifted and has the wrong scale on purpose."""

    def __init__(self, shift=0.3, factor=0.8, full_rank=False):
        super().__init__(NUM_DATA, NOISE, seed=3, shift=shift, factor=factor, correlation=0.6)
        self.full_rank = full_rank

    def guide(self, x):
        if not self.full_rank:
            return super().guide(x)
        with pyro.plate("data", len(x)):
            mean = self.posterior_mean(x) + self.shift
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=self.scale.diag()))

    def exact_split(self):
        mean = self.posterior_mean(self.data)
        guide = torch.distributions.MultivariateNormal(
            mean + self.shift, scale_tril=self.scale.diag()
        )
        posterior = torch.distributions.MultivariateNormal(mean, self.covariance)
        approximation = torch.zeros((), dtype=DOUBLE)
        if not self.full_rank:
            of_dimensions = self.precision.diagonal().log().sum()
            approximation = 0.5 * (of_dimensions - self.precision.logdet())
        return float(approximation), (kl_divergence(guide, posterior) - approximation).numpy()


def gaps_of(vae, data=None, **options):
    options = {"seed": 0, "num_steps": 150} | options
    return inference_gaps(vae.model, vae.guide, vae.data if data is None else data, **options)


def check_split(gaps, approximation, amortization, tolerance):
    """Every datum within four standard errors, the means within the tolerance."""
    for name, exact in (
        ("approximation_gap", approximation),
        ("amortization_gap", amortization),
        ("inference_gap", approximation + amortization),
    ):
        error = (gaps[name] - exact).to_numpy()
        assert abs(error.mean()) < tolerance, name
        assert (np.abs(error) < 4 * gaps[f"{name}_se"].to_numpy() + 0.02).all(), name
    parts = gaps["approximation_gap"] + gaps["amortization_gap"]
    np.testing.assert_allclose(gaps["inference_gap"], parts, atol=1e-9)
    assert (gaps["elbo_optimized"] <= gaps["log_evidence"] + 1e-3).all()


@pytest.mark.parametrize(("full_rank", "evidence_is_known"), [(False, False), (True, True)])
def test_the_split_is_the_analytic_one(full_rank, evidence_is_known):
    vae = LinearGaussianVAE(full_rank=full_rank)
    exact = vae.exact_log_prob()
    gaps = gaps_of(vae, exact_log_evidence=exact if evidence_is_known else None, num_samples=4000)
    approximation, amortization = vae.exact_split()
    assert full_rank or approximation > 0.1  # there is something to find
    assert amortization.mean() > 0.2
    check_split(gaps, approximation, amortization, 0.01)
    kind = "exact" if evidence_is_known else "estimate"
    assert gaps["log_evidence"].attrs["kind"] == gaps.attrs["kind_log_evidence"] == kind
    error = np.abs(gaps["log_evidence"] - exact.numpy())
    assert (error <= 4 * gaps["log_evidence_se"] + 1e-9).all()


def test_every_datum_is_within_the_promised_precision():
    vae = LinearGaussianVAE()
    exact = vae.exact_log_prob()
    gaps = gaps_of(vae, num_samples=40_000, num_steps=300, exact_log_evidence=exact)
    approximation, amortization = vae.exact_split()
    truths = {
        "inference_gap": approximation + amortization,
        "approximation_gap": approximation,
        "amortization_gap": amortization,
    }
    for name, truth in truths.items():
        error = gaps[f"{name}_se"]
        assert float(error.max()) < 0.01
        assert float((np.abs(gaps[name] - truth) / error).max()) < 4.5, name
    assert "stopped short" not in gaps.attrs["message"]


@pytest.mark.parametrize(
    ("shift", "factor"), [(5.0, 0.1), (20.0, 30.0)], ids=["far and narrow", "far and wide"]
)
def test_an_encoder_that_is_far_off_is_still_repaired(shift, factor):
    vae = LinearGaussianVAE(shift, factor)
    exact = vae.exact_log_prob()[:10]
    gaps = gaps_of(vae, vae.data[:10], exact_log_evidence=exact, num_steps=300)
    approximation, amortization = vae.exact_split()
    assert amortization.mean() > 20
    assert abs(float(gaps["approximation_gap"].mean()) - approximation) < 0.02


def test_an_optimisation_that_stops_short_is_said():
    vae = LinearGaussianVAE(shift=5.0, factor=0.05)
    gaps = gaps_of(vae, num_steps=30)
    assert float(gaps["late_gain"].mean()) > 0.1
    assert "stopped short" in gaps.attrs["message"]


def test_the_best_encoder_of_its_family_has_no_amortisation_gap():
    vae = LinearGaussianVAE(shift=0.0, factor=1.0)
    gaps = gaps_of(vae)
    assert abs(float(gaps["amortization_gap"].mean())) < 2e-3
    assert (gaps["amortization_gap"] > -4 * gaps["amortization_gap_se"] - 1e-12).all()
    kept = gaps["amortization_gap"] == 0
    assert 0 < int(kept.sum())  # whose optimised posterior was no better
    np.testing.assert_array_equal(gaps["elbo"][kept], gaps["elbo_optimized"][kept])
    assert "the family is the larger part" in gaps.attrs["message"]


class MemorisingVAE(LinearGaussianVAE):
    """Its encoder is the best one on the rows that it has seen, and shifted on others."""

    def __init__(self, full_rank=True, shift=1.0):
        super().__init__(shift=shift, factor=1.0, full_rank=full_rank)
        self.seen = self.data[:15]

    def guide(self, x):
        known = (x[:, None] == self.seen).all(-1).any(-1)
        with pyro.plate("data", len(x)):
            mean = self.posterior_mean(x) + torch.where(known[:, None], 0.0, self.shift)
            if self.full_rank:
                pyro.sample("z", dist.MultivariateNormal(mean, self.covariance))
            else:
                pyro.sample("z", dist.Normal(mean, self.scale).to_event(1))


@pytest.mark.parametrize("full_rank", [True, False])
def test_an_encoder_that_overfits_is_said(full_rank):
    vae = MemorisingVAE(full_rank, shift=1.0 if full_rank else 0.2)
    gaps = gaps_of(vae, vae.data[15:], train_data=vae.seen, num_steps=60)
    exact = float(0.5 * vae.shift @ vae.precision @ vae.shift)
    assert abs(float(gaps["overfit"]) - exact) < 0.03
    assert abs(float(gaps["train_amortization_gap"].mean())) < 2e-3
    assert gaps["train_elbo"].dims == ("train_id",) and gaps.sizes["train_id"] == 15
    message = gaps.attrs["message"]
    assert "the encoder overfits: on training rows its gap is" in message
    assert "Zhang et al. 2022" in message and "longer" not in message
    assert ("the family is the larger part" in message) == (not full_rank)
    alone = gaps_of(vae, vae.data[15:], num_steps=60)
    xr.testing.assert_equal(
        alone, gaps[list(alone.data_vars)].drop_vars("train_id", errors="ignore")
    )


def test_an_encoder_that_has_learnt_too_little_is_to_train_longer():
    vae = LinearGaussianVAE(shift=1.0, factor=1.0, full_rank=True)
    message = gaps_of(vae, vae.data[15:], train_data=vae.data[:15], num_steps=60).attrs["message"]
    assert "no sign that it overfits" in message and "train it longer or make it larger" in message
    message = gaps_of(vae, vae.data[15:], train_data=vae.data[:1], num_steps=60).attrs["message"]
    assert "do not say whether it overfits" in message and "longer" not in message


def test_without_training_rows_nothing_is_said_of_why_the_encoder_is_not_its_best():
    vae = LinearGaussianVAE(shift=1.0, factor=1.0, full_rank=True)
    message = gaps_of(vae).attrs["message"]
    assert "train_data=, say whether it overfits or has learnt too little" in message
    assert "longer" not in message


def test_gaps_with_training_rows_go_through_netcdf(tmp_path):
    gaps = inference_gaps(local_model, local_guide, DATA, train_data=DATA[:4], **FAST)
    gaps.to_netcdf(tmp_path / "gaps.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "gaps.nc", engine="h5netcdf") as opened:
        xr.testing.assert_equal(opened.load(), gaps)


def test_standard_errors_are_the_spread_over_repetitions():
    vae = LinearGaussianVAE()
    gaps = gaps_of(vae, vae.data[:1].expand(200, -1), num_samples=300, batch_size=200, num_steps=60)
    for name in ("elbo", "inference_gap", "amortization_gap"):
        ratio = np.sqrt((gaps[f"{name}_se"] ** 2).mean()) / gaps[name].std(ddof=1)
        assert 0.85 < float(ratio) < 1.15, name  # 200 repetitions: +- 5 % at one sigma


def test_batches_of_any_size_and_one_datum_give_the_answer():
    vae = LinearGaussianVAE()
    approximation, amortization = vae.exact_split()
    exact = vae.exact_log_prob()
    for rows, batch_size in ((5, 4), (1, None)):
        gaps = gaps_of(vae, vae.data[:rows], batch_size=batch_size, exact_log_evidence=exact[:rows])
        assert gaps.sizes["obs_id"] == rows
        check_split(gaps, approximation, amortization[:rows], 0.05)


def test_the_same_seed_gives_the_same_numbers_and_nothing_of_the_caller_changes():
    pyro.clear_param_store()
    vae = VAE(6, data_size=9, latent_dim=2, hidden_dims=[8], likelihood="bernoulli", dropout=0.5)
    data = (torch.rand(9, 6) < 0.5).float()
    vae.model(data)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (
        inference_gaps(vae.model, vae.guide, data, num_steps=12, num_samples=50, seed=4)
        for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    xr.testing.assert_equal(first, second)
    assert all(module.training for module in vae.modules())
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(parameter.requires_grad for parameter in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("posterior", ["normal", "flow"])
def test_a_vae_with_dropout_is_split_in_eval_mode(posterior):
    pyro.clear_param_store()
    torch.manual_seed(0)
    options = {"latent_dim": 2, "hidden_dims": [8], "likelihood": "bernoulli", "dropout": 0.5}
    vae = VAE(6, data_size=12, posterior=posterior, prior="flow", num_transforms=2, **options)
    data = (torch.rand(12, 6) < 0.5).float()
    vae.model(data)
    vae.guide(data)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    gaps = inference_gaps(vae.model, vae.guide, data, num_steps=48, num_samples=300, seed=0)
    improvement = gaps["amortization_gap"] / gaps["amortization_gap_se"].clip(1e-9)
    assert float(improvement.max()) > 5 and float(improvement.min()) > -4
    assert gaps["elbo"].dtype == np.float64


def amortized(data, **options):
    def model(x):
        with pyro.plate("rows", len(data), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            rate = pyro.sample("rate", dist.Gamma(torch.full_like(x, 3.0), 3.0))
            pyro.sample("x", dist.Normal(z, rate.rsqrt()), obs=x)

    guide = AmortizedSplineFlow(model, lambda x: x[:, None], context_dim=1, **options)
    guide(data)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, guide


@pytest.mark.parametrize("base", ["normal", "student_t"])
def test_the_context_of_an_amortised_guide_is_set_free(base):
    torch.manual_seed(0)
    data = torch.linspace(-2.0, 2.0, 6, dtype=DOUBLE)
    model, guide = amortized(data, base=base)
    gaps = inference_gaps(model, guide, data, num_steps=36, num_samples=300, seed=0)
    assert float(gaps["amortization_gap"].mean()) > 0.05
    assert (gaps["amortization_gap"] >= -4 * gaps["amortization_gap_se"]).all()


def test_the_family_of_a_flow_is_what_its_context_can_say():
    """With straight splines it is a Gaussian; an affine map with a fixed scale can only be moved."""
    pyro.clear_param_store()
    vae = LinearGaussianVAE()
    data, exact = vae.data[:8], vae.exact_log_prob()[:8]
    flow = SplineFlow(Z_DIM, 2 * Z_DIM, base="conditional_normal", num_transforms=1).double()
    flow.affine.weight.data = torch.eye(len(flow.affine.weight)).double() / flow.affine.weight_rate

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = vae.posterior_mean(x)
            pyro.sample("z", flow(torch.cat([loc, loc], -1)))

    gaps = inference_gaps(vae.model, guide, data, num_steps=300, seed=0, exact_log_evidence=exact)
    np.testing.assert_allclose(gaps["approximation_gap"].mean(), vae.exact_split()[0], atol=0.03)

    scale = 0.6
    moved = AmortizedSplineFlow(
        vae.model,
        lambda x: vae.posterior_mean(x) + 1.0,
        context_dim=Z_DIM,
        init_scale=scale,
        affine="diagonal",
        num_transforms=1,
    )
    moved(data)
    moved.affine.weight.data[:Z_DIM] = torch.eye(Z_DIM).double() / moved.affine.weight_rate[:Z_DIM]
    ratio = scale**2 * vae.precision
    fixed_scale = 0.5 * (ratio.trace() - Z_DIM - ratio.logdet())
    gaps = inference_gaps(vae.model, moved, data, num_steps=90, seed=0, exact_log_evidence=exact)
    np.testing.assert_allclose(gaps["approximation_gap"].mean(), fixed_scale, atol=0.03)
    assert float(gaps["amortization_gap"].mean()) > 0.5


@pytest.mark.parametrize("rows", [1, 4])
def test_only_what_the_encoder_sets_is_free_in_a_flow(rows):
    context = torch.randn(rows, 3)
    for base in ("normal", "student_t", "conditional_normal"):
        pyro.clear_param_store()
        fn = SplineFlow(2, 3, base=base)(context).expand((rows,))
        family = family_of(fn, "z", -1)
        assert [zero.shape for zero in family.zeros] == [(rows, 3)], base
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="flow with a context.* at site 'z'.*FlowDistribution"):
        family_of(SplineFlow(2)().expand((rows,)), "z", -1)


ONE = torch.ones(3, 2, dtype=DOUBLE)
FAMILIES = {
    "normal": lambda: dist.Normal(ONE, 0.5).to_event(1),
    "masked": lambda: dist.Normal(ONE, 0.5).to_event(1).mask(torch.tensor([True, False, True])),
    "full rank": lambda: dist.MultivariateNormal(
        ONE, covariance_matrix=ONE.T @ ONE + torch.eye(2, dtype=DOUBLE)
    ),
    "low rank": lambda: dist.LowRankMultivariateNormal(ONE, ONE[..., None], ONE),
    "student": lambda: dist.StudentT(4 * ONE, ONE, 2.0).to_event(1),
    "full-rank student": lambda: dist.MultivariateStudentT(ONE[0, 0] + 4, ONE, 2 * ONE[0].diag()),
    "log-normal": lambda: dist.LogNormal(ONE, 0.5).to_event(1),
    "gamma": lambda: dist.Gamma(2 * ONE, 3.0).to_event(1),
    "beta": lambda: dist.Beta(2 * ONE, 3.0).to_event(1),
    "dirichlet": lambda: dist.Dirichlet(2 * ONE),
    "mixture": lambda: dist.MixtureOfDiagNormals(ONE[:, None], ONE[:, None], ONE[:, :1]),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(ONE, 0.5), [torch.distributions.TanhTransform()]
    ).to_event(1),
    "flow": lambda: perturb_(SplineFlow(2, 2)).double()(ONE).expand((3,)),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_begins_at_the_encoder_and_every_datum_moves_by_itself(kind):
    pyro.clear_param_store()
    torch.manual_seed(0)
    fn = FAMILIES[kind]()
    family, value = family_of(fn, "z", -1), fn.sample()
    offsets = family.start()
    start = family.build(offsets)
    assert start.batch_shape == fn.batch_shape and start.event_shape == fn.event_shape
    torch.testing.assert_close(start.log_prob(value), fn.log_prob(value).detach())
    with torch.no_grad():
        for offset in offsets:
            offset[-1] += 0.3
    moved = family.build(offsets).log_prob(value)
    torch.testing.assert_close(moved[:-1], start.log_prob(value)[:-1])
    assert not torch.isclose(moved[-1], start.log_prob(value)[-1])
    gradients = torch.autograd.grad(moved.sum(), offsets)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_free_posterior_without_offsets_draws_what_the_guide_draws():
    vae = LinearGaussianVAE()
    trace = poutine.trace(vae.guide).get_trace(vae.data)
    fn = trace.nodes["z"]["fn"]
    family = family_of(fn, "z", -1)
    free = FreePosterior(vae.guide, {"z": family.build(family.zeros)})
    values = []
    for guide in (vae.guide, free):
        pyro.set_rng_seed(1)
        values.append(poutine.trace(guide).get_trace(vae.data).nodes["z"]["value"])
    assert torch.equal(values[0], values[1])


DATA = torch.linspace(-2.0, 2.0, 7, dtype=DOUBLE)
FAST = {"num_steps": 48, "num_samples": 500, "seed": 0}


def local_model(x):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1): z_i | x_i ~ N(x_i / 2, 1/2)."""
    with pyro.plate("rows", 7000, subsample=x), poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("rows", 7000, subsample=x):
        pyro.sample("z", dist.Normal(x / 2 + 0.5, 1.0))


EXACT_GAP = float(
    kl_divergence(
        torch.distributions.Normal(0.5, 1.0), torch.distributions.Normal(0.0, math.sqrt(0.5))
    )
)


def assert_repaired(gaps, exact=EXACT_GAP):
    assert float(np.abs(gaps["approximation_gap"]).max()) < 0.02
    error = np.abs(gaps["amortization_gap"] - exact) / gaps["amortization_gap_se"].clip(1e-6)
    assert float(error.max()) < 4.5


def test_scales_of_subsampling_and_annealing_are_left_out():
    assert_repaired(inference_gaps(local_model, local_guide, DATA, **FAST))


def test_several_independent_sites_and_inner_plates_are_optimised_together():
    data = DATA.repeat(2, 1).T

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(x.new_zeros(len(x), 1), 1.0))
            with pyro.plate("pixels", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(a, 1.0), obs=x[:, :1])

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("a", dist.Normal(x[:, :1] / 2 + 0.5, 1.0))
            with pyro.plate("pixels", 2, dim=-1):
                pyro.sample("z", dist.Normal(x / 2 + 0.5, 1.0))

    assert_repaired(inference_gaps(model, guide, data, **FAST), 3 * EXACT_GAP)


def test_masked_data_have_the_prior_as_their_best_posterior():
    def model(x, seen):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    def guide(x, seen):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.new_full(x.shape, 0.5), 1.0))

    gaps = inference_gaps(model, guide, (DATA, DATA > 0.1), batch_size=4, **FAST)
    np.testing.assert_allclose(gaps["log_evidence"][:4], 0.0, atol=0.02)
    np.testing.assert_allclose(gaps["amortization_gap"][:4], 0.125, atol=0.1)
    assert float(np.abs(gaps["approximation_gap"]).max()) < 0.02


def test_an_autoguide_with_numbers_of_its_own_for_every_datum_can_be_split():
    pyro.clear_param_store()

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    guide = AutoNormal(model, init_scale=0.5)
    guide(DATA)
    gaps = inference_gaps(model, guide, DATA, **FAST)
    assert float(np.abs(gaps["approximation_gap"]).max()) < 0.02
    assert float(gaps["amortization_gap"].mean()) > 0.1


def test_models_that_cannot_be_vectorised_still_give_the_answer():
    def loop_model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            mean = torch.stack([z[i] if z[i].item() > -9.0 else z[i] for i in range(len(x))])
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.5, 1.0))

    with pytest.warns(UserWarning, match="one by one") as caught:
        gaps = inference_gaps(
            loop_model, guide, DATA[:5], batch_size=3, num_particles=1, num_samples=50, num_steps=36
        )
    assert len(caught) == 1
    assert float(gaps["approximation_gap"].mean()) < 0.1
    assert float(gaps["amortization_gap"].mean()) > 0.1


def test_a_posterior_outside_of_the_support_is_brought_inside():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    gaps = inference_gaps(model, guide, DATA, **FAST)
    assert (gaps["elbo"] == -math.inf).all()
    assert not gaps["elbo_optimized"].isnull().any()
    assert not gaps["amortization_gap"].isnull().any()
    assert not gaps["amortization_gap_se"].isnull().any()


@pytest.mark.parametrize("evidence_is_known", [True, False])
def test_two_levels_are_repaired_to_the_exact_posterior(evidence_is_known):
    vae = TwoLevels(20, shift=0.5, factor=0.6)
    exact, gap = vae.exact_log_prob(), vae.exact_gap()
    assert gap > 0.9
    gaps = gaps_of(vae, exact_log_evidence=exact if evidence_is_known else None)
    assert_repaired(gaps, gap)
    assert abs(float(gaps["inference_gap"].mean()) - gap) < 0.03


def test_two_levels_with_the_exact_posterior_have_no_gap():
    vae = TwoLevels(10)
    bounds = pointwise_bounds(vae.model, vae.guide, vae.data, num_samples=50, seed=0)
    for name in ("elbo", "log_evidence"):
        np.testing.assert_allclose(bounds[name], vae.exact_log_prob(), atol=1e-6)
    gaps = gaps_of(vae, num_steps=30, exact_log_evidence=vae.exact_log_prob())
    np.testing.assert_allclose(gaps["inference_gap"], 0.0, atol=1e-6)
    assert (np.abs(gaps["amortization_gap"]) <= 4 * gaps["amortization_gap_se"] + 1e-9).all()
    assert float(np.abs(gaps["amortization_gap"]).max()) < 0.05


def test_bounds_of_two_levels_bracket_the_exact_value():
    vae = TwoLevels(30, shift=0.4, factor=0.8)
    exact = vae.exact_log_prob()
    bounds = pointwise_bounds(
        vae.model, vae.guide, vae.data, num_samples=3000, exact_log_evidence=exact, seed=0
    )
    error = float(np.sqrt((bounds["elbo_se"] ** 2).sum())) / 30
    assert abs(float(bounds["gap"].mean()) - vae.exact_gap()) < 4 * error
    assert float(np.abs(bounds["log_evidence"] - exact.numpy()).mean()) < 0.05


@pytest.mark.parametrize("kind", ["transformed", "flow"])
def test_a_level_below_may_be_a_flow(kind):
    """A context, or a base, that follows the draw of the level above."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = TwoLevels(8)
    flow = SplineFlow(3, 3, base="conditional_normal", num_transforms=1).double()

    def guide(x):
        with pyro.plate("data", len(x)):
            mean2 = (x - vae.bias) @ vae.gain2.T
            z2 = pyro.sample("z2", dist.MultivariateNormal(mean2, vae.cov2))
            mean1 = vae.mean1(z2, x) + 0.4
            if kind == "flow":
                fn = flow(mean1)
            else:
                base = dist.MultivariateNormal(mean1, vae.cov1)
                shift = torch.distributions.AffineTransform(0.2 + 0 * mean1, 1.0, event_dim=1)
                fn = dist.TransformedDistribution(base, [shift])
            pyro.sample("z1", fn)

    exact = vae.exact_log_prob()
    gaps = inference_gaps(
        vae.model, guide, vae.data, num_steps=90, num_samples=500, exact_log_evidence=exact, seed=0
    )
    error = np.abs(gaps["inference_gap"] - gaps["approximation_gap"] - gaps["amortization_gap"])
    assert float(error.max()) < 1e-9
    assert float(gaps["amortization_gap"].mean()) > 0.3
    if kind == "transformed":
        assert float(np.abs(gaps["approximation_gap"]).mean()) < 0.02


def test_a_random_encoder_is_refused():
    def guide(x):
        with pyro.plate("rows", 7000, subsample=x):
            noisy = nn.functional.dropout(x / 2, 0.5, training=True)
            pyro.sample("z", dist.Normal(noisy, 1.0))

    with pytest.raises(ValueError, match="another one at a second run"):
        inference_gaps(local_model, guide, DATA, vectorize=False, **FAST)


def test_guides_that_gradients_cannot_improve_are_refused_in_plain_words():
    def guide_of(fn):
        def guide(x):
            with pyro.plate("rows", 7000, subsample=x):
                pyro.sample("z", fn(x))

        return guide

    class NoGradient(dist.Normal):
        has_rsample = False

    for fn, message in (
        (lambda x: NoGradient(x, 1.0), "reparametrised draws at site 'z'.*NoGradient"),
        (lambda x: dist.Delta(x), "random latents, got none"),
        (
            lambda x: dist.RelaxedBernoulli(x.new_ones(()), logits=x),
            "parameters can be set free.*'z'.*got RelaxedBernoulli",
        ),
        (lambda x: dist.VonMises(x, 1.0), "reparametrised draws at site 'z'.*VonMises"),
    ):
        with pytest.raises(ValueError, match=message):
            inference_gaps(local_model, guide_of(fn), DATA, **FAST)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.zeros(0), {}, r"lengths \[0\]"),
        (torch.tensor([0.0, math.nan]), {}, "in 1 of 2 rows"),
        (DATA, {"num_samples": 1}, "num_samples >= 2, num_steps >= 6.*got 1, 300"),
        (DATA, {"num_steps": 3}, "num_steps >= 6"),
        (DATA, {"lr": 0.0}, "lr > 0"),
        (DATA, {"exact_log_evidence": torch.zeros(3)}, r"shape \(7,\), got \(3,\)"),
    ],
)
def test_bad_arguments_are_refused_with_numbers(data, options, message):
    with pytest.raises(ValueError, match=message):
        inference_gaps(local_model, local_guide, data, **options)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_weights_that_are_no_numbers_are_refused():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            broken = dist.Unit(torch.where(x > 1.5, z * math.nan, z), validate_args=False)
            pyro.sample("broken", broken, obs=x.new_empty((len(x), 0)))

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="NaN or .inf in 1 of 7 rows"):
        inference_gaps(model, guide, DATA, **FAST)


def test_the_dataset_goes_through_netcdf(tmp_path):
    gaps = inference_gaps(local_model, local_guide, DATA, **FAST)
    gaps.to_netcdf(tmp_path / "gaps.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "gaps.nc", engine="h5netcdf") as opened:
        xr.testing.assert_equal(opened.load(), gaps)
        assert opened.attrs["message"] == gaps.attrs["message"]


def test_an_elbo_above_the_exact_evidence_is_said():
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(DATA)
    gaps = inference_gaps(local_model, local_guide, DATA, exact_log_evidence=exact, **FAST)
    assert "above" not in gaps.attrs["message"]
    wrong = exact - torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0])
    gaps = inference_gaps(local_model, local_guide, DATA, exact_log_evidence=wrong, **FAST)
    assert "For 2 of 7 data the ELBO is above exact_log_evidence" in gaps.attrs["message"]


@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_a_low_rank_posterior_is_moved_in_its_own_units(noise):
    data = DATA[:, None].expand(-1, 2)
    scale = noise / math.sqrt(1 + noise**2)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            loc, wide = x / (1 + noise**2) + scale, scale * torch.ones_like(x)
            fn = dist.LowRankMultivariateNormal(loc, 0.3 * wide[..., None], 0.2 * wide**2)
            pyro.sample("z", fn)

    exact = dist.Normal(0.0, math.sqrt(1 + noise**2)).log_prob(data).sum(-1)
    gaps = inference_gaps(
        model, guide, data, exact_log_evidence=exact, num_steps=150, num_samples=500, seed=0
    )
    assert float(gaps["amortization_gap"].min()) > 0.5
    assert float(gaps["approximation_gap"].mean()) < 0.02


@pytest.mark.parametrize("count", [1, 300])
def test_gamma_and_beta_posteriors_are_moved_in_their_own_units(count):
    """Poisson counts and binary outcomes: the conjugate posterior is found, however narrow it is."""
    counts, ones = count * DATA.abs().ceil(), (count * (DATA + 3) / 6).floor()

    def model(x):
        with pyro.plate("rows", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(torch.full_like(x, 2.0), 1.0))
            share = pyro.sample("share", dist.Beta(torch.full_like(x, 2.0), 2.0))
            pyro.sample("x", dist.Poisson(count * rate), obs=counts)
            pyro.sample("y", dist.Binomial(count, share), obs=ones)

    def guide(x):
        with pyro.plate("rows", len(counts)):
            pyro.sample("rate", dist.Gamma((2 + counts) / 2, torch.full_like(x, 1.0 + count) / 2.5))
            pyro.sample("share", dist.Beta((2 + ones) / 2, (2 + count - ones) / 3))

    gaps = inference_gaps(model, guide, DATA, num_steps=150, num_samples=500, seed=0)
    assert float(gaps["amortization_gap"].mean()) > 0.3
    assert float(gaps["approximation_gap"].mean()) < 0.01
