"""What a guide over all latents consists of, once or several times: a flow, and the affine maps after it.

An :class:`~pyro_flowkit.guides.AutoSplineFlow` with one component has these parts under its own name. With more, the
further ones are modules of their own, and the guide's density is their mixture (:mod:`pyro_flowkit.guides.mixture`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.pace import FLOW, HIERARCHY, Pace
from pyro_flowkit.guides.posterior import GradientNoise
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine

DEFAULT_INIT_SCALE = 0.1
MAX_BLOCKS = 4


@dataclass(frozen=True)
class Component:
    """The parts of one component.

    Attributes:
        flow: a spline flow.
        hierarchy: location and scale of later sites as functions of earlier ones, if there are several sites.
        affine: the last layer.
        pace: watches the steps of the three.
        noise_squares: what :class:`~pyro_flowkit.guides.posterior.GradientNoise` remembers of its gradients.
    """

    flow: SplineFlow
    hierarchy: HierarchicalAffine | None
    affine: Affine
    pace: Pace
    noise_squares: Tensor

    def layers(self) -> list[Any]:
        """From the base to the unconstrained latents."""
        return layers_of(self.flow, self.hierarchy, self.affine)


def layers_of(flow: SplineFlow, hierarchy: HierarchicalAffine | None, affine: Affine) -> list[Any]:
    """From the base to the unconstrained latents, for the parts of a component."""
    return [*flow.layers, *([] if hierarchy is None else [hierarchy]), affine]


class OtherComponent(nn.Module):
    """Holds the parts of a component that is not the guide's first."""

    _noise_squares: Tensor

    def __init__(self, flow: SplineFlow, hierarchy: HierarchicalAffine | None, affine: Affine):
        super().__init__()
        self.flow, self.hierarchy, self.affine = flow, hierarchy, affine
        self.pace = paced(flow, hierarchy, affine)
        noise = GradientNoise.at_first().to(affine.raw_loc.detach())
        self.register_buffer("_noise_squares", noise, persistent=False)

    @property
    def component(self) -> Component:
        """Its parts."""
        return Component(self.flow, self.hierarchy, self.affine, self.pace, self._noise_squares)


def make_hierarchy(sizes: Sequence[int], like: Tensor) -> HierarchicalAffine | None:
    """The hierarchical map for sites of these sizes, in order; None for a single one."""
    blocks = _blocks([size for size in sizes if size])
    return HierarchicalAffine(blocks).to(like) if len(blocks) > 1 else None


def paced(
    flow: SplineFlow, hierarchy: HierarchicalAffine | None, affine: Any, *, is_active: bool = True
) -> Pace:
    """What watches the steps of a component's parts."""
    layers: list[Any] = [(flow, FLOW)]
    if hierarchy is not None:
        layers.append((hierarchy, HIERARCHY))
    return Pace(affine, layers, is_active=is_active)


def check_start(init_scale: float | None, base: str) -> None:
    """Raise a ValueError for settings that no guide has: the scale at first, and the base."""
    if init_scale is not None and not (isinstance(init_scale, float) and init_scale > 0):
        raise ValueError(f"Expected init_scale to be a float > 0, got {init_scale!r}.")
    if base not in ("normal", "student_t"):
        raise ValueError(f'Expected base to be "normal" or "student_t", got {base!r}.')


def look_all(paces: Iterable[Pace]) -> None:
    """Have all components of a guide shorten what the optimizer has done; what had no gradient has not moved.

    A component that was not drawn in a step has none, and momentum alone would carry it past its limits.
    """
    paces = list(paces)
    pending = [pace for pace in paces if pace.is_pending]
    for pace in paces:
        pace.look(others_stepped=any(other is not pace for other in pending))


def _blocks(sizes: Sequence[int]) -> list[int]:
    """Sizes of at most MAX_BLOCKS blocks of adjacent sites: the largest sites begin new ones."""
    largest = sorted(range(1, len(sizes)), key=lambda i: -sizes[i])[: MAX_BLOCKS - 1]
    cuts = [0, *sorted(largest), len(sizes)]
    return [sum(sizes[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
