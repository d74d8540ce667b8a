"""Layers that take their first values from a batch of data, and what they need to know of it.

That a layer has started is read off its parameters; so a layer that was saved, in whatever way, does not start twice.
"""

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from pyro_flowkit.ops.eager import is_plain_eager


class StartsByBatch(nn.Module):
    """The part of such a layer that knows whether it may still start; to be named before its other base."""

    _may_start = True

    def _trains(self, batch: Tensor, *parameters: nn.Parameter) -> bool:
        """Whether these parameters are being trained by a batch, with nobody looking inside."""
        learns = all(parameter.requires_grad for parameter in parameters)
        return learns and self.training and torch.is_grad_enabled() and is_plain_eager(batch)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._may_start = True  # the parameters decide

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_may_start": True}


def moments(rows: Tensor) -> tuple[float, Tensor, Tensor]:
    """How many rows all processes together have, their mean, and the sum of the squared deviations from it."""
    shares = distributed.is_available() and distributed.is_initialized()
    sums = torch.cat([rows.new_tensor([float(len(rows))]), rows.sum(0)])
    if shares:
        distributed.all_reduce(sums)
    count = float(sums[0])
    mean = sums[1:] / count
    squares = (rows - mean).square().sum(0)
    if shares:
        distributed.all_reduce(squares)
    return count, mean, squares
