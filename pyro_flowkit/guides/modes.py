"""Where the best Gaussian is looked for: around several starts, some of which may lead to other modes than the first.

The search is that of :mod:`pyro_flowkit.guides.gaussian` with few draws and a diagonal scale, from all starts side by
side: the ELBO is a bound on the mass around a mode. The height of a mode says nothing of its mass, and goes to infinity
in the funnel of a hierarchical model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.guides.gaussian import Density, Gaussian
from pyro_flowkit.guides.side_by_side import minimized_together
from pyro_flowkit.ops.quasi_random import normal_draws

FEW_EVALUATIONS = 40
POINTS_BETWEEN = 15
SEPARATE = 5.0  # nats by which the density falls between two modes
COMPARABLE = 3.0  # nats; a twentieth of the mass
NEGLIGIBLE = 7.0  # nats; a thousandth of it
NOTHING = 50.0  # nats; below that a search has got stuck


@dataclass(frozen=True)
class Mode:
    """A diagonal Gaussian and its ELBO in nats."""

    gaussian: Gaussian
    elbo: float


def modes(
    density: Density, starts: Sequence[Tensor], scale: float, *, deadline: Deadline
) -> list[Mode]:
    """The Gaussians that are found from these starts, each around a mode of its own; that of the largest ELBO first.

    Args:
        density: unnormalised log-density of points ``(n, D)``, shape ``(n,)``, differentiable.
        starts: locations, shapes ``(D,)``.
        scale: initial standard deviation of every dimension.
        deadline: after which the search ends with what it has.

    Returns:
        At least one; none where a search got stuck far below the best.
    """
    size = starts[0].shape[-1]
    draws = normal_draws(max(8, min(size, 32)), starts[0], seed=3)
    judges = normal_draws(64, starts[0], seed=4)
    first = torch.stack(list(starts))

    def gaussians(parameters: Tensor) -> tuple[Tensor, Tensor]:
        m, log_scale = parameters.chunk(2, dim=-1)
        return first + scale * m, scale * log_scale.exp()

    def losses(parameters: Tensor) -> Tensor:
        loc, sd = gaussians(parameters)
        points = loc[:, None] + sd[:, None] * draws
        log_prob = density(points.reshape(-1, size)).reshape(len(loc), -1)
        return -log_prob.mean(-1) - sd.log().sum(-1)

    start = first.new_zeros(len(first), 2 * size)
    found = minimized_together(losses, start, FEW_EVALUATIONS, deadline)
    each = [Gaussian(loc, sd) for loc, sd in zip(*gaussians(found), strict=True)]
    judged = [Mode(gaussian, gaussian.elbo(density, judges)) for gaussian in each]
    lowest = max(mode.elbo for mode in judged) - NOTHING
    return separate(density, [mode for mode in judged if mode.elbo >= lowest])


def separate(density: Density, found: Sequence[Mode]) -> list[Mode]:
    """Those that are apart from all larger ones; the largest first."""
    kept: list[Mode] = []
    for mode in sorted(found, key=lambda mode: -mode.elbo):
        if all(is_apart(density, mode, other) for other in kept):
            kept.append(mode)
    return kept


def comparable(found: Sequence[Mode], within: float = COMPARABLE) -> list[Mode]:
    """Those whose mass is a share of the first one's that counts: less by so many nats."""
    return [found[0], *(mode for mode in found[1:] if mode.elbo > found[0].elbo - within)]


def spread(found: Sequence[Mode], count: int) -> list[Mode]:
    """One mode for each of so many components, in the order of their mass.

    Where there are fewer that have any mass to speak of, components share the first: moved apart by half a standard
    deviation, or they would stay alike, and with equal parts of its mass.
    """
    own = comparable(found, NEGLIGIBLE)[:count]
    sharing = count - len(own) + 1
    first = Mode(own[0].gaussian, own[0].elbo - math.log(sharing))
    moved = [_moved(first, seed) for seed in range(sharing - 1)]
    return [first, *moved, *own[1:]]


def _moved(mode: Mode, seed: int) -> Mode:
    gaussian, generator = mode.gaussian, torch.Generator().manual_seed(seed)
    direction = torch.randn(len(gaussian.loc), generator=generator, dtype=torch.float64)
    step = (0.5 * direction / direction.norm()).to(gaussian.loc)
    return Mode(Gaussian(gaussian.transform(step), gaussian.scale), mode.elbo)


@torch.no_grad()
def is_apart(density: Density, mode: Mode, other: Mode) -> bool:
    """Whether the density falls between two Gaussians, on a line from one location to the other.

    Two that are near each other are one: in many dimensions a line leaves a narrow ridge.
    """
    if not math.isfinite(mode.elbo):
        return False
    first, second = mode.gaussian, other.gaussian
    distance = (first.loc - second.loc).abs() / (first.scale + second.scale)
    if float(distance.max()) < 2.0:
        return False
    along = torch.linspace(0.0, 1.0, POINTS_BETWEEN).to(first.loc)[:, None]
    heights = density(first.loc + along * (second.loc - first.loc))
    lower = torch.minimum(heights[0], heights[-1])
    return bool(heights.nan_to_num(nan=-math.inf).min() < lower - SEPARATE)
