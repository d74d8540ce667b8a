r"""Angles among the latents of a guide: one turn of each, cut where the posterior has least of its mass.

Pyro's angular distributions (``VonMises``, ``SineBivariateVonMises``, ``SineSkewed``) have the real line as their
support and a density that repeats itself at every turn. A guide on the real line can then spread over more and more
turns, each of which it counts as new volume: its ELBO grows without limit and is no bound on the evidence. Here, the
last layer of the guide takes an angle's line y to one turn around a centre c,

    theta = c + pi erf(w / (2 sqrt(pi))),        w = y - c,        log dtheta/dy = -w^2 / (4 pi),

so that the ELBO is a bound again. Near c this is the identity, which a narrow posterior hardly notices; the uniform
distribution on the circle is a normal one in y, with standard deviation sqrt(2 pi). At ``c +- pi`` the circle is cut;
the density need not agree on both sides of the cut, which costs little where little of the mass is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.transforms.affine import Affine, AffineKind
from pyro_flowkit.transforms.base import Bijection

ANGULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
TURN = 2.0 * math.pi
NUM_ANGLES = 32
MAX_SEARCHED = 16  # angles whose cut is searched for; others keep it opposite to where they start
SHARPNESS = 4

_WIDTH = 2.0 * math.sqrt(math.pi)


@dataclass(frozen=True)
class Cut:
    """Where the angles among the latents are cut, and where a guide starts.

    Attributes:
        columns: of the unconstrained latents that are angles.
        centre: opposite to the cuts, shape ``(len(columns),)``.
        loc: of all latents, shape ``(D,)``; its angles lie within half a turn of the centres.
    """

    columns: list[int]
    centre: Tensor
    loc: Tensor

    def line_loc(self) -> Tensor:
        """``loc`` with its angles taken back to their lines."""
        edge = 1.0 - math.sqrt(torch.finfo(self.loc.dtype).eps)
        part = ((self.loc[self.columns] - self.centre) / math.pi).clamp(-edge, edge)
        lines = self.loc.clone()
        lines[self.columns] = self.centre + _WIDTH * torch.erfinv(part)
        return lines


class CircularAffine(Affine):
    """An :class:`~pyro_flowkit.transforms.affine.Affine` map that then takes some columns to one turn of a circle.

    Args:
        cut: which columns are angles, where they are cut, and the initial location of all.
        scale: initial scale of every dimension, positive.
        kind: "full", "diagonal" or "low_rank".

    The inverse takes an angle by whole turns to the one around its centre first.
    """

    centre: Tensor
    columns: Tensor
    pushed_derivative = Bijection.pushed_derivative  # the parent's knows nothing of the turn

    def __init__(self, cut: Cut, scale: float, kind: AffineKind):
        super().__init__(cut.line_loc(), scale, kind)
        columns = torch.tensor(cut.columns, device=cut.loc.device)
        self.register_buffer("centre", cut.centre.detach().clone())
        self.register_buffer("columns", columns, persistent=False)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = super().call_and_ladj(x)
        theta, own_ladj = self.turn(y)
        return theta, ladj + own_ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        centre = self.centre.to(y.dtype)
        offset = _within_half_a_turn(y[..., self.columns] - centre)
        edge = 1.0 - torch.finfo(y.dtype).eps
        w = _WIDTH * torch.erfinv((offset / math.pi).clamp(-edge, edge))
        flat = y.index_copy(-1, self.columns, centre + w)
        x, ladj = super().inverse_and_ladj(flat)
        return x, ladj + (w / _WIDTH).square().sum(-1)

    def turn(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The last step alone: from lines to one turn each, shape ``(*batch, D)``, with its log-det ``(*batch,)``."""
        centre = self.centre.to(y.dtype)
        w = (y[..., self.columns] - centre) / _WIDTH
        theta = y.index_copy(-1, self.columns, centre + math.pi * torch.erf(w))
        return theta, -w.square().sum(-1)

    @torch.no_grad()
    def cut_anew(self, density: Callable[[Tensor], Tensor]) -> None:
        """Cut where a log density has least of its mass, and start at its modes; the scale stays."""
        scale = self.scale if self.kind == "full" else self.scale.diagonal()
        now = self.turn(self.loc)[0]
        cut = best_cut(density, now, self.columns.tolist())
        self.centre.copy_(cut.centre)
        self.restart(cut.line_loc(), scale)

    def flat_density(self, density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A log density of angles as one of lines."""

        def flat(y: Tensor) -> Tensor:
            theta, ladj = self.turn(y)
            return density(theta) + ladj

        return flat


def angular_columns(guide: Any) -> list[int]:
    """Columns of the unconstrained latents whose prior is angular; for a prototype with its distributions."""
    columns: list[int] = []
    start = 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        size = guide._unconstrained_shapes[name].numel()
        fn = site["fn"]
        while not isinstance(fn, ANGULAR) and hasattr(fn, "base_dist"):
            if isinstance(fn, torch.distributions.TransformedDistribution):
                break
            fn = fn.base_dist
        if isinstance(fn, ANGULAR):
            columns += range(start, start + size)
        start += size
    if guide.idle is None:
        return columns
    place = {column: i for i, column in enumerate(guide.idle.columns.tolist())}
    return [place[column] for column in columns if column in place]


def periodic_columns(
    density: Callable[[Tensor], Tensor], loc: Tensor, columns: list[int]
) -> list[int]:
    """Those of the columns that the whole model takes to be angles: a turn does not change its density."""
    points = [loc.index_add(-1, _index(column, loc), loc.new_tensor([TURN])) for column in columns]
    values = _one_by_one(density, torch.stack([loc, *points]))
    tolerance = math.sqrt(torch.finfo(loc.dtype).eps)
    same = torch.isclose(values[1:], values[:1], rtol=tolerance, atol=tolerance)
    return [column for column, is_same in zip(columns, same.tolist(), strict=True) if is_same]


def best_cut(density: Callable[[Tensor], Tensor], loc: Tensor, columns: list[int]) -> Cut:
    """Search the cuts and the modes of angles, one angle after the other, with all other latents as they are.

    Args:
        density: log density of points ``(n, D)``.
        loc: of all latents, shape ``(D,)``.
        columns: those that are angles.
    """
    loc = loc.clone()
    centre = loc[columns].clone()
    grid = torch.arange(NUM_ANGLES).to(loc) * (TURN / NUM_ANGLES)
    near = (0.5 + 0.5 * (grid[:, None] - grid).cos()) ** SHARPNESS
    for i, column in enumerate(columns[:MAX_SEARCHED]):
        angles = loc[column] + grid - math.pi
        points = loc.repeat(NUM_ANGLES, 1)
        points[:, column] = angles
        profile = _one_by_one(density, points).nan_to_num(nan=-math.inf)
        if not bool(profile.max().isfinite()):
            continue
        mass = near @ profile.softmax(-1)
        centre[i] = _within_half_a_turn(angles[mass.argmin()] + math.pi)
        loc[column] = centre[i] + _within_half_a_turn(angles[profile.argmax()] - centre[i])
    return Cut(columns, centre, loc)


@torch.no_grad()
def _one_by_one(density: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Log densities with the same random numbers for each, where the model draws some."""
    values = []
    for point in points:
        with fixed_seed(points.device):
            values.append(density(point[None])[0])
    return torch.stack(values)


def _within_half_a_turn(angle: Tensor) -> Tensor:
    return angle - TURN * (angle / TURN).round()


def _index(column: int, like: Tensor) -> Tensor:
    return torch.tensor([column], device=like.device)
