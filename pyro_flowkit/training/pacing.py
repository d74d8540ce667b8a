"""How :func:`pyro_flowkit.fit` gets along with guides and flows that watch their own steps.

A recipe has a rate for every part of a guide: then the guide leaves its steps to it. With a rate or an optimizer of the
caller's they see to their steps here as in any other loop, but right after each of them, so that what is judged,
averaged and saved is where it really stands. The gradients that it hands out, and their norm, are in units of its own.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyro_flowkit.guides.component import look_all
from pyro_flowkit.guides.pace import Pace
from pyro_flowkit.moves import Moves


@contextmanager
def paced(
    modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, *, by_recipe: bool
) -> Iterator[None]:
    """Have what is in ``modules`` follow a recipe's rates, or look after every step of the optimizer, for a while."""
    parts = {part: None for module in modules for part in module.modules()}
    watching = [part for part in parts if isinstance(part, Moves)]

    def look(*_: Any) -> None:
        look_all(part for part in watching if isinstance(part, Pace))
        for part in watching:
            if not isinstance(part, Pace):
                part.look()

    for part in watching:
        part.is_resting = by_recipe
    handle = optimizer.register_step_post_hook(look)
    try:
        yield
    finally:
        handle.remove()
        for part in watching:
            part.is_resting = False
            part.forget()
