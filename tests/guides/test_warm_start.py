"""A guide that starts from one of Pyro's, trained before."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import init_to_mean

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_
from tests.tiny import DATA, TINY, model, step

GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]


def trained(guide_type):
    guide = guide_type(model)
    step(guide, DATA, steps=30)
    return guide


@pytest.mark.parametrize("guide_type", GUIDES)
def test_it_starts_as_the_same_gaussian(guide_type) -> None:
    old = trained(guide_type)
    new = AutoSplineFlow.from_guide(old, **TINY).setup(DATA)
    medians = old.median(DATA)
    for name, value in new.median(DATA).items():
        assert torch.allclose(value, medians[name], atol=1e-5), name
    quantiles = old.quantiles([0.1], DATA)
    largest = new.affine.scale.detach().square().sum(-1).max().sqrt().item()
    for name, value in new.quantiles([0.1], DATA).items():
        # the new one takes quantiles from fixed draws
        assert torch.allclose(value, torch.as_tensor(quantiles[name])[0], atol=0.3 * largest), name


def test_correlations_are_taken_over() -> None:
    old = trained(AutoMultivariateNormal)
    new = AutoSplineFlow.from_guide(old, **TINY).setup(DATA)
    covariance = new.affine.scale @ new.affine.scale.mT
    assert torch.allclose(covariance, old.get_posterior().covariance_matrix, atol=1e-6)
    latent = new.get_posterior().sample((5,))
    assert torch.allclose(
        new.get_posterior().log_prob(latent), old.get_posterior().log_prob(latent), atol=1e-3
    )


@pytest.mark.parametrize("affine", ["diagonal", "low_rank"])
def test_a_map_without_correlations_takes_the_marginal_standard_deviations(affine: str) -> None:
    old = trained(AutoMultivariateNormal)
    new = AutoSplineFlow.from_guide(old, affine=affine, **TINY).setup(DATA)
    assert torch.allclose(new.affine.scale.diagonal(), old.get_posterior().stddev, rtol=1e-5)


def test_elbo_starts_where_the_other_guide_ended_and_only_rises() -> None:
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True)

    def loss(guide) -> float:
        pyro.set_rng_seed(0)
        with torch.no_grad():
            return elbo.loss(model, guide, DATA)

    old = trained(AutoNormal)
    new = AutoSplineFlow.from_guide(old, **TINY).setup(DATA)
    before = loss(old)
    assert loss(new) == pytest.approx(before, abs=0.1)
    fit(model, new, args=(DATA,), max_steps=50, seed=0, progress=False)
    assert loss(new) < before - 0.05


def test_other_guides_and_settings_that_the_gaussian_decides_are_refused() -> None:
    with pytest.raises(ValueError, match="never called"):
        AutoSplineFlow.from_guide(AutoNormal(model))
    with pytest.raises(ValueError, match="Expected a trained AutoNormal, .* got AutoDelta"):
        AutoSplineFlow.from_guide(AutoDelta(model))
    with pytest.raises(ValueError, match="where to start, got .*'init_loc_fn'"):
        AutoSplineFlow.from_guide(trained(AutoNormal), init_loc_fn=init_to_mean)


def test_another_number_of_data_is_refused_by_name() -> None:
    new = AutoSplineFlow.from_guide(trained(AutoNormal), **TINY)
    with pytest.raises(ValueError, match="'local': 4.* got .*'local': 3"):
        new.setup(DATA[:3])


def test_a_warm_guide_is_copied_before_and_after_its_setup() -> None:
    cold = AutoSplineFlow.from_guide(trained(AutoNormal), **TINY)
    assert cold._model is not None
    after = perturb_(cold.setup(DATA), 0.1)
    latent = after.get_posterior().sample((3,))
    copy = pickle.loads(pickle.dumps(after))
    assert torch.equal(
        copy.get_posterior().log_prob(latent), after.get_posterior().log_prob(latent)
    )


def test_dtype_of_the_model_wins() -> None:
    def double_model():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    old = AutoNormal(double_model)
    old()
    old.float()
    new = AutoSplineFlow.from_guide(old, **TINY).setup()
    assert new.affine.origin.dtype == torch.float64
