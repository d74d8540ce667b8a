"""Where the batches of a fit come from: tensors in memory, a DataLoader, or a function of the step.

Indexing a tensor costs microseconds where a DataLoader costs more than many SVI steps. The order of rows in memory is a
function of (seed, epoch) alone, so there is no sampler state to save.

The three kinds of batches have in common

    batches[step]           the batch of a step, counted from 0 over all epochs
    size                    number of data that they are taken from; None where unknown
    minibatched             whether a batch is only a part of them
    steps_per_epoch         None where there are no epochs, or their length is unknown
    state_dict()            what it takes, beside the step, to go on with the next batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pyro_flowkit.training.state import random_state, set_random_state

Batch = tuple[torch.Tensor, ...]
Device = torch.device | None


def as_rows(data: Any, name: str = "data") -> Batch:
    """Checks data and returns it as a tuple of tensors with one common length.

    Args:
        data: A tensor of shape ``(N, ...)`` or a non-empty tuple or list of such tensors.
        name: What to call it in error messages.

    Raises:
        TypeError: If it is neither a tensor nor a tuple of tensors.
        ValueError: If a tensor has no rows or the lengths differ.
    """
    rows = as_batch(data, name)
    if not rows:
        raise ValueError(f"Expected {name} to hold at least one tensor, got an empty tuple")
    lengths = [tensor.shape[0] if tensor.dim() else 0 for tensor in rows]
    if min(lengths) < 1 or len(set(lengths)) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in rows)
        raise ValueError(f"Expected {name} with one common, non-zero length, got shapes {shapes}")
    return rows


def as_batch(data: Any, name: str, device: Device = None) -> Batch:
    """A tensor, or a tuple or list of tensors, as a tuple of tensors on a device.

    Raises:
        TypeError: If it is anything else.
    """
    tensors = tuple(data) if isinstance(data, tuple | list) else (data,)
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"Expected {name} to be a tensor or a tuple of tensors, got {type(tensor).__name__}"
            )
    return tensors if device is None else tuple(tensor.to(device) for tensor in tensors)


def split_rows(rows: Batch, fraction: float, seed: int) -> tuple[Batch, Batch]:
    """Splits rows at random into a training part and a validation part.

    Args:
        rows: Tensors with ``N`` rows each.
        fraction: Share of the rows that goes to validation, in (0, 1).
        seed: Seed of the permutation.

    Returns:
        ``(training rows, validation rows)``, of ``N - round(fraction * N)`` and ``round(fraction * N)``.

    Raises:
        ValueError: If either part would be empty.
    """
    total = len(rows[0])
    held_out = round(fraction * total)
    if not 0 < held_out < total:
        raise ValueError(
            f"Expected val_fraction to leave rows in both parts, got {fraction} of {total} rows"
        )
    order = torch.from_numpy(np.random.default_rng((seed, 2**31)).permutation(total))
    train = tuple(tensor[order[held_out:].to(tensor.device)] for tensor in rows)
    return train, tuple(tensor[order[:held_out].to(tensor.device)] for tensor in rows)


class RowBatches:
    """Batches of rows in memory; their order is a function of (seed, epoch).

    Each epoch visits ``steps_per_epoch * batch_size`` rows in a fresh random order and leaves out the
    remainder, so that every batch has the same shape.

    Args:
        rows: Tensors with ``N`` rows each; the empty tuple means a model without data.
        batch_size: Rows per batch; None or ``N`` gives all rows, in their own order.
        seed: Non-negative seed.
        part: ``(number, count)``: the part of every minibatch that this process takes.

    Raises:
        ValueError: If the batch size does not fit the rows or the number of parts.
    """

    def __init__(
        self, rows: Batch, batch_size: int | None, seed: int, part: tuple[int, int] = (0, 1)
    ) -> None:
        self.rows = rows
        self.seed = seed
        self.size = len(rows[0]) if rows else 0
        if batch_size is not None and not rows:
            raise ValueError(f"Expected data for batch_size={batch_size}, got none")
        if batch_size is not None and not 1 <= batch_size <= self.size:
            raise ValueError(
                f"Expected batch_size between 1 and len(data) = {self.size}, got {batch_size}"
            )
        self.batch_size = batch_size or self.size
        self.minibatched = self.batch_size < self.size
        number, count = part
        if self.minibatched and self.batch_size % count:
            raise ValueError(
                f"Expected batch_size to be a multiple of the number of processes, {count}, got {self.batch_size}"
            )
        self._share = self.batch_size // count
        self._offset = number * self._share
        self.steps_per_epoch: int = self.size // self.batch_size if rows else 1
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Batch:
        if not self.minibatched:
            return self.rows
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.from_numpy(
                np.random.default_rng((self.seed, epoch)).permutation(self.size)
            ).to(self.rows[0].device)
            self._epoch = epoch
        start = position * self.batch_size + self._offset
        index = self._order[start : start + self._share]
        return tuple(tensor.index_select(0, index) for tensor in self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class LoaderBatches:
    """The batches of a DataLoader, epoch after epoch.

    A loader says nothing of where it is. It decides about an epoch's order when it begins, though, by the random
    numbers of that moment: with these it begins again, and gives the same batches, to be skipped.

    Args:
        loader: Gives tensors, or tuples or lists of tensors.
        device: Where to put them; None leaves them.
    """

    def __init__(self, loader: DataLoader, device: Device = None) -> None:
        self._loader, self._device = loader, device
        self.size = _length(loader.dataset)
        self.steps_per_epoch = _length(loader)
        self.minibatched = self.steps_per_epoch != 1
        self._iterator: Iterator[Any] = iter(())
        self._random: dict[str, Any] | None = None  # when the epoch began
        self._own_random: list[torch.Tensor] = []
        self._epoch = 0  # epochs begun
        self._position = 0  # batches taken in this epoch
        self._held: tuple[int, Batch] | None = None
        self.check: Callable[[Batch, str], None] | None = None  # of the batches of the first epoch

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; steps are asked for in their order, the last one again if need be.

        Raises:
            ValueError: If the loader has no batches, or one of the first epoch does not pass the check.
        """
        if self._held is None or self._held[0] != step:
            batch = next(self._iterator, None)
            if batch is None:
                self._begin()
                batch = next(self._iterator, None)
            if batch is None:
                raise ValueError("Expected a DataLoader with at least one batch, got none")
            self._position += 1
            self._held = step, as_batch(batch, "every batch of the DataLoader", self._device)
            if self.check is not None and self._epoch == 1:
                self.check(self._held[1], f"batch {self._position - 1} of the DataLoader")
        return self._held[1]

    def _begin(self) -> None:
        self._random, self._position = random_state(), 0
        self._own_random = [generator.get_state() for generator in self._generators()]
        for part in self._parts():
            if hasattr(part, "set_epoch"):  # of several processes, each of which takes its share
                part.set_epoch(self._epoch)
        self._epoch += 1
        self._iterator = iter(self._loader)

    def _parts(self) -> list[Any]:
        """The loader and whatever chooses rows for it."""
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        inner = getattr(batch_sampler, "sampler", None)
        parts = (self._loader, self._loader.sampler, batch_sampler, inner)
        return list({id(part): part for part in parts}.values())

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in self._parts()]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def state_dict(self) -> dict[str, Any]:
        return {
            "random": self._random,
            "own_random": self._own_random,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where an earlier fit was; the states of the random number generators change.

        Raises:
            ValueError: If the loader has fewer batches than were taken.
        """
        self._held = None
        self._iterator = iter(())
        if state["random"] is None:
            return
        set_random_state(state["random"])
        for generator, own in zip(self._generators(), state["own_random"], strict=True):
            generator.set_state(own)
        self._epoch = state["epoch"] - 1
        self._begin()
        self._position = sum(1 for _ in islice(self._iterator, state["position"]))
        if self._position < state["position"]:
            raise ValueError(
                f"Expected a DataLoader with at least {state['position']} batches as in the checkpoint, got "
                f"{self._position}"
            )


class FunctionBatches:
    """Batches that a function of the step makes.

    Args:
        function: From the step, counted from 0, to a tensor or a tuple of tensors.
        device: Where to put them; None leaves them.
    """

    size = None
    steps_per_epoch = None
    minibatched = True

    def __init__(self, function: Callable[[int], Any], device: Device = None) -> None:
        self._function, self._device = function, device
        self._held: tuple[int, Batch] | None = None

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, which is made once."""
        if self._held is None or self._held[0] != step:
            try:
                made = self._function(step)
            except StopIteration:
                raise ValueError(
                    f"Expected data(step) to give a batch for every step, got StopIteration at step {step}: limit the "
                    f"fit, max_steps={step}, or begin anew"
                ) from None
            self._held = step, as_batch(made, f"data({step})", self._device)
        return self._held[1]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


Batches = RowBatches | LoaderBatches | FunctionBatches


def open_batches(
    data: Any,
    val_data: Any,
    val_fraction: float,
    batch_size: int | None,
    seed: int,
    device: Device,
    part: tuple[int, int],
    *,
    wish: int | None = None,
) -> tuple[Batches, Any]:
    """The batches to train on, and what is held out: a tuple of tensors, a DataLoader, or nothing.

    Args:
        data, val_data, val_fraction, batch_size: As ``fit`` has them.
        seed: Of the order of rows, and of the split.
        device: Where to put the batches of a DataLoader or a function; None leaves them.
        part: ``(number, count)``: the part of every minibatch of rows that this process takes.
        wish: Rows of a step where batch_size is None, as far as there are so many.

    Raises:
        TypeError: If data are of the wrong kind.
        ValueError: If they do not fit each other.
    """
    if (val_data is not None or val_fraction) and data is None:
        raise ValueError("Expected data for val_data or val_fraction, got data=None")
    if val_data is not None and val_fraction:
        raise ValueError("Expected either val_data or val_fraction, got both")
    held_out: Any = ()
    if val_data is not None:
        held_out = val_data if isinstance(val_data, DataLoader) else as_rows(val_data, "val_data")
    if isinstance(data, DataLoader) or (callable(data) and not isinstance(data, torch.Tensor)):
        if batch_size is not None or val_fraction:
            raise ValueError(
                f"Expected data in tensors for batch_size and val_fraction, got {type(data).__name__}, "
                f"batch_size={batch_size} and val_fraction={val_fraction}"
            )
        if isinstance(data, DataLoader):
            return LoaderBatches(data, device), held_out
        return FunctionBatches(data, device), held_out
    rows = () if data is None else as_rows(data)
    if isinstance(held_out, tuple) and held_out and len(held_out) != len(rows):
        raise ValueError(f"Expected val_data of {len(rows)} tensors like data, got {len(held_out)}")
    if val_fraction:
        rows, held_out = split_rows(rows, val_fraction, seed)
    if batch_size is None and wish is not None and rows and len(rows[0]) > wish:
        batch_size = wish // part[1] * part[1] or None
    return RowBatches(rows, batch_size, seed, part), held_out


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None
