"""What diagnostics take for model and guide, and in which mode they run them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_flowkit.diagnostics import evidence_bounds, from_svi, pointwise_bounds, probe_modes
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow

X = torch.tensor([0.3, -1.2, 0.8, 2.1])
DIAGNOSTICS = [from_svi, evidence_bounds, probe_modes]


class VAE(nn.Module):
    """Has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(1, 2), nn.Linear(1, 1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z).squeeze(-1), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x[:, None]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize("diagnostic", DIAGNOSTICS)
def test_what_is_no_program_says_expected_and_got(diagnostic):
    vae = VAE()
    with pytest.raises(TypeError, match=r"a model that can be called, got VAE.*vae\.model"):
        diagnostic(vae, vae, args=(X,))
    with pytest.raises(TypeError, match=r"a guide that can be called, got VAE.*vae\.guide"):
        diagnostic(vae.model, vae, args=(X,))
    with pytest.raises(
        TypeError, match="a guide that can be called, got dict.*what a guide returns"
    ):
        diagnostic(mean, AutoNormal(mean)(X), args=(X,))
    with pytest.raises(TypeError, match=r"tuple of arguments, got Tensor: args=\(x,\)"):
        diagnostic(vae.model, vae.guide, args=X)


@pytest.mark.parametrize("diagnostic", DIAGNOSTICS)
def test_model_and_guide_in_each_others_places_are_an_error(diagnostic):
    vae = VAE()
    with pytest.raises(ValueError, match=r"got \['x'\] in the guide: the model comes first"):
        diagnostic(vae.guide, vae.model, args=(X,))
    with pytest.raises(ValueError, match="got a guide, AutoNormal, for the model"):
        diagnostic(AutoNormal(mean), mean, args=(X,))


@pytest.mark.parametrize("make", [AutoNormal, AutoSplineFlow])
def test_a_guide_that_was_never_called_is_set_up(make):
    bounds = evidence_bounds(mean, make(mean), args=(X,), num_samples=100, seed=0)
    assert torch.isfinite(torch.tensor(float(bounds["elbo"])))


def amortized():
    return AmortizedSplineFlow(VAE().model, lambda x: x[:, None], context_dim=1)


@pytest.mark.parametrize("make", [lambda: AutoSplineFlow(mean), amortized])
def test_a_guide_that_was_never_set_up_says_so_of_what_needs_its_parameters(make):
    guide = make()
    state = make().setup(X).state_dict()
    for use in (guide.state_dict, lambda: guide.load_state_dict(state), guide.parameters):
        with pytest.raises(RuntimeError, match="setup"):
            list(use())
    guide.setup(X).load_state_dict(state)


def test_modules_of_plain_functions_run_in_eval_mode_and_go_back():
    network = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.9))

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + network(x[:, None]).squeeze(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    model(X)  # registers the network
    right = {True: None, False: None}
    for training in right:
        network.train(training)
        bounds = evidence_bounds(model, guide, args=(X,), num_samples=50, seed=0)
        pointwise = pointwise_bounds(model, guide, X, num_samples=50, seed=0)
        right[training] = [float(bounds["elbo"]), *pointwise["elbo"].to_numpy().tolist()]
        assert all(part.training is training for part in network)
    assert right[True] == right[False]
