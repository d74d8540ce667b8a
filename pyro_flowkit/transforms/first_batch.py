"""What the layers that are started by their first batch of data need to know of it."""

import torch
import torch.distributed as distributed
from torch import Tensor


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
