"""Flows, a model and its guide, as small as they can be: what several test files start from."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_flowkit import SplineFlow
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}
CONTEXT = torch.linspace(-1.0, 1.0, 10).reshape(5, 2)


def make_flow(input_dim: int = 3, context_dim: int = 0, **settings) -> SplineFlow:
    return SplineFlow(input_dim, context_dim, **{**TINY, **settings})


def bent(*args, **settings) -> SplineFlow:
    flow = perturb_(make_flow(*args, **settings), 0.3)
    if flow.affine is not None:
        calm_(flow.affine)
    return flow


def calm_(affine: ConditionalAffine) -> None:
    """Take its rates out of a map that was perturbed."""
    with torch.no_grad():
        affine.raw_constant.div_(affine.rate)
        affine.weight.div_(affine.weight_rate)


DATA = torch.tensor([0.3, 1.2, -0.5, 0.9])


def model(data: Tensor = DATA) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(data)):
        local = pyro.sample("local", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(local, weights[..., 0] + 0.5), obs=data)


LATENT_DIM = 1 + 1 + 2 + 4


def make_guide(of=model, **settings) -> AutoSplineFlow:
    return AutoSplineFlow(of, **{**TINY, **settings})


def ready_guide(**settings) -> AutoSplineFlow:
    return perturb_(make_guide(**settings).setup(), 0.1)


def step(guide, *args, of=model, steps: int = 1, elbo=None) -> float:
    svi = SVI(of, guide, Adam({"lr": 0.01}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)][-1]
