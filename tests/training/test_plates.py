"""Plates in ``fit``: where their size matters, where it does not, and sites that a guide leaves out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from tests.tiny import TINY

QUICK = {"progress": False, "seed": 0}


class TutorialVAE(nn.Module):
    """As in Pyro's own tutorial, but for the size of the plate, which may be given."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(1, 3)

    def plate(self, x: torch.Tensor) -> pyro.plate:
        if self.size is None:
            return pyro.plate("data", x.shape[0])
        return pyro.plate("data", self.size, subsample=torch.arange(len(x)))

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.3).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with self.plate(x):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(100, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_the_size_of_a_plate_around_everything_does_not_matter_per_datum(x, val_fraction) -> None:
    found = []
    for size in (None, round(100 * (1 - val_fraction)), 100, 7000):
        pyro.clear_param_store()
        vae = TutorialVAE(size)
        result = fit(
            vae.model,
            vae.guide,
            data=x,
            batch_size=20,
            val_fraction=val_fraction,
            max_steps=6,
            **QUICK,
        )
        validation = result.validation["elbo"].tolist() if val_fraction else []
        found.append([*result.history["elbo"].tolist(), *validation])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def sized(size: int):
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mu, 0.7).expand([3]).to_event(1), obs=x)

    return model


@pytest.mark.parametrize(
    ("make", "batch_size"),
    [(AutoNormal, None), (AutoNormal, 20), (lambda model: AutoSplineFlow(model, **TINY), 20)],
)
def test_a_plate_of_all_rows_stands_for_the_training_rows(x, make, batch_size) -> None:
    found = []
    for size in (100, 60):
        pyro.clear_param_store()
        model = sized(size)
        result = fit(
            model,
            make(model),
            data=x,
            batch_size=batch_size,
            val_fraction=0.4,
            max_steps=3,
            num_particles=2,
            objective=Trace_ELBO(2),
            **QUICK,
        )
        found.append([*result.history["elbo"].tolist(), *result.validation["elbo"].tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("batch_size", [None, 20])
def test_the_own_objective_of_a_flow_guide_knows_a_plate_of_all_rows(x, batch_size) -> None:
    found = []
    for size in (100, 60):
        pyro.clear_param_store()
        model = sized(size)
        guide = AutoSplineFlow(model, **TINY)
        result = fit(
            model, guide, data=x, val_fraction=0.4, batch_size=batch_size, max_steps=5, **QUICK
        )
        assert (result.gap is None) == (batch_size is not None)
        sd = float(guide.get_posterior().variance.sqrt())
        found.append([sd, *result.history["elbo"].tolist(), *result.validation["elbo"].tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    if batch_size is None:  # the Gaussian that it starts at is the posterior of 60 rows, not of 100
        assert found[0][0] == pytest.approx((1.0 + 60 * 3 / 0.7**2) ** -0.5, rel=0.01)


@pytest.mark.parametrize("size", [None, 7000])
def test_with_a_global_latent_the_size_matters(x, size) -> None:
    model = sized(size or 20)
    with pytest.raises(ValueError, match=rf"size 100 = len\(data\), got {size or 20} with batches"):
        fit(
            model,
            AutoNormal(model),
            data=x,
            batch_size=20,
            val_fraction=0.2,
            max_steps=1,
            **QUICK,
        )


def test_a_plate_of_one_size_in_the_model_and_another_in_the_guide_is_an_error(x) -> None:
    vae, other = TutorialVAE(100), TutorialVAE()
    with pytest.raises(ValueError, match=r"of the guide \(site 'z'\).*got 20"):
        fit(vae.model, other.guide, data=x, batch_size=20, max_steps=1, **QUICK)


def two_latents() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.0))


def test_a_guide_that_misses_a_site_is_an_error() -> None:
    guide = AutoNormal(poutine.block(two_latents, expose=["a", "y"]))
    with pytest.raises(ValueError, match=r"for every latent of the model, got none for \['b'\]"):
        fit(two_latents, guide, max_steps=1, **QUICK)


def test_a_site_of_the_guide_that_the_model_has_not_is_an_error_unless_it_is_auxiliary() -> None:
    def guide(auxiliary: bool) -> None:
        infer = {"is_auxiliary": True} if auxiliary else {}
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("u", dist.Normal(loc, 1.0), infer=infer)
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(loc, 1.0))

    def model(auxiliary: bool) -> None:
        two_latents()

    with pytest.raises(ValueError, match=r"latents of the model, got \['u'\].*is_auxiliary"):
        fit(model, guide, args=(False,), max_steps=1, **QUICK)
    assert fit(model, guide, args=(True,), max_steps=1, **QUICK).stop_reason == "max_steps"
