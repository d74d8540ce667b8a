"""How guides want to be trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How :func:`pyro_flowkit.fit` trains a guide where its caller does not say: plain values.

    Attributes:
        lr: initial learning rate of Adam.
        affine_lr: the same for the parameters of the affine map, which moves ten times as far in a step of a given
            rate; it needs less once it has started at the best Gaussian.
        hierarchy_lr: the same for those of the hierarchical affine map, whose outputs are divided by the square root of
            the number of their terms.
        num_particles: draws of the guide in a step.
        scheduler: name of the learning rate's schedule.
        warmup_steps: over so many first steps the rates rise in a line: Adam's first steps move every parameter by the
            whole rate, whatever its gradient, and would lose much of a start that is nearly right.
        max_steps: optimizer steps.
        gaussian_start: begin at the best Gaussian that is found without noise, and do not end below it.
    """

    lr: float = 3e-3
    affine_lr: float = 9e-4
    hierarchy_lr: float = 6e-3
    num_particles: int = 128
    scheduler: str = "flat_cosine"
    warmup_steps: int = 30
    max_steps: int = 4000
    gaussian_start: bool = True
