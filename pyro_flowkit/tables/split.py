"""Which rows train, which choose, and which are kept for the end."""

from dataclasses import dataclass

import numpy as np

from pyro_flowkit.tables.errors import TableError

TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_rows(count: int, columns: int, seed: int) -> Split:
    """80 % of the rows to train, 10 % to validate and 10 % to test, by ``numpy.random.default_rng(seed)``.

    Raises:
        TableError: if the training part is too small for a covariance of so many columns.
    """
    order = np.random.default_rng(seed).permutation(count)
    first = int(TRAIN_SHARE * count)
    second = int((TRAIN_SHARE + VALIDATION_SHARE) * count)
    if first < columns + 2:
        least = int(np.ceil((columns + 2) / TRAIN_SHARE))
        raise TableError(
            f"Expected at least {least} rows for {columns} columns, got {count}: choose fewer (columns)"
        )
    return Split(order[:first], order[first:second], order[second:])
