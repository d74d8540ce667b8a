"""What multiplies a bound, and what a power inside of the weights is: ``poutine.scale`` means either.

Weighted data have a scale around all sites of their datum, model and guide: so many data like this one, as with a
subsampled plate, and that multiplies the bound. A scale around some sites only, as in annealing, is a power of their
densities. A program that has both is told apart by the handlers that are around each site.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor

Scale = Tensor | float


class ScaleRecorder(Messenger):
    """Keeps which scales are around the sites of a program, by the name of the site."""

    def __init__(self) -> None:
        super().__init__()
        self.around: dict[str, list[Scale]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        handlers = (handler for handler in _PYRO_STACK if isinstance(handler, ScaleMessenger))
        self.around[msg["name"]] = [handler.scale for handler in handlers]


def shared_by_all(scales: Sequence[Sequence[Scale]]) -> list[Scale]:
    """The scales that are around every site, by value."""
    first, *rest = scales
    shared = list(first)
    for own in rest:
        left = list(own)
        kept = []
        for scale in shared:
            index = next((i for i, other in enumerate(left) if are_same(scale, other)), None)
            if index is not None:
                left.pop(index)
                kept.append(scale)
        shared = kept
    return shared


def are_same(one: Scale, other: Scale) -> bool:
    """Whether two scales have one value."""
    if one is other:
        return True
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return math.isclose(one, other)
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    if one.dim() and other.dim() and one.shape != other.shape:
        return False
    return bool(torch.isclose(one.double(), other.double()).all())


def quotient(scale: Scale, outer: Scale) -> Scale:
    """What is left inside of a weight."""
    return 1.0 if are_same(scale, outer) else scale / outer


def is_per_datum(scale: Scale, dims: Collection[int]) -> bool:
    """Whether a scale is one number for each datum of plates of these dimensions."""
    shape = scale.shape if isinstance(scale, Tensor) else ()
    return all(size == 1 or dim - len(shape) in dims for dim, size in enumerate(shape))
