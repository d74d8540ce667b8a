"""The posterior as an object: draws, densities and evidence in constrained space."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_
from tests.tiny import DATA, TINY, ready_guide

NOISE = 0.5


def conjugate(data):
    mu = pyro.sample("mu", dist.Normal(data.new_zeros(()), 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(mu, NOISE), obs=data)


def exact_posterior(data):
    precision = 1.0 + len(data) / NOISE**2
    return dist.Normal(data.sum() / NOISE**2 / precision, precision**-0.5)


def exact_log_evidence(data):
    covariance = NOISE**2 * torch.eye(len(data), dtype=data.dtype) + 1.0
    return float(dist.MultivariateNormal(torch.zeros_like(data), covariance).log_prob(data))


def guide_at(data, shift: float = 0.0, widening: float = 1.0) -> AutoSplineFlow:
    """A guide for ``conjugate`` that is the posterior moved by so many standard deviations, and widened."""
    guide = AutoSplineFlow(conjugate, **TINY).setup(data)
    posterior = exact_posterior(data)
    loc = posterior.loc + shift * posterior.scale
    guide.affine.restart(loc.reshape(1), (widening * posterior.scale).reshape(1, 1))
    return guide


def test_samples_have_the_shapes_of_the_sites_and_lie_in_their_supports() -> None:
    guide = ready_guide()
    draws = guide.sample(6)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "loc": (6,),
        "scale": (6,),
        "weights": (6, 3),
        "local": (6, 4),
    }
    assert (draws["scale"] > 0).all()
    assert torch.allclose(draws["weights"].sum(-1), torch.ones(6))
    assert not any(value.requires_grad for value in draws.values())


def test_log_prob_is_the_density_of_the_guides_own_sites() -> None:
    guide = ready_guide()
    trace = poutine.trace(guide).get_trace(DATA)
    trace.compute_log_prob()
    latents = {
        name: site["value"]
        for name, site in trace.iter_stochastic_nodes()
        if name in ("loc", "scale", "weights", "local")
    }
    assert guide.log_prob(latents).shape == ()
    assert guide.log_prob(latents).item() == pytest.approx(trace.log_prob_sum().item(), abs=1e-4)
    two = {name: torch.stack([value, value]) for name, value in latents.items()}
    assert torch.allclose(guide.log_prob(two), guide.log_prob(latents).expand(2), atol=1e-4)


def test_log_prob_of_a_constrained_latent_integrates_to_one() -> None:
    def model():
        pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))

    guide = AutoSplineFlow(model, init_scale=0.5, **TINY).setup()
    perturb_(guide.flow, 0.5)
    grid = torch.linspace(1e-4, 40.0, 200_001, dtype=torch.float64)
    density = guide.log_prob({"scale": grid}).exp().detach()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-3)


def test_log_prob_has_gradients_for_the_parameters() -> None:
    guide = ready_guide()
    guide.log_prob(guide.sample(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())


def test_values_that_are_missing_or_misshapen_are_named() -> None:
    guide = ready_guide()
    values = guide.sample(2)
    with pytest.raises(ValueError, match="Expected a value for each of the latents .*'weights'"):
        guide.log_prob({name: value for name, value in values.items() if name != "weights"})
    with pytest.raises(ValueError, match=r"\(\*sample_shape, 4\) for 'local', got \(2, 3\)"):
        guide.log_prob({**values, "local": values["local"][:, :3]})


def test_evidence_at_the_exact_posterior_is_exact() -> None:
    data = DATA.double()
    evidence = guide_at(data).evidence(data, num_samples=200)
    assert evidence.log_evidence == pytest.approx(exact_log_evidence(data), abs=1e-6)
    assert evidence.elbo == pytest.approx(evidence.log_evidence, abs=1e-6)
    assert evidence.standard_error < 1e-6
    assert evidence.is_reliable


def test_evidence_of_an_approximation_is_within_its_standard_error() -> None:
    data = DATA.double()
    exact = exact_log_evidence(data)
    guide = guide_at(data, shift=0.5, widening=1.5)
    errors = []
    for seed in range(20):
        evidence = guide.evidence(data, num_samples=1000, seed=seed)
        errors.append((evidence.log_evidence - exact) / evidence.standard_error)
        assert evidence.elbo < exact - 5 * evidence.elbo_standard_error
    root_mean_square = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert 0.5 < root_mean_square < 1.6, "standard errors are those of the estimate"
    again = guide.evidence(data, num_samples=1000, seed=19)
    assert again == evidence, "the same seed, the same draws"


def test_a_guide_that_is_too_narrow_is_not_reliable_and_resampling_says_so() -> None:
    data = DATA.double()
    guide = guide_at(data, shift=3.0, widening=0.2)
    assert not guide.evidence(data, seed=0).is_reliable
    with pytest.warns(UserWarning, match="pareto k .* above 0.70: .*NeuTraReparam"):
        guide.resample(400, data, seed=0)


def test_resampled_draws_follow_the_posterior_where_the_guide_does_not() -> None:
    data = DATA.double()
    guide = guide_at(data, shift=1.0, widening=1.5)
    posterior = exact_posterior(data)
    raw = guide.sample(4000)["mu"]
    resampled = guide.resample(4000, data, num_proposals=40_000, seed=0)["mu"]
    assert resampled.shape == (4000,)
    error_of = {"raw": raw, "resampled": resampled}
    means = {
        k: abs(float((v.mean() - posterior.mean) / posterior.stddev)) for k, v in error_of.items()
    }
    sds = {k: abs(float(v.std() / posterior.stddev) - 1.0) for k, v in error_of.items()}
    assert means["raw"] > 0.9 and sds["raw"] > 0.4
    assert means["resampled"] < 0.1 and sds["resampled"] < 0.05


def test_evidence_of_a_model_that_cannot_be_vectorised() -> None:
    def model(data):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(float(mu), NOISE).expand([len(data)]).to_event(1), obs=data)

    data = DATA.double()
    guide = AutoSplineFlow(model, **TINY).setup(data)
    posterior = exact_posterior(data)
    guide.affine.restart(posterior.loc.reshape(1), posterior.scale.reshape(1, 1))
    evidence = guide.evidence(data, num_samples=50)
    assert evidence.log_evidence == pytest.approx(exact_log_evidence(data), abs=1e-6)


def test_unpickled_guide_has_draws_and_says_that_evidence_needs_the_model() -> None:
    data = DATA.double()
    guide = pickle.loads(pickle.dumps(guide_at(data)))
    assert guide.sample(3)["mu"].shape == (3,)
    with pytest.raises(RuntimeError, match="evidence_bounds"):
        guide.evidence(data)


def test_draws_of_a_seed_leave_the_random_state_alone() -> None:
    data = DATA.double()
    guide = guide_at(data, shift=0.1)
    before = torch.get_rng_state()
    first = guide.resample(5, data, num_proposals=100, seed=4)["mu"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(guide.resample(5, data, num_proposals=100, seed=4)["mu"], first)


@pytest.mark.parametrize("name", ["sample", "log_prob", "evidence", "resample"])
def test_before_setup_the_error_names_it(name: str) -> None:
    guide = AutoSplineFlow(conjugate)
    argument = {"mu": torch.zeros(())} if name == "log_prob" else 3
    with pytest.raises(RuntimeError, match="setup"):
        getattr(guide, name)(argument)


def test_simplex_log_det_is_that_of_the_bijection() -> None:
    guide = ready_guide()
    draws = guide.sample(4)
    transform = biject_to(dist.Dirichlet(torch.ones(3)).support)
    jacobian = (
        transform.log_abs_det_jacobian(transform.inv(draws["weights"]), draws["weights"])
        + draws["scale"].log()
    )
    latent = torch.cat(
        [
            draws["loc"][:, None],
            draws["scale"].log()[:, None],
            transform.inv(draws["weights"]),
            draws["local"],
        ],
        dim=-1,
    )
    expected = guide.get_posterior().log_prob(latent) - jacobian
    assert torch.allclose(guide.log_prob(draws), expected, atol=1e-4)
