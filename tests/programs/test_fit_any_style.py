"""What ``fit``, its Gaussian start and ``evidence`` make of models that are not written for a plate of particles."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from models._styles import MODELS
from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.training import Callback

SMALL = {"num_transforms": 2, "hidden_dims": [8]}


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The spline flow .* ended .* below the Gaussian")
        yield


def test_the_posterior_of_a_chain_is_right_in_double_precision():
    """A plate of particles takes the mean of z over all of them: sd 0.98 instead of 0.707."""
    n = 2000
    y = (0.5 + torch.randn(n, generator=torch.Generator().manual_seed(1))).double()

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        w = pyro.sample("w", dist.Normal(z.mean(), 1.0))
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    guide = AutoSplineFlow(model, **SMALL)
    fit(model, guide, max_steps=20, progress=False)
    draws = guide.sample(4000)
    assert float(draws["z"].std()) == pytest.approx(math.sqrt(0.5 + 0.25 / (n + 0.5)), abs=0.03)


def test_an_observed_site_without_latents_keeps_the_start():
    x = torch.linspace(-1.0, 1.0, 50)
    y = 0.7 * x

    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    guide = AutoSplineFlow(model, **SMALL).setup()
    assert LatentDensity(model, guide).obstacle is None
    fit(model, guide, max_steps=5, progress=False)
    precision = 1.0 + float(x.square().sum())
    exact = float(dist.Normal(0.0, 1.0).log_prob(x).sum() + dist.Normal(0.0, 1.0).log_prob(y).sum())
    exact += 0.5 * float((x * y).sum()) ** 2 / precision - 0.5 * math.log(precision)
    assert float(guide.evidence(seed=0).elbo) == pytest.approx(exact, abs=0.01)


def test_lifted_parameters_keep_the_start():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(2))
    y = x @ torch.tensor([1.0, -0.5]) + 0.2

    def model():
        w = pyro.param("w", torch.zeros(2))
        c = pyro.param("c", torch.zeros(()))
        pyro.sample("y", dist.Normal(x @ w + c, 0.3).to_event(1), obs=y)

    lifted = poutine.lift(
        model,
        prior={"w": dist.Normal(torch.zeros(2), 1.0).to_event(1), "c": dist.Normal(0.0, 1.0)},
    )
    guide = AutoSplineFlow(lifted, **SMALL)
    fit(lifted, guide, max_steps=5, progress=False)
    design = torch.cat([x, torch.ones(40, 1)], -1)
    covariance = 0.09 * torch.eye(40) + design @ design.T
    exact = float(dist.MultivariateNormal(torch.zeros(40), covariance).log_prob(y))
    assert float(guide.evidence(seed=0).elbo) == pytest.approx(exact, abs=0.02)


def test_a_deterministic_site_of_the_batchs_length_is_no_plate_of_the_data():
    x = torch.randn(80, generator=torch.Generator().manual_seed(3))

    def model(batch):
        with pyro.plate("groups", 8):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * a)
        with pyro.plate("data", 80, subsample_size=len(batch)):
            pyro.sample("x", dist.Normal(a.mean(-1, keepdim=True), 1.0), obs=batch)

    guide = AutoSplineFlow(model, **SMALL)
    result = fit(model, guide, data=x, batch_size=8, max_steps=30, progress=False)
    assert -2.5 < result.history["elbo"][-1] < -1.0, "nats per datum"


@pytest.mark.parametrize("name", ["varying_intercepts", "gaussian_process", "softmax"])
def test_both_styles_end_at_the_same_elbo(name):
    found = []
    for batched in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def model(batched=batched):
            MODELS[name](batched)

        guide = AutoSplineFlow(model, **SMALL)
        fit(model, guide, max_steps=30, seed=0, progress=False)
        found.append(float(guide.evidence(seed=0).elbo))
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_a_number_that_changes_while_fit_trains_is_found_out():
    setting = {"scale": 1.0}

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, setting["scale"]), obs=torch.tensor(1.0))

    class Anneal(Callback):
        def on_step(self, state):
            setting["scale"] = 0.5

    guide = AutoSplineFlow(model, **SMALL)
    with pytest.warns(UserWarning, match="does not hold any more, site 'y'"):
        fit(model, guide, max_steps=400, lr=0.01, callbacks=[Anneal()], progress=False)
    assert guide.median()["z"].item() == pytest.approx(0.8, abs=0.05), (
        "0.5 is that of the old number"
    )
