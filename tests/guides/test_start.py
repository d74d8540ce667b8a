"""Where a guide starts: at a point where the model's density has a derivative, or with a word about the point."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_median, init_to_value

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow

TINY = {"num_transforms": 2, "hidden_dims": [8]}
AT = torch.linspace(-1.0, 1.0, 40)
FREQUENCIES = torch.linspace(3.0, 120.0, 20)
BASIS = torch.cos(FREQUENCIES * AT[:, None])
Y = 0.5 * torch.cos(6.0 * AT) + 0.1 * torch.sin(50 * AT)


def spectral_process():
    """Its derivative is NaN at the origin, where the spectral density of high frequencies underflows."""
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    length = pyro.sample("length", dist.LogNormal(math.log(0.03), 0.5))
    density = sd**2 * length * torch.exp(-0.5 * length**2 * FREQUENCIES**2)
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
    pyro.sample("y", dist.Normal(BASIS @ (density.sqrt() * z), 0.3).to_event(1), obs=Y)


@pytest.mark.filterwarnings("ignore:At .* draws the model's log-density has no deriv")
def test_a_start_without_a_derivative_is_not_taken():
    found = []
    for init_loc_fn in (None, init_to_median):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSplineFlow(spectral_process, init_loc_fn=init_loc_fn)
        fit(spectral_process, guide, max_steps=60, progress=False, seed=0)
        found.append(guide.evidence(seed=0).elbo)
    assert found[0] > found[1] - 0.3


def test_a_draw_of_the_prior_is_a_start_where_medians_and_origin_are_none():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        distance = x.square().sum(-1)
        beyond = (distance * (distance > 0.5)).sqrt()  # of slope 0 times infinity within
        pyro.sample("y", dist.Normal(beyond, 1.0), obs=torch.tensor(1.0))

    guide = AutoSplineFlow(model, init_scale=1e-3, **TINY).setup()
    assert guide._init_loc().square().sum() > 0.5


def test_where_no_start_has_a_derivative_that_is_said_with_the_site():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((0.0 * x).sqrt(), 1.0), obs=torch.tensor(1.0))

    with pytest.warns(
        UserWarning, match="medians, the origin and 10 draws of the prior.*respect to x = "
    ):
        AutoSplineFlow(model, **TINY).setup()


@pytest.mark.parametrize("by_fit", [True, False])
def test_draws_without_a_derivative_are_left_out_and_said_once(by_fit):
    """Of half of the draws: the other half finds the posterior all the same."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        cut = (x * (x > 0.2)).sqrt()  # of derivative 0 times infinity below 0.2
        pyro.sample("y", dist.Normal(z + 0.01 * cut, 0.5), obs=torch.tensor(1.0))

    start = init_to_value(values={"x": torch.tensor(0.5), "z": torch.tensor(0.0)})
    guide = AutoSplineFlow(model, init_loc_fn=start, **TINY)
    with pytest.warns(UserWarning, match="no derivative with respect to x") as caught:
        if by_fit:
            fit(model, guide, max_steps=300, num_particles=16, lr=0.01, progress=False)
        else:
            elbo = Trace_ELBO(16, max_plate_nesting=0, vectorize_particles=True)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
            for _ in range(300):
                svi.step()
    assert sum("no derivative" in str(warning.message) for warning in caught) == 1
    assert guide.median()["z"].item() == pytest.approx(0.8, abs=0.1)
