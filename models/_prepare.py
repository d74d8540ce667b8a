"""From a name to rows that a model can be trained on: loading, dequantising, binarising.

Images hold integer levels. A density on them needs noise: with u uniform on [0, 1) per pixel, the
log-density of x + u on the scale of the levels is, on average over u, a lower bound of the
log-probability of the integers x, so nats and bits per dimension mean the same for every model.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import data
from models.data import Dataset
from pyro_flowkit.preprocessing import dequantize

FAST_ROWS = 300


def load(
    name: str,
    *,
    key: str | None = None,
    min_distinct: float = 0.0,
    rows: int | None = None,
) -> Dataset:
    """Digits, a table of scikit-learn, or a file: csv, npy, npz or idx.

    Args:
        name: "digits", one of ``models.data.TABLES``, or a path.
        key: array to take from an npz file that holds several.
        min_distinct: see ``models.data.table_from_file``.
        rows: keep at most this many training rows, and a tenth of it for validation and test each.

    Raises:
        FileNotFoundError: if the name is neither known nor a file.
        ValueError: if the file holds something else.
    """
    if name == "digits":
        dataset = data.digits()
    elif name in data.TABLES:
        dataset = data.table(name)
    elif not Path(name).is_file():
        known = ", ".join(["digits", *data.TABLES])
        raise FileNotFoundError(f"Expected one of {known}, or a file, got {name!r}")
    elif _holds_images(Path(name), key):
        dataset = data.images_from_file(name, key=key)
    else:
        dataset = data.table_from_file(name, key=key, min_distinct=min_distinct)
    return dataset if rows is None else _head(dataset, rows)


def _holds_images(path: Path, key: str | None) -> bool:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            first = key if key in arrays else next(iter(arrays))
            return arrays[first].ndim == 3
    return path.suffix not in (".csv", ".npy", ".txt")


def _head(dataset: Dataset, rows: int) -> Dataset:
    few = max(2, rows // 10)
    return replace(
        dataset, train=dataset.train[:rows], val=dataset.val[:few], test=dataset.test[:few]
    )


def dequantized(dataset: Dataset, *, copies: int = 1, seed: int = 0) -> Dataset:
    """Levels with uniform noise, ``x + u``, on the scale of the levels.

    Args:
        dataset: rows of integers with ``levels``.
        copies: how often the training rows are repeated, each time with noise of its own; the noise
            of validation and test rows is drawn once.
        seed: seed of the noise.

    Raises:
        ValueError: if the data have no levels, or ``copies`` is no positive number.
    """
    levels = dataset.levels
    if levels is None:
        raise ValueError(f"Expected data of integer levels, got {dataset.name} without levels")
    if copies < 1:
        raise ValueError(f"Expected copies >= 1, got {copies}")
    generator = torch.Generator().manual_seed(seed)

    def noisy(rows: Tensor) -> Tensor:
        return levels * dequantize(rows, levels, generator=generator)[0]

    # test rows first: their noise must not depend on how many copies are made
    test, val = noisy(dataset.test), noisy(dataset.val)
    train = torch.cat([noisy(dataset.train) for _ in range(copies)])
    return replace(dataset, train=train, val=val, test=test)


def binary(dataset: Dataset) -> Dataset:
    """Pixels in the upper half of the levels are 1, the others 0.

    Raises:
        ValueError: if the data have no levels.
    """
    if dataset.levels is None:
        raise ValueError(f"Expected data of integer levels, got {dataset.name} without levels")
    middle = (dataset.levels - 1) / 2

    def upper(rows: Tensor) -> Tensor:
        return (rows > middle).to(rows.dtype)

    return replace(
        dataset, train=upper(dataset.train), val=upper(dataset.val), test=upper(dataset.test)
    )
