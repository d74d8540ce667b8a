"""Rows with NaN or infinite numbers, named before a fit trains on them.

No flow has a density for such rows. A program of the user's may mean them, by a mask for one: it then has a density for
a batch with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pyro_flowkit.training.data import Batches, LoaderBatches, RowBatches
from pyro_flowkit.training.faults import caused_by_numbers
from pyro_flowkit.training.losses import Batch, MaximumLikelihood
from pyro_flowkit.training.variational import Variational

REMEDY = "leave these rows out, or mask what is missing (obs_mask)"


def check_finite_rows(rows: Batch, name: str = "data") -> None:
    """Raises a ValueError that names the rows with NaN or infinite numbers, which no flow has a density for."""
    bad = rows_without_numbers(rows)
    if bad:
        raise ValueError(f"Expected finite {name}, got {_in_words(bad, len(rows[0]))}")


def check_rows_of_program(
    loss: MaximumLikelihood | Variational, rows: Batch, name: str = "data", size: int | None = None
) -> None:
    """Raises a ValueError that names the rows with NaN or infinite numbers, unless the program means them.

    Args:
        loss: Of the program, after a first run.
        rows: The data.
        name: What to call them.
        size: Rows of a batch; None: all of them.
    """
    bad = rows_without_numbers(rows)
    others = sorted(set(range(len(rows[0]))) - set(bad)) if bad else []
    if not others:
        return
    size = min(size or len(rows[0]), len(rows[0]))
    as_many = others * -(
        -size // len(others)
    )  # a batch of another size would be another reason to fail
    with_bad, without = (
        tuple(tensor[chosen[:size]] for tensor in rows) for chosen in (bad + others, as_many)
    )
    if not loss.is_finite(with_bad) and loss.is_finite(without):
        raise ValueError(_no_density(rows, bad, name))


def check_rows(
    check: Callable[[Batch, str], None], batches: Batches, first: Batch, held_out: Any
) -> None:
    """Checks all rows that are in memory, and has a DataLoader checked in its first epoch.

    Args:
        check: Of rows and their name; raises.
        batches: Of the training.
        first: The first of them.
        held_out: Rows, a DataLoader, which its validator checks, or nothing.
    """
    rows, name = _known(batches, first)
    if rows:
        check(rows, name)
    if isinstance(held_out, tuple) and held_out:
        check(held_out, "val_data")
    if isinstance(batches, LoaderBatches):
        batches.check = check


@contextmanager
def naming_rows(batches: Batches, first: Batch) -> Iterator[None]:
    """Says which rows have no finite numbers where a first run fails for numbers that are out of place."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        # of a large value, Pyro prints only some numbers
        is_of_numbers = caused_by_numbers(error) or "to be within the support" in str(error)
        rows, name = _known(batches, first)
        bad = rows_without_numbers(rows) if is_of_numbers else []
        if not bad:
            raise
        raise ValueError(_no_density(rows, bad, name)) from error


def rows_without_numbers(rows: Batch) -> list[int]:
    """The rows with NaN or infinite numbers in any of the tensors."""
    bad: set[int] = set()
    for tensor in rows:
        finite = tensor.isfinite().reshape(len(tensor), -1).all(-1)
        bad.update((~finite).nonzero()[:, 0].tolist())
    return sorted(bad)


def _known(batches: Batches, first: Batch) -> tuple[Batch, str]:
    """The rows that are there before training, and what to call them."""
    if isinstance(batches, RowBatches):
        return batches.rows, "data"
    return first, "batch 0 of the DataLoader" if isinstance(batches, LoaderBatches) else "data(0)"


def _no_density(rows: Batch, bad: Sequence[int], name: str) -> str:
    return f"Expected finite {name}, got {_in_words(bad, len(rows[0]))}, at which the model has no density: {REMEDY}"


def _in_words(bad: Sequence[int], count: int) -> str:
    some = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return f"NaN or inf in {len(bad)} of {count} rows: {some}"
