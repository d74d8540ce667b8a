"""A cell that is run again, and a loop over folds, give what separate processes give: 30 runs of five kinds."""

import pyro
import pytest
import torch

KINDS = {
    "flow": """
flow = SplineFlow(2, num_transforms=1, hidden_dims=[4]).standardize(x, "full")
fit(flow, data=x, max_steps=2, seed=0, progress=False)
found = flow.log_prob(x)
""",
    "pyro guide": """
guide = AutoNormal(model)
fit(model, guide, args=(x,), max_steps=2, lr=0.1, seed=0, progress=False)
found = guide.median()["mu"]
""",
    "spline guide": """
pyro.set_rng_seed(0)
guide = AutoSplineFlow(model, num_transforms=1, hidden_dims=[4])
svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
losses = [svi.step(x) for _ in range(2)]
found = guide.median()["mu"]
""",
    "amortised guide": """
guide = AmortizedSplineFlow(local_model, lambda x: x, context_dim=2, num_transforms=1, hidden_dims=[4])
fit(local_model, guide, data=x, max_steps=2, lr=0.1, seed=0, progress=False)
found = guide.median(x)["z"]
""",
    "vae": """
pyro.set_rng_seed(1)
vae = VAE()
fit(vae.model, vae.guide, data=x, max_steps=2, lr=0.1, seed=0, progress=False)
found = vae.decoder(torch.ones(1, 2))
""",
}

NOTEBOOK = """
import pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow

def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=x)

def local_model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

class VAE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(2, 4), torch.nn.Linear(2, 2)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))
"""


def fold(number: int) -> torch.Tensor:
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(number)) + 5 * number


def run(cell: str, notebook: dict, number: int) -> torch.Tensor:
    """The names of the last run stay until the cell binds them again."""
    notebook["x"] = fold(number)
    exec(cell, notebook)
    return notebook["found"].detach()


@pytest.mark.filterwarnings("ignore:.*rows are beyond:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_runs_after_each_other_are_as_runs_alone(kind: str) -> None:
    alone = []
    for number in range(3):
        pyro.clear_param_store()
        notebook: dict = {}
        exec(NOTEBOOK, notebook)
        alone.append(run(KINDS[kind], notebook, number))
        del notebook
    assert not torch.equal(alone[0], alone[2])
    for clears in (False, True):
        pyro.clear_param_store()
        notebook = {}
        exec(NOTEBOOK, notebook)
        for number in (0, 1, 2):
            if clears:
                pyro.clear_param_store()
            assert torch.equal(run(KINDS[kind], notebook, number), alone[number])
