"""Rows in memory as batches for another trainer, which can go on in the midst of an epoch."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from pyro_flowkit.training.data import RowBatches, as_rows


class RowLoader:
    """Training batches of rows in memory for Lightning's ``Trainer``, which can go on in the midst of an epoch.

    The order of the rows is a function of (seed, epoch), as in ``fit``. A remainder of fewer than ``batch_size`` rows
    is left out of the epoch.

    Args:
        data: Tensor with ``N`` rows, or a tuple of such tensors.
        batch_size: Rows per batch, over all processes; each takes its part. Default all rows.
        seed: Non-negative seed.

    Raises:
        ValueError: If the batch size does not fit the rows.
    """

    def __init__(
        self, data: Tensor | tuple[Tensor, ...], batch_size: int | None = None, *, seed: int = 0
    ) -> None:
        self._rows = as_rows(data)
        self._batch_size, self._seed = batch_size, seed
        self._per_epoch = RowBatches(self._rows, batch_size, seed).steps_per_epoch
        self._epoch = self._given = self._start = 0
        self.batch_sampler = SimpleNamespace(sampler=self)  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        part = (0, 1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            part = torch.distributed.get_rank(), torch.distributed.get_world_size()
        batches = RowBatches(self._rows, self._batch_size, self._seed, part)
        start, self._start = self._start, 0
        for number in range(start, self._per_epoch):
            self._given = number + 1
            yield batches[self._epoch * self._per_epoch + number]

    def state_dict(self) -> dict[str, int]:
        """The number of batches given in this epoch."""
        return {"given": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next epoch begin after so many batches."""
        self._start = state["given"] % self._per_epoch
