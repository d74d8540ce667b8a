r"""The posteriors that a step of variational inference is timed on, with the guides and optimizers that compete.

Eight schools, centred (10 latents), and Seeds (26 latents): see ``models/_targets.py``.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
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

from models._targets import Target, targets
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training.compilation import compile_where_it_pays
from pyro_flowkit.training.objective import chosen_loss
from pyro_flowkit.training.optimizer import GradientNorm, build_optimizer

HIDDEN_DIMS = [32, 32]
NUM_TRANSFORMS = 4
LR = 1e-3
SETTLING = 1000  # the steps timed are those after so many
WARM_UP = 10

PROBLEMS = {"eight schools": "eight schools, centred", "seeds": "seeds"}


def problems(dtype: torch.dtype) -> dict[str, Target]:
    """The posteriors by the name that the tables give them."""
    every = targets(dtype)
    return {name: every[target] for name, target in PROBLEMS.items()}


SPLINE = "AutoSplineFlow"
REFERENCE_GUIDE = "AutoMultivariateNormal"


def guides(problem: Target) -> dict[str, Any]:
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


def svi_step(problem: Target, guide: Any, num_particles: int) -> Callable[[], object]:
    """A step as Pyro takes it: ``SVI`` with ``pyro.optim.Adam``, which makes an optimizer for each parameter."""
    optimizer = pyro.optim.Adam({"lr": LR})
    svi = SVI(problem.model, guide, optimizer, make_elbo(num_particles))
    return partial(svi.step, *problem.args)


def loop_step(problem: Target, guide: Any, num_particles: int) -> Callable[[], object]:
    """A step of a loop by hand: the same objective, and one fused Adam of PyTorch for all parameters."""
    elbo = make_elbo(num_particles)
    optimizer = torch.optim.Adam(guide.parameters(), lr=LR, fused=True)

    def step() -> None:
        loss = elbo.differentiable_loss(problem.model, guide, *problem.args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def fit_step(
    problem: Target, guide: Any, num_particles: int, *, compile: bool = False
) -> tuple[Callable[[], object], str]:
    """A step as ``fit`` takes it by the guide's recipe, with its optimizer and the norm of the gradient, after many.

    Returns:
        The step, and what was compiled, in words.
    """
    options: dict[str, Any] = {"objective": None, "num_particles": num_particles}
    loss = chosen_loss(problem.model, guide, (), problem.args, {}, **options)
    loss.prepare((), None, False)
    loss.begin_step(SETTLING)
    note = compile_where_it_pays(loss, ()) if compile else ""
    parameters = loss.parameters()
    optimizer, norm = build_optimizer(None, parameters, LR, LR), GradientNorm()
    guide.pace.is_resting = True

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(())
        grads = [p.grad for p in parameters if p.grad is not None]
        norm(parameters, grads).item()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    return step, note


DRIVERS = {"SVI, pyro.optim.Adam": svi_step, "loop, torch.optim.Adam(fused=True)": loop_step}
