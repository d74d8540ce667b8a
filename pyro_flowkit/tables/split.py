"""Which rows train, which choose, and which are kept for the end; copies of a row stay together."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_flowkit.tables.errors import TableError

TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, and for every row of the table that of the first one that it is a copy of."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    copy_of: np.ndarray


def split_rows(count: int, columns: int, seed: int, copy_of: np.ndarray | None = None) -> Split:
    """80 % of the rows to train, 10 % to validate and 10 % to test, by ``numpy.random.default_rng(seed)``.

    Args:
        count: number of rows N.
        columns: number of columns.
        seed: of the order.
        copy_of: for every row the number of the first one with the same values, shape ``(N,)``; None: no copies.

    Raises:
        TableError: if the training part is too small for a covariance of so many columns, or too many rows are copies.
    """
    order = np.random.default_rng(seed).permutation(count)
    first = int(TRAIN_SHARE * count)
    second = int((TRAIN_SHARE + VALIDATION_SHARE) * count)
    if copy_of is None:
        copy_of = np.arange(count)
    else:
        groups = pd.factorize(copy_of[order])[0]
        by_group = np.argsort(groups, kind="stable")
        order, groups = order[by_group], groups[by_group]
        first, second = np.searchsorted(groups, groups[[first, second]])
    different = len(np.unique(copy_of[order[:first]]))
    if different < columns + 2:
        least = int(np.ceil((columns + 2) / TRAIN_SHARE))
        raise TableError(
            f"Expected at least {least} rows for {columns} columns, got {count}: choose fewer (columns)"
            if different == first
            else f"Expected at least {columns + 2} different rows to train, got {different}: most are copies"
        )
    split = Split(order[:first], order[first:second], order[second:], copy_of)
    if not len(split.validation) or not len(split.test):
        raise TableError("Expected different rows to validate and to test, got copies of one row")
    return split


def per_original(values: Tensor, copy_of: np.ndarray) -> Tensor:
    """One value for each row that is no copy, such that mean and standard error are those of rows drawn with copies.

    Args:
        values: of rows, shape ``(N,)``.
        copy_of: of the same rows, as in :class:`Split`.

    Returns:
        Sums over the copies, times the number of originals divided by that of rows, shape ``(originals,)``.
    """
    originals, index = np.unique(copy_of, return_inverse=True)
    sums = values.new_zeros(len(originals)).index_add_(0, torch.from_numpy(index), values)
    return sums * (len(originals) / len(values))
