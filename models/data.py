"""Data sets that need no network, each split into train, validation and test rows.

Image pixels are kept as integer levels (dequantise them to get a density in nats that can be
compared in bits per dimension); tables are raw columns (standardise by the training part); 2-D
targets are drawn from a seed. Files are read only from paths that the user names; nothing is ever
downloaded.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Dataset:
    """Rows of one kind, split in three.

    Attributes:
        train: Training rows, shape ``(N_train, *event_shape)``, float32.
        val: Validation rows, shape ``(N_val, *event_shape)``.
        test: Test rows, shape ``(N_test, *event_shape)``.
        name: What to call it in tables and titles.
        event_shape: Shape of one row.
        levels: Number of integer levels 0..levels-1 of discrete data, None for continuous data.
    """

    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    name: str
    event_shape: tuple[int, ...]
    levels: int | None = None

    @property
    def event_size(self) -> int:
        """Number of dimensions of one row."""
        return math.prod(self.event_shape)

    def to(self, dtype: torch.dtype) -> Dataset:
        """The same rows in another floating dtype."""
        return replace(
            self, train=self.train.to(dtype), val=self.val.to(dtype), test=self.test.to(dtype)
        )


def split(
    rows: np.ndarray | torch.Tensor,
    name: str,
    *,
    fractions: tuple[float, float] = (0.1, 0.1),
    seed: int = 0,
    levels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Splits rows by ``numpy.random.default_rng(seed).permutation``: train, validation, test.

    Args:
        rows: Array of shape ``(N, *event_shape)``.
        name: Name of the data set.
        fractions: Shares of validation and test rows.
        seed: Seed of the permutation.
        levels: Number of integer levels of discrete data, else None.
        dtype: dtype of the tensors.

    Raises:
        ValueError: If rows are not finite, levels are exceeded, or a part would be empty.
    """
    array = np.asarray(rows)
    if array.ndim < 2:
        raise ValueError(f"Expected rows of shape (N, *event_shape), got {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"Expected finite values in {name}, got {bad} that are NaN or infinite")
    if levels is not None and not (
        array.min() >= 0 and array.max() < levels and (array == np.round(array)).all()
    ):
        raise ValueError(
            f"Expected {name} to hold integers 0..{levels - 1}, "
            f"got values from {array.min()} to {array.max()}"
        )
    total = len(array)
    held_out = [int(fraction * total) for fraction in fractions]
    sizes = (total - sum(held_out), *held_out)
    if min(sizes) < 1:
        raise ValueError(
            f"Expected at least one row each for train, validation and test, got {sizes} of {total}"
        )
    order = np.random.default_rng(seed).permutation(total)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    train, val, test = (torch.as_tensor(array[part]).to(dtype) for part in parts)
    return Dataset(train, val, test, name, tuple(array.shape[1:]), levels)


def digits(*, seed: int = 0, fractions: tuple[float, float] = (0.1, 0.1)) -> Dataset:
    """scikit-learn's 1,797 handwritten digits: 8x8 images, flattened, with levels 0..16."""
    from sklearn.datasets import load_digits

    return split(load_digits().data, "digits", fractions=fractions, seed=seed, levels=17)


TABLES = ("wine", "breast_cancer", "diabetes", "iris", "linnerud")


def table(name: str, *, seed: int = 0, fractions: tuple[float, float] = (0.1, 0.1)) -> Dataset:
    """A small table that comes with scikit-learn; columns are raw, not standardised.

    Args:
        name: One of ``TABLES``.
        seed: Seed of the split.
        fractions: Shares of validation and test rows.

    Raises:
        ValueError: If there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"Expected a table among {', '.join(TABLES)}, got {name!r}")
    import sklearn.datasets

    options = {"scaled": False} if name == "diabetes" else {}
    rows = getattr(sklearn.datasets, f"load_{name}")(**options).data
    return split(rows, name, fractions=fractions, seed=seed)


def table_from_file(
    path: FilePath,
    *,
    key: str | None = None,
    seed: int = 0,
    fractions: tuple[float, float] = (0.1, 0.1),
    min_distinct: float = 0.0,
) -> Dataset:
    """A table from a csv file (with or without a header line) or from an npz or npy file.

    Args:
        path: The file.
        key: Array to take from an npz file that holds several.
        seed: Seed of the split.
        fractions: Shares of validation and test rows.
        min_distinct: Keep columns whose number of distinct values exceeds this share of the rows;
            discrete columns have no density.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the content is not a table of finite numbers.
    """
    path = _existing(path)
    if path.suffix == ".npz":
        rows = _from_npz(path, key)
    elif path.suffix == ".npy":
        rows = np.load(path, allow_pickle=False)
    else:
        import pandas as pd

        header = pd.read_csv(path, header=None, nrows=1)
        named = header.map(lambda cell: isinstance(cell, str)).to_numpy().any()
        frame = pd.read_csv(path, header=0 if named else None)
        other = [str(column) for column in frame if frame[column].dtype.kind not in "iufb"]
        if other:
            raise ValueError(f"Expected columns of numbers, got text in {', '.join(other)}")
        rows = frame.to_numpy(dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"Expected a table of shape (rows, columns) in {path}, got {rows.shape}")
    distinct = np.array([len(np.unique(column)) for column in rows.T])
    keep = distinct > min_distinct * len(rows)
    if not keep.any():
        raise ValueError(
            f"Expected columns with more than {min_distinct * len(rows):g} distinct values, "
            f"got at most {distinct.max()}"
        )
    return split(rows[:, keep], path.stem, fractions=fractions, seed=seed)


def images_from_file(
    path: FilePath,
    *,
    key: str | None = None,
    seed: int = 0,
    fractions: tuple[float, float] = (0.1, 0.1),
) -> Dataset:
    """Grey images with levels 0..255: an idx file of MNIST's format (gz or not), or an npz file.

    Args:
        path: For example ``train-images-idx3-ubyte.gz``, or an npz with an array of shape
            ``(N, height, width)``.
        key: Array to take from an npz file that holds several.
        seed: Seed of the split.
        fractions: Shares of validation and test rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no idx file of unsigned bytes, or the array is not one of images.
    """
    path = _existing(path)
    images = _from_npz(path, key) if path.suffix == ".npz" else read_idx(path)
    if images.ndim != 3:
        raise ValueError(f"Expected images of shape (N, height, width), got {images.shape}")
    name = path.name.split(".")[0]
    return split(images.reshape(len(images), -1), name, fractions=fractions, seed=seed, levels=256)


def read_idx(path: FilePath) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzip-compressed or not.

    Layout: two zero bytes, a type code (8: unsigned byte), the number of dimensions, each size as a
    big-endian 32-bit integer, then the values.

    Raises:
        ValueError: If the magic number, the type or the length is not right.
    """
    path = _existing(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(
            f"Expected an idx file of unsigned bytes (0x000008..) at {path}, "
            f"got a file that begins with 0x{content[:4].hex()}"
        )
    dims = content[3]
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    if len(values) != math.prod(shape):
        raise ValueError(f"Expected {math.prod(shape)} values for shape {shape}, got {len(values)}")
    return values.reshape(shape)


def _existing(path: FilePath) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file at {path}, got none; nothing is downloaded")
    return path


def _from_npz(path: Path, key: str | None) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        names = list(arrays)
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            raise ValueError(f"Expected key to be one of {', '.join(names)}, got {key!r}")
        return arrays[key]


def two_moons(n: int, rng: np.random.Generator) -> np.ndarray:
    """t ~ U(0, pi), k ~ Bernoulli(1/2): half circles, centred and scaled, plus N(0, 0.05^2)."""
    t = rng.uniform(0.0, math.pi, n)
    upper = rng.random(n) < 0.5
    x = np.where(upper, np.cos(t), 1.0 - np.cos(t))
    y = np.where(upper, np.sin(t), 0.5 - np.sin(t))
    points = np.stack([(x - 0.5) / 0.9, (y - 0.25) / 0.5], axis=1)
    return points + 0.05 * rng.standard_normal((n, 2))


def rings(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two rings of radius 1 and 2, equally likely, plus N(0, 0.08^2)."""
    radius = rng.integers(1, 3, n)
    t = rng.uniform(0.0, 2.0 * math.pi, n)
    points = radius[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    return points + 0.08 * rng.standard_normal((n, 2))


def pinwheel(n: int, rng: np.random.Generator) -> np.ndarray:
    """Five Gaussian arms, r ~ N(1, 0.3^2), s ~ N(0, 0.05^2), turned by 0.25 exp(r)."""
    arm = rng.integers(0, 5, n)
    r = 1.0 + 0.3 * rng.standard_normal(n)
    s = 0.05 * rng.standard_normal(n)
    angle = 2.0 * math.pi * arm / 5.0 + 0.25 * np.exp(r)
    return np.stack(
        [r * np.cos(angle) - s * np.sin(angle), r * np.sin(angle) + s * np.cos(angle)], axis=1
    )


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform on the eight dark unit squares of a 4x4 board over [-2, 2]^2: log p = -log 8."""
    square = rng.integers(0, 8, n)
    column, pair = square % 4, square // 4
    row = 2 * pair + column % 2
    return np.stack([column, row], axis=1) - 2.0 + rng.random((n, 2))


def eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight normals of standard deviation 0.15 on a circle of radius 2."""
    t = rng.integers(0, 8, n) * math.pi / 4.0
    return 2.0 * np.stack([np.cos(t), np.sin(t)], axis=1) + 0.15 * rng.standard_normal((n, 2))


TARGETS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "two-moons": two_moons,
    "rings": rings,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "eight-gaussians": eight_gaussians,
}


def target(
    name: str,
    *,
    sizes: tuple[int, int, int] = (20_000, 2_000, 10_000),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Independent draws from a 2-D target.

    Args:
        name: One of ``TARGETS``.
        sizes: Numbers of training, validation and test rows.
        seed: Seed of the draws.
        dtype: dtype of the tensors.

    Raises:
        ValueError: If there is no such target.
    """
    if name not in TARGETS:
        raise ValueError(f"Expected a target among {', '.join(TARGETS)}, got {name!r}")
    rng = np.random.default_rng(seed)
    train, val, test = (torch.from_numpy(TARGETS[name](n, rng)).to(dtype) for n in sizes)
    return Dataset(train, val, test, name, (2,))
