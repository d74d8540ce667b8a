"""Which objective a model and guide are trained by, in ``fit`` and under Lightning.

Likelihood where it is exact, else the ELBO: its particles in one plate where the model allows it, and no combination
that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoContinuous

from pyro_flowkit.guides.protocols import ObjectiveGuide
from pyro_flowkit.programs.pairs import NotVectorizable, vectorized
from pyro_flowkit.programs.plates import TrainingRows
from pyro_flowkit.programs.vectorized import Vectorized, Way
from pyro_flowkit.recipe import recipe_of
from pyro_flowkit.training.losses import FlowMatching, MaximumLikelihood
from pyro_flowkit.training.variational import Variational, no_guide
from pyro_flowkit.warning import warn

MAX_SEQUENTIAL = 8
AT_ONCE: tuple[Way, ...] = ("graph", "plate")

Program = Callable[..., Any]


def chosen_loss(
    model: Any,
    guide: Any,
    batch: tuple[torch.Tensor, ...],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    objective: ELBO | str | None,
    num_particles: int | None,
    rows: TrainingRows | None = None,
) -> MaximumLikelihood | Variational:
    """Flow matching of a module with ``matching_loss``, maximum likelihood of another with ``log_prob`` and no guide,
    else the ELBO of a Pyro model.

    Args:
        model: The module, or the model.
        guide: Its guide, set up; or None.
        batch: The first batch.
        args, kwargs: What follows the batch in a call.
        objective: The caller's estimator of the ELBO, "likelihood" for that of a module with ``log_prob``, or None.
        num_particles: Its particles, or None: those of the guide's recipe, where there is one.
        rows: Lets plates of all rows stand for those that are trained on, where some are held out.

    Raises:
        TypeError: If the objective is no ``pyro.infer.ELBO``.
        ValueError: If it has another number of particles, would be wrong for the guide, or is not asked for.
    """
    if guide is None and isinstance(model, torch.nn.Module) and hasattr(model, "log_prob"):
        if objective not in (None, "likelihood") or num_particles is not None:
            raise ValueError(
                "Expected no objective, or objective='likelihood', and no num_particles for a module with log_prob, "
                f"got {objective!r} and {num_particles!r}"
            )
        if objective is None and hasattr(model, "matching_loss"):
            return FlowMatching(model, args, kwargs)
        return MaximumLikelihood(model, args, kwargs)
    program = no_guide if guide is None else guide
    loss = Variational(model, program, args, kwargs, guide is not None, rows)
    if objective is not None:
        loss.objective = checked_objective(objective, num_particles, program)
        return loss
    wished = recipe_of(model, guide).num_particles
    inputs = (*batch, *args)
    count = num_particles or wished or 1
    found = many_particles(
        count, num_particles is None, loss.model, program, inputs, kwargs, num_varying=len(batch)
    )
    if isinstance(found, Vectorized):
        own = guide.elbo(found, count) if isinstance(guide, ObjectiveGuide) else None
        loss.objective = own or Trace_ELBO(
            count, max_plate_nesting=found.nesting, vectorize_particles=True
        )
        loss.run_vectorized(found)
    else:
        loss.objective = Trace_ELBO(num_particles=found)
    return loss


def many_particles(
    count: int,
    is_wish: bool,
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    num_varying: int = 0,
) -> Vectorized | int:
    """The model for many particles at a time, or, with a warning, how many are to run one after the other.

    Args:
        count: Particles of a step.
        is_wish: Whether that is what the guide's recipe asks for, so that fewer will do.
        model, guide, args, kwargs: What is to run.
        num_varying: How many of the first arguments are other tensors at every step.
    """
    if count == 1:
        return 1
    try:
        return vectorized(model, guide, args, kwargs, ways=AT_ONCE, num_varying=num_varying)
    except NotVectorizable as error:
        complaint = str(error)
    fewer = min(count, MAX_SEQUENTIAL) if is_wish else count
    cost = (
        f", instead of {count} at once, which takes longer and gives a noisier gradient"
        if fewer < count
        else f", which takes about {count} times as long as {count} at once"
    )
    warn(
        f"The model is not run for many particles at a time. {complaint[:1].upper()}{complaint[1:]}. A step runs "
        f"{fewer} particles one after the other{cost}. torch.where instead of an if, tensors instead of numbers, and "
        "random numbers as arguments or sites of the guide let a model be recorded."
    )
    return fewer


def checked_objective(objective: ELBO | str, particles: int | None, guide: Program) -> ELBO:
    """The caller's objective.

    Raises:
        TypeError: If it is no instance of ``pyro.infer.ELBO``.
        ValueError: If it has another number of particles, or would be wrong for the guide.
    """
    if not isinstance(objective, ELBO):
        raise TypeError(
            f"Expected objective to be an instance of pyro.infer.ELBO, got {objective!r}"
        )
    if particles is not None and particles != objective.num_particles:
        raise ValueError(
            f"Expected num_particles of the objective, {objective.num_particles}, "
            f"got num_particles={particles}"
        )
    for part in guide.modules() if isinstance(guide, torch.nn.Module) else ():
        if isinstance(objective, TraceMeanField_ELBO) and isinstance(part, AutoContinuous):
            raise ValueError(
                f"Expected another objective than {type(objective).__name__} for "
                f"{type(part).__name__}, e.g. Trace_ELBO: an AutoContinuous guide writes its sites "
                "as Delta distributions with a log-density, and the analytic KL of a Delta drops "
                "that log-density, so the result would not be the ELBO"
            )
        if isinstance(part, ObjectiveGuide):
            part.check_objective(objective)
        if (
            getattr(part, "path_gradient", False)
            and not isinstance(objective, Trace_ELBO | TraceGraph_ELBO)
            and not getattr(objective, "own_gradient", False)
        ):
            warn(
                f"path_gradient of {type(part).__name__} has no effect under "
                f"{type(objective).__name__}: only Trace_ELBO, JitTrace_ELBO and TraceGraph_ELBO use "
                "it. The gradient is the ordinary one; path_gradient=False says so too."
            )
    return objective
