"""The way out when a guide is not good enough: NUTS in the coordinates of the guide (the recipe of the README)."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam

from pyro_flowkit.guides import AutoSplineFlow


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), (v / 2).exp()))


def test_nuts_samples_a_funnel_in_the_coordinates_of_the_guide() -> None:
    pyro.set_rng_seed(0)
    guide = AutoSplineFlow(funnel, num_transforms=2, hidden_dims=[8], count_bins=4).setup()
    assert guide.find_start(funnel) is not None
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(
        NUTS(neutra.reparam(funnel), max_tree_depth=3),
        num_samples=100,
        warmup_steps=60,
        disable_progbar=True,
    )
    mcmc.run()
    latent = mcmc.get_samples()["v_shared_latent"]
    with torch.no_grad():
        draws = neutra.transform_sample(latent.unsqueeze(-2))
    v, x = draws["v"].reshape(-1), draws["x"]
    assert x.shape == (100, 2)
    ess = 40.0  # of so few draws; plain NUTS does not come near the neck of the funnel
    assert abs(float(v.mean())) < 4 * 3.0 / math.sqrt(ess)
    assert 2.0 < float(v.std()) < 4.0
    assert float(v.min()) < -4.0
    assert abs(float((x * (-v / 2).exp()[:, None]).std()) - 1.0) < 0.25
