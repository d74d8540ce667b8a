"""In-memory rows: checked, split, and cut into batches by index.

Indexing a tensor costs microseconds where a DataLoader costs more than many SVI steps. The order of
the rows is a function of (seed, epoch) alone, so there is no sampler state to save.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_rows(data: Any, name: str = "data") -> tuple[torch.Tensor, ...]:
    """Checks data and returns it as a tuple of tensors with one common length.

    Args:
        data: A tensor of shape `(N, ...)` or a non-empty tuple or list of such tensors.
        name: What to call it in error messages.

    Raises:
        TypeError: If it is neither a tensor nor a tuple of tensors.
        ValueError: If a tensor has no rows or the lengths differ.
    """
    rows = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    for tensor in rows:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"expected {name} to be a tensor or a tuple of tensors, got {type(tensor).__name__}"
            )
    if not rows:
        raise ValueError(f"expected {name} to hold at least one tensor, got an empty tuple")
    lengths = [tensor.shape[0] if tensor.dim() else 0 for tensor in rows]
    if min(lengths) < 1 or len(set(lengths)) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in rows)
        raise ValueError(f"expected {name} with one common, non-zero length, got shapes {shapes}")
    return rows


def split_rows(
    rows: tuple[torch.Tensor, ...], fraction: float, seed: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Splits rows at random into a training part and a validation part.

    Args:
        rows: Tensors with `N` rows each.
        fraction: Share of the rows that goes to validation, in (0, 1).
        seed: Seed of the permutation.

    Returns:
        `(training rows, validation rows)`, of `N - round(fraction * N)` and `round(fraction * N)`.

    Raises:
        ValueError: If either part would be empty.
    """
    total = len(rows[0])
    held_out = round(fraction * total)
    if not 0 < held_out < total:
        raise ValueError(
            f"expected val_fraction to leave rows in both parts, got {fraction} of {total} rows"
        )
    order = torch.from_numpy(np.random.default_rng((seed, 2**31)).permutation(total))
    train = tuple(tensor[order[held_out:].to(tensor.device)] for tensor in rows)
    return train, tuple(tensor[order[:held_out].to(tensor.device)] for tensor in rows)


class Batches:
    """Batches of rows by step number; row order is a function of (seed, epoch).

    Each epoch visits `steps_per_epoch * batch_size` rows in a fresh random order and leaves out the
    remainder, so that every batch has the same shape.

    Args:
        rows: Tensors with `N` rows each; the empty tuple means a model without data.
        batch_size: Rows per batch; None or `N` gives all rows, in their own order.
        seed: Non-negative seed.
    """

    def __init__(self, rows: tuple[torch.Tensor, ...], batch_size: int | None, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.size = len(rows[0]) if rows else 0
        if batch_size is not None and not rows:
            raise ValueError(f"expected data for batch_size={batch_size}, got none")
        if batch_size is not None and not 1 <= batch_size <= self.size:
            raise ValueError(
                f"expected batch_size between 1 and len(data) = {self.size}, got {batch_size}"
            )
        self.batch_size = batch_size or self.size
        self.minibatched = self.batch_size < self.size
        self.steps_per_epoch = self.size // self.batch_size if rows else 1
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        """The batch of a step, counted from 0 over all epochs."""
        if not self.minibatched:
            return self.rows
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.from_numpy(
                np.random.default_rng((self.seed, epoch)).permutation(self.size)
            ).to(self.rows[0].device)
            self._epoch = epoch
        index = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        return tuple(tensor[index] for tensor in self.rows)
