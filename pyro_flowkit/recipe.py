"""How a guide, or a flow by matching, wants to be trained by :func:`pyro_flowkit.fit`."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Recipe:
    """How :func:`pyro_flowkit.fit` trains a guide, or a flow by matching, where its caller does not say.

    None leaves it to the defaults.

    Attributes:
        lr: initial learning rate of Adam.
        num_particles: draws of the guide in a step.
        scheduler: name of the learning rate's schedule.
        warmup_steps: over so many first steps the rates rise in a line: Adam's first steps move every parameter by the
            whole rate, whatever its gradient, and would lose much of a start that is nearly right.
        max_steps: optimizer steps.
        clip_norm: largest norm of the gradient.
        clip_ratio: the same in units of the median norm of the last 50 steps, where the caller of ``fit`` gives no
            ``clip_norm``: one draw far out may have a gradient that a hundred steps do not make up for.
        batch_size: rows of a step, of data in tensors with as many.
        average: of the parameters over the steps, which the fit ends with, as ``fit`` has it.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.guides import AutoSplineFlow
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> recipe = AutoSplineFlow(model).recipe()
        >>> recipe.num_particles > 1
        True
    """

    lr: float | None = None
    num_particles: int | None = None
    scheduler: str | None = None
    warmup_steps: int = 0
    max_steps: int | None = None
    clip_norm: float | None = None
    clip_ratio: float | None = None
    batch_size: int | None = None
    average: float | Literal["tail"] | None = None


def recipe_of(model: Any, guide: Any, objective: Any = None) -> Recipe:
    """What the guide says of its training, or without one a flow that is trained by matching.

    That is nothing, where it has no ``recipe()``. A flow's is about matching: another objective has none.

    Raises:
        TypeError: If it says it in anything else than a :class:`Recipe`.
    """
    is_matched = objective is None and hasattr(model, "matching_loss")
    trained = model if guide is None and is_matched else guide
    say = getattr(trained, "recipe", None)
    recipe = say() if callable(say) else Recipe()
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"Expected recipe() of {type(trained).__name__} to return a pyro_flowkit.guides.Recipe, "
            f"got {type(recipe).__name__}"
        )
    return recipe
