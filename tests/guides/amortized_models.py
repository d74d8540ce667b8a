"""A hierarchical model with a latent for every datum, and its guide, as small as they can be."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_flowkit.guides import AmortizedSplineFlow
from pyro_flowkit.testing import perturb_

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}
SIZE = 12
DATA = torch.linspace(-1.0, 2.0, 2 * SIZE).reshape(SIZE, 2)
LOCAL_DIM = 1 + 2
GLOBAL_DIM = 2


def model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", SIZE, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        mean = torch.stack([z, z + weights[..., 0]], -1)
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


class Encoder(nn.Module):
    """A network with as many features as the data have columns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def make_guide(of=model, encoder=None, *, context_dim: int = 2, **settings) -> AmortizedSplineFlow:
    encoder = Encoder() if encoder is None else encoder
    return AmortizedSplineFlow(of, encoder, context_dim=context_dim, **{**TINY, **settings})


def ready_guide(*args, **settings) -> AmortizedSplineFlow:
    guide = perturb_(make_guide(*args, **settings).setup(DATA), 0.1)
    with torch.no_grad():
        guide.affine.weight.div_(guide.affine.weight_rate)
    return guide
