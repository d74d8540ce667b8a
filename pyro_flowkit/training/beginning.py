"""Before the first step: a guide that knows of a good place goes there, and all processes begin at the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro

from pyro_flowkit.guides.protocols import StartingGuide, StartingPoint
from pyro_flowkit.training.losses import MaximumLikelihood
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.variational import Variational

SHARE_FOR_SEARCH = 0.9  # of max_seconds, where it needs so much: without it a flow gets no farther


@dataclass(frozen=True)
class Beginning:
    """Where training begins.

    Attributes:
        start: What leads back there; None where the guide has no place of its own.
        is_interrupted: Whether Ctrl-C ended the search.
    """

    start: StartingPoint | None = None
    is_interrupted: bool = False


def begin(
    loss: MaximumLikelihood | Variational,
    guide: StartingGuide | None,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    max_seconds: float | None,
    earlier: Mapping[str, Any] | None,
    ranks: Ranks,
    seed: int,
) -> Beginning:
    """Has the guide look for its start, or takes that of the checkpoint; all processes get that of the first one.

    Args:
        loss: What is trained.
        guide: One that sees all of the data at every step; None where there is nothing to look for.
        inputs, kwargs: Of model and guide.
        max_seconds: Of the fit.
        earlier: The content of the checkpoint that the fit goes on from.
        ranks: The processes that share the fit.
        seed: Of the fit; the noise of the other processes is made from it.

    Raises:
        ValueError: If no parameter is trainable.
    """
    found = None if earlier is None else earlier["start"]
    beginning = Beginning()
    if guide is not None and (earlier is None or found):
        seconds = None if max_seconds is None else SHARE_FOR_SEARCH * max_seconds
        try:
            start = guide.find_start(loss.model, inputs, kwargs, max_seconds=seconds, found=found)
            beginning = Beginning(start)
        except KeyboardInterrupt:
            beginning = Beginning(is_interrupted=True)
    if not loss.parameters():
        raise ValueError("Expected at least one trainable parameter in model or guide, got none")
    if ranks.count == 1:
        return beginning
    ranks.broadcast(loss.tensors().values())
    if beginning.start is not None and earlier is None:  # each process has searched for itself
        beginning.start.take_over()
    if ranks.number > 0:
        noise = np.random.SeedSequence([seed, ranks.number]).generate_state(1)
        pyro.set_rng_seed(int(noise[0]))
    return beginning
