"""What a trained guide for local latents knows of given data: draws, densities, evidence, resampled draws."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_flowkit.diagnostics import evidence_bounds
from tests.guides.amortized_models import DATA, SIZE, make_guide, ready_guide
from tests.guides.test_amortized_posterior import (
    GLOBAL_MEAN,
    GLOBAL_SD,
    PULL,
    X,
    exact_guide,
    hierarchy,
    log_evidence,
)


def independent(x):
    """x_i ~ N(0, 1 + .25), posterior N(.8 x_i, .2)."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def independent_guide(**settings):
    return make_guide(independent, lambda x: x[:, None], context_dim=1, **settings).setup(X)


def rough_guide():
    """Not the posterior, but wide enough for its weights to be light."""
    guide = independent_guide(init_scale=0.6)
    with torch.no_grad():
        guide.affine.weight[0] = 0.7 / guide.affine.weight_rate[0]
    return guide


def independent_evidence():
    return float(dist.Normal(torch.zeros_like(X), 1.25**0.5).log_prob(X).sum())


def test_draws_have_the_models_shapes_and_the_guides_density() -> None:
    guide = ready_guide(condition_on_global=True)
    draws = guide.sample(5, DATA)
    shapes = {"loc": (5,), "scale": (5,), "z": (5, SIZE), "weights": (5, SIZE, 3)}
    assert {name: tuple(value.shape) for name, value in draws.items()} == shapes
    log_q = guide.log_prob(draws, DATA)
    assert log_q.shape == (5,) and log_q.requires_grad
    for row in range(5):
        one = {name: value[row] for name, value in draws.items()}
        assert torch.allclose(guide.log_prob(one, DATA), log_q[row], rtol=1e-4)
    trace = poutine.trace(guide).get_trace(DATA)
    values = {name: trace.nodes[name]["value"] for name in draws}
    assert guide.log_prob(values, DATA).item() == pytest.approx(
        trace.log_prob_sum().item(), rel=1e-4
    )
    nested = {name: value[:4].reshape(2, 2, *value.shape[1:]) for name, value in draws.items()}
    assert torch.allclose(guide.log_prob(nested, DATA), log_q[:4].reshape(2, 2), rtol=1e-4)


def test_draws_of_rows_that_were_not_seen_in_training() -> None:
    guide = independent_guide()
    assert guide.sample(3, X[:2])["z"].shape == (3, 2)
    assert guide.log_prob({"z": torch.zeros(4, 2, dtype=X.dtype)}, X[:2]).shape == (4,)


def test_the_density_is_normalised_and_that_of_the_exact_posterior() -> None:
    guide = exact_guide()
    draws = guide.sample(400, X)
    assert float(draws["mu"].mean()) == pytest.approx(GLOBAL_MEAN, abs=5 * GLOBAL_SD / 20)
    mu = dist.Normal(GLOBAL_MEAN, GLOBAL_SD).log_prob(draws["mu"])
    loc = PULL * X + (1 - PULL) * draws["mu"][:, None]
    z = dist.Normal(loc, (1 - PULL) ** 0.5).log_prob(draws["z"]).sum(-1)
    assert torch.allclose(guide.log_prob(draws, X), mu + z, atol=1e-4)


def test_the_evidence_of_an_exact_guide_is_exact() -> None:
    found = exact_guide().evidence(X, num_samples=50, seed=0)
    assert found.log_evidence == pytest.approx(log_evidence(), abs=1e-4)
    assert found.elbo == pytest.approx(log_evidence(), abs=1e-4) and found.num_samples == 50


def test_independent_data_have_weights_of_their_own() -> None:
    guide = rough_guide()
    found = guide.evidence(X, num_samples=2000, seed=0)
    assert found.elbo < independent_evidence() - 0.2
    assert abs(found.log_evidence - independent_evidence()) < 4 * found.standard_error < 0.2
    assert found.is_reliable
    bounds = evidence_bounds(independent, guide, args=(X,), num_samples=2000, seed=0)
    errors = found.elbo_standard_error, float(bounds["elbo_se"])
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    assert found.elbo == pytest.approx(float(bounds["elbo"]), abs=5 * sum(errors))
    draws = guide.resample(3000, X, seed=0)["z"]
    assert draws.shape == (3000, len(X))
    assert torch.allclose(draws.mean(0), 0.8 * X, atol=0.06)
    assert torch.allclose(draws.std(0), torch.full_like(X, 0.2**0.5), rtol=0.06)


def test_resampled_draws_of_global_and_local_latents_belong_together() -> None:
    guide = exact_guide()
    draws = guide.resample(200, X, num_proposals=400, seed=0)
    assert draws["mu"].shape == (200,) and draws["z"].shape == (200, len(X))
    residual = draws["z"] - PULL * X - (1 - PULL) * draws["mu"][:, None]
    assert float(residual.std()) == pytest.approx((1 - PULL) ** 0.5, rel=0.15)
    again = guide.resample(200, X, num_proposals=400, seed=0)
    assert torch.equal(draws["mu"], again["mu"])


def test_a_pareto_k_above_its_threshold_is_said() -> None:
    guide = independent_guide(init_scale=0.05)
    with pytest.warns(UserWarning, match="AmortizedSplineFlow have pareto k"):
        guide.resample(20, X, seed=0)


@pytest.mark.parametrize("make", [AutoNormal, None, AutoDelta])
def test_densities_with_global_guides_of_other_kinds(make) -> None:
    def by_hand(x):
        pyro.sample("mu", dist.Normal(torch.tensor(0.3, dtype=torch.float64), 0.4))

    own = by_hand if make is None else make(poutine.block(hierarchy, expose=["mu"]))
    guide = make_guide(hierarchy, lambda x: x[:, None], context_dim=1, global_guide=own).setup(X)
    draws = guide.sample(3, X)
    if make is AutoDelta:
        with pytest.raises(ValueError, match="AutoDelta, in which 'mu' follows from other draws"):
            guide.log_prob(draws, X)
        return
    one = poutine.trace(guide).get_trace(X)
    values = {name: one.nodes[name]["value"] for name in ("mu", "z")}
    assert guide.log_prob(values, X).item() == pytest.approx(one.log_prob_sum().item(), rel=1e-5)


def test_what_does_not_fit_says_expected_and_got() -> None:
    guide = ready_guide()
    with pytest.raises(RuntimeError, match="setup"):
        make_guide().sample(2, DATA)
    with pytest.raises(ValueError, match=r"latents \['loc', .*\], got \['z'\]"):
        guide.log_prob({"z": torch.zeros(SIZE)}, DATA)
    draws = guide.sample(2, DATA)
    with pytest.raises(ValueError, match=r"shape \(\*sample_shape, 12\) for 'z', got \(2, 3\)"):
        guide.log_prob(draws | {"z": torch.zeros(2, 3)}, DATA)
    with pytest.raises(ValueError, match=r"all 12 data in plate 'rows'.*a subsample of 4"):
        guide.evidence(DATA[:4])
    pickled = pickle.dumps(guide)
    del guide
    without_model = pickle.loads(pickled)
    assert without_model.sample(2, DATA)["z"].shape == (2, SIZE)
    with pytest.raises(RuntimeError, match="unpickled"):
        without_model.evidence(DATA)
