"""How :func:`pyro_flowkit.fit` and guides that watch their own steps get along.

A recipe has a rate for every part of a guide: then the guide leaves its steps to it. With a rate or an optimizer of the
caller's the guide sees to its steps here as in any other loop, but right after each of them, so that what is judged,
averaged and saved is where it really stands. The gradients that it hands out, and their norm, are in units of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyro_flowkit.guides.component import look_all
from pyro_flowkit.guides.pace import Pace


@contextmanager
def paced(guide: Any, optimizer: torch.optim.Optimizer, *, by_recipe: bool) -> Iterator[None]:
    """Have the guides in ``guide`` follow a recipe's rates, or look after every step of the optimizer, for a while."""
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    paces = [part for part in parts if isinstance(part, Pace)]

    def look(*_: Any) -> None:
        look_all(paces)

    for pace in paces:
        pace.is_resting = by_recipe
    handle = optimizer.register_step_post_hook(look)
    try:
        yield
    finally:
        handle.remove()
        for pace in paces:
            pace.is_resting = False
            pace.forget()
