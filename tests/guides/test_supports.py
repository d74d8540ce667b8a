"""Guides map onto every support that real numbers can be mapped onto, tails included, and name the latent elsewhere."""

import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_flowkit import fit
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow
from pyro_flowkit.guides.supports import bijection_to
from tests.guides.support_models import TINY, WORKS, Encoder, quadrature


@pytest.mark.parametrize("name", WORKS)
def test_the_whole_mass_of_a_latent_can_be_reached_in_float32(name) -> None:
    model, exact, axes = WORKS[name]
    guide = AutoSplineFlow(model, **TINY).setup()
    assert guide._init_loc().dtype == torch.float32
    assert quadrature(guide, model, axes) == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("name", WORKS)
def test_a_plain_loop_trains_every_support(name) -> None:
    pyro.set_rng_seed(0)
    model, exact, _ = WORKS[name]
    guide = AutoSplineFlow(model, **TINY)
    # Pyro's LKJ cannot be expanded, and so not stand in a plate
    vectorized = name != "corr_matrix"
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < sum(losses[:20])
    # what a flow says of a draw is the density that Trace_ELBO has counted
    trace = poutine.trace(guide).get_trace()
    latent_site = trace.nodes[f"_{guide._pyro_name}_latent"]
    counted = latent_site["fn"].log_prob(latent_site["value"]) + trace.nodes["z"]["fn"].log_prob(
        trace.nodes["z"]["value"]
    )
    value = {"z": trace.nodes["z"]["value"].detach()}
    torch.testing.assert_close(guide.log_prob(value), counted, rtol=1e-3, atol=1e-3)


def sparse_dirichlet(concentration: float):
    def model() -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((4,), concentration)))
        counts = torch.tensor([5.0, 0.0, 3.0, 0.0])
        pyro.sample("y", dist.Multinomial(8, probs=theta), obs=counts)

    return model


def test_fit_finds_the_evidence_of_a_sparse_dirichlet_in_float32() -> None:
    prior = torch.full((4,), 0.1, dtype=torch.float64)
    posterior = prior + torch.tensor([5.0, 0.0, 3.0, 0.0])
    exact = math.log(56) + sum(
        sign * float(torch.lgamma(a).sum() - torch.lgamma(a.sum()))
        for sign, a in ((1, posterior), (-1, prior))
    )
    assert exact == pytest.approx(-4.908, abs=1e-3)
    pyro.set_rng_seed(0)
    model = sparse_dirichlet(0.1)
    guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[16])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such an edge is not worth a warning
        fit(model, guide, max_steps=150, num_particles=64, seed=0, progress=False)
        evidence = guide.evidence(num_samples=4000, seed=0)
    assert evidence.log_evidence == pytest.approx(exact, abs=0.05)
    assert guide.sample(1000)["theta"].min() < 1e-12


def test_a_tail_beyond_the_floats_is_said_with_the_name_of_the_latent() -> None:
    pyro.set_rng_seed(0)
    model = sparse_dirichlet(0.01)
    guide = AutoSplineFlow(model, **TINY, init_scale=30.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    said = pytest.warns(UserWarning, match="draws of 'theta' within the numbers .* float64")
    with said as record:
        for _ in range(200):
            assert math.isfinite(svi.step())
    assert len(record) == 1
    with pytest.warns(UserWarning, match="draws of 'theta' within the numbers"):
        guide.evidence(num_samples=100)


def test_mass_that_float32_loses_at_one_is_said_with_the_name_of_the_latent() -> None:
    def model() -> None:
        pyro.sample("z", dist.Beta(1.0, 0.1))

    guide = AutoSplineFlow(model, **TINY, init_scale=10.0).setup()
    lost = -math.expm1(quadrature(guide, model, [(-20, 120, 4000)]))
    assert lost == pytest.approx(0.17, abs=0.01), "as docs/howto/supports.md has it"
    with pytest.warns(UserWarning, match="draws of 'z' within the numbers"):
        guide.evidence(num_samples=1000)


# Around the guide


@pytest.mark.parametrize("name", ["simplex", "simplex, sparse", "corr_cholesky", "unit interval"])
def test_nuts_in_the_coordinates_of_the_guide_has_its_values(name) -> None:
    model = WORKS[name][0]
    guide = AutoSplineFlow(model, **TINY).setup()
    neutra = NeuTraReparam(guide)
    with torch.no_grad():
        trace = poutine.trace(poutine.reparam(model, config=lambda _: neutra)).get_trace()
        latent = guide.get_transform()(trace.nodes["z_shared_latent"]["value"])
        (site, unconstrained), *_ = guide._unpack_latent(latent)
        own = bijection_to(site["fn"].support)(unconstrained)
    torch.testing.assert_close(trace.nodes["z"]["value"], own)


@pytest.mark.parametrize(
    "name", ["positive", "interval", "simplex", "corr_cholesky", "positive_definite"]
)
def test_a_fresh_guide_has_its_median_at_the_start(name) -> None:
    guide = AutoSplineFlow(WORKS[name][0], **TINY, init_loc_fn=init_to_median).setup()
    start = guide.prototype_trace.nodes["z"]["value"]
    torch.testing.assert_close(guide.median()["z"], start, rtol=1e-4, atol=1e-5)


LOCAL = {
    "positive": lambda: dist.Gamma(2.0, 1.0),
    "unit interval": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-1.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([0.3, 1.0, 2.0])),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        [dist.transforms.OrderedTransform()],
    ),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
    "positive_definite": lambda: dist.Wishart(torch.tensor(5.0), torch.eye(2)),
}


@pytest.mark.parametrize("name", LOCAL)
def test_amortised_guide_trains_local_latents_of_every_support(name) -> None:
    pyro.set_rng_seed(0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=len(x)):
            z = pyro.sample("z", LOCAL[name]())
            first = z.reshape(len(x), -1)[:, 0] if z.dim() > 1 else z
            pyro.sample("x", dist.Normal(first, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 3)
    guide = AmortizedSplineFlow(model, Encoder(), context_dim=2, num_transforms=2, hidden_dims=[8])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
    assert all(math.isfinite(svi.step(x)) for _ in range(20))
    values = guide.median(x)["z"]
    fn = LOCAL[name]()
    assert values.shape == (3, *fn.event_shape)
    assert bool(fn.support.check(values).all())
    assert pickle.loads(pickle.dumps(guide)).median(x)["z"].equal(values)


def test_amortised_guide_reaches_small_components() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.full((3,), 0.1)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    x = torch.zeros(4)
    guide = AmortizedSplineFlow(model, Encoder(), context_dim=2, **TINY, init_scale=20.0)
    guide.setup(x)
    assert 0.0 < float(guide(x)["z"].detach().min()) < 1e-10
