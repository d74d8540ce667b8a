r"""The posteriors that a step of variational inference is timed on, with the guides and optimizers that compete.

Eight schools, centred (10 latents), is `models/eight_schools.py`. Seeds (26 latents; Crowder 1978, and an example of
BUGS) is a logistic regression with a random effect per plate of seeds:

    a ~ N(0, 10)^4,   tau ~ Gamma(.01, .01),   b_i ~ N(0, tau^-1/2),   r_i ~ Binomial(n_i, logit^-1(a x_i + b_i))
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from models import eight_schools
from pyro_flowkit.guides import AutoSplineFlow

HIDDEN_DIMS = [32, 32]
NUM_TRANSFORMS = 4
LR = 1e-3

SEEDS_N = (39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7)
SEEDS_R = (10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3)
SEEDS_X1 = (0,) * 11 + (1,) * 10
SEEDS_X2 = (0,) * 5 + (1,) * 6 + (0,) * 5 + (1,) * 5


@dataclass(frozen=True)
class Problem:
    """A model with its data, and where the guides that can start somewhere start."""

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    start: dict[str, Tensor]


def seeds(x: Tensor, n: Tensor, r: Tensor) -> None:
    """Numbers of germinated seeds ``r`` of ``n``, with covariates ``x`` of shape ``(21, 4)``."""
    zero = x.new_zeros(())
    a = pyro.sample("a", dist.Normal(zero, 10.0 + zero).expand([4]).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(0.01 + zero, 0.01 + zero))
    with pyro.plate("plate", len(n)):
        b = pyro.sample("b", dist.Normal(zero, tau.rsqrt()))
        pyro.sample("r", dist.Binomial(n, logits=(a * x).sum(-1) + b), obs=r)


def problems(dtype: torch.dtype) -> dict[str, Problem]:
    tensor = partial(torch.tensor, dtype=dtype)
    x1, x2 = tensor(SEEDS_X1), tensor(SEEDS_X2)
    x = torch.stack([torch.ones_like(x1), x1, x2, x1 * x2], dim=-1)
    return {
        "eight schools": Problem(
            eight_schools.centred,
            eight_schools.data(dtype),
            {"mu": tensor(4.0), "tau": tensor(3.0), "theta": tensor([4.0] * 8)},
        ),
        "seeds": Problem(
            seeds,
            (x, tensor(SEEDS_N), tensor(SEEDS_R)),
            {"a": tensor([-0.5, 0.0, 1.3, -0.8]), "tau": tensor(10.0), "b": tensor([0.0] * 21)},
        ),
    }


SPLINE = "AutoSplineFlow"
REFERENCE_GUIDE = "AutoMultivariateNormal"


def guides(problem: Problem) -> dict[str, Any]:
    """Fresh guides by name, each run once, all in one param store."""
    start = {"init_loc_fn": init_to_value(values=problem.start)}
    size: dict[str, Any] = {"num_transforms": NUM_TRANSFORMS, "hidden_dims": HIDDEN_DIMS}
    couplings = partial(
        pyro_transforms.iterated,
        NUM_TRANSFORMS,
        pyro_transforms.spline_coupling,
        hidden_dims=HIDDEN_DIMS,
    )
    model = problem.model
    made = {
        "AutoDiagonalNormal": AutoDiagonalNormal(model, **start),
        REFERENCE_GUIDE: AutoMultivariateNormal(model, **start),
        "AutoIAFNormal": AutoIAFNormal(
            model, hidden_dim=HIDDEN_DIMS, num_transforms=NUM_TRANSFORMS
        ),
        "AutoNormalizingFlow, spline_coupling": AutoNormalizingFlow(model, couplings),
        SPLINE: AutoSplineFlow(model, path_gradient=False, **size, **start),
        f"{SPLINE}, path gradient": AutoSplineFlow(model, path_gradient=True, **size, **start),
    }
    with warnings.catch_warnings():
        # two of a kind are meant here
        warnings.filterwarnings("ignore", message="The param store holds the parameters of another")
        for guide in made.values():
            guide(*problem.args)
    return made


def make_elbo(num_particles: int) -> Trace_ELBO:
    return Trace_ELBO(
        num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
    )


def svi_step(problem: Problem, guide: Any, num_particles: int) -> Callable[[], object]:
    """A step as Pyro takes it: `SVI` with `pyro.optim.Adam`, which makes an optimizer for each parameter."""
    optimizer = pyro.optim.Adam({"lr": LR})
    svi = SVI(problem.model, guide, optimizer, make_elbo(num_particles))
    return partial(svi.step, *problem.args)


def loop_step(problem: Problem, guide: Any, num_particles: int) -> Callable[[], object]:
    """A step of a loop by hand: the same objective, and one fused Adam of PyTorch for all parameters."""
    elbo = make_elbo(num_particles)
    optimizer = torch.optim.Adam(guide.parameters(), lr=LR, fused=True)

    def step() -> None:
        loss = elbo.differentiable_loss(problem.model, guide, *problem.args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


DRIVERS = {"SVI, pyro.optim.Adam": svi_step, "loop, torch.optim.Adam(fused=True)": loop_step}
