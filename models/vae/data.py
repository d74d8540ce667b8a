"""From a name to what a VAE is trained and tested on: splits, binarisation, and noise that is fresh in every batch.

A batch is a function of (seed, step) alone: rows in the order of their epoch, then noise from a generator of that step.
So nothing is ever stored twice, and a training that is resumed sees the same batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import data
from models._prepare import FAST_ROWS, load
from models.data import Dataset
from pyro_flowkit.preprocessing import dequantize

BINARISATIONS = ("auto", "dynamic", "static", "threshold", "none")
TEST_PARTNERS = (("train", "test"), ("train", "t10k"))
MAX_VALIDATION = 2000
MAX_GREY = 0.25

Presentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Prepared:
    """Rows as a likelihood wants them.

    Attributes:
        name: of the data.
        batches: from the step to a batch of training rows, shape ``(batch_size, D)``.
        reference: training rows as they are presented once, shape ``(n, D)``; location and scale are taken from it.
        val: validation rows, with noise drawn once.
        test: test rows, likewise.
        data_size: number of training rows.
        likelihood: the one that was asked for, or that fits the data.
        levels: number of integer levels of the rows as presented, None for continuous ones.
        image_shape: height and width, None where a row is no image.
        standardization: kind of ``VAE.standardize`` that fits.
        unit: what a nat is a nat of.
        why: in words, what was chosen by the data.
    """

    name: str
    batches: "FreshBatches"
    reference: Tensor
    val: Tensor
    test: Tensor
    data_size: int
    likelihood: str
    levels: int | None
    image_shape: tuple[int, int] | None
    standardization: str
    unit: str
    why: str


class FreshBatches:
    """Batches of rows in a new order in every epoch, each presented with noise of its own.

    Args:
        rows: shape ``(N, D)``, any dtype.
        present: from rows and a generator to rows as the likelihood wants them.
        batch_size: rows per batch; an epoch leaves out the remainder.
        seed: of orders and noise.
    """

    def __init__(self, rows: Tensor, present: Presentation, batch_size: int, seed: int):
        self.rows, self.present, self.seed = rows, present, seed
        self.batch_size = min(batch_size, len(rows))
        self.per_epoch = len(rows) // self.batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self._order, self._epoch = torch.from_numpy(order), epoch
        index = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        noise = np.random.SeedSequence([self.seed, 1, step]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(noise[0] >> np.uint64(1)))
        return self.present(self.rows[index], generator)


def prepare(
    name: str,
    *,
    key: str | None = None,
    binarisation: str = "auto",
    likelihood: str = "auto",
    batch_size: int = 128,
    seed: int = 0,
    fast: bool = False,
) -> Prepared:
    """Loads data by name and decides how rows are presented.

    Args:
        name: "digits", a table's name, or a path: csv, npy, npz, idx (gz or not), or a folder of idx files.
        key: array to take from an npz file; x_train and x_test are found by themselves.
        binarisation: "dynamic" (pixels are drawn anew in every batch, with their grey value as probability), "static"
            (drawn once), "threshold" (at half), "none", or "auto": dynamic for images that are nearly black and white
            (at least three quarters of the largest variance that pixels of their mean could have), else none.
        likelihood: "bernoulli", "logistic", "normal" or "auto": what fits the rows as presented.
        batch_size: rows per batch.
        seed: of orders and noise; splits and the noise of validation and test rows do not depend on it.
        fast: few rows.

    Raises:
        ValueError: where binarisation, likelihood and data do not fit each other.
    """
    dataset, image_shape = load_split(name, key)
    if fast:
        few = max(2, FAST_ROWS // 10)
        parts = dataset.train[:FAST_ROWS], dataset.val[:few], dataset.test[:few]
        dataset = replace(dataset, train=parts[0], val=parts[1], test=parts[2])
    levels = dataset.levels
    binarisation, likelihood, why = _chosen(dataset, binarisation, likelihood)
    is_binary = levels == 2 or binarisation != "none"
    shown = 2 if is_binary else levels
    noisy = likelihood == "normal" and shown is not None
    draw = _drawing(binarisation, levels)
    present = of_training = _presentation(draw, shown if noisy else None)
    rows = dataset.train
    if binarisation == "static":
        rows = draw(rows, _generator(2))
        of_training = _presentation(_as_they_are, shown if noisy else None)
    unit = "binary pixels" if is_binary else f"integer levels 0 to {(levels or 1) - 1}"
    if levels is None:
        unit = "data as loaded"
    elif noisy:
        unit += " with uniform noise"
    return Prepared(
        name=dataset.name,
        batches=FreshBatches(rows, of_training, batch_size, seed),
        reference=of_training(rows[:20_000], _generator(3)),
        val=present(dataset.val, _generator(4)),
        test=present(dataset.test, _generator(5)),
        data_size=len(rows),
        likelihood=likelihood,
        levels=shown,
        image_shape=image_shape,
        standardization="centre" if is_binary else "columns" if levels is None else "common",
        unit=unit if binarisation == "none" else f"{unit} ({binarisation} binarisation)",
        why=why,
    )


def _chosen(dataset: Dataset, binarisation: str, likelihood: str) -> tuple[str, str, str]:
    """Binarisation and likelihood without "auto", and in words what was chosen."""
    if binarisation not in BINARISATIONS:
        raise ValueError(
            f"Expected binarisation to be one of {', '.join(BINARISATIONS)}, got {binarisation!r}"
        )
    levels, chosen = dataset.levels, []
    is_grey = levels not in (None, 2)
    if binarisation == "auto":
        grey = greyness(dataset.train, levels)
        binarisation = "dynamic" if is_grey and grey < MAX_GREY else "none"
        if is_grey:
            chosen.append(f"{binarisation} binarisation (greyness {grey:.2f})")
    if binarisation != "none" and levels is None:
        raise ValueError(f"Expected integer levels to binarise, got {dataset.name} without levels")
    is_binary = levels == 2 or binarisation != "none"
    if likelihood == "auto":
        likelihood = "bernoulli" if is_binary else "logistic" if levels else "normal"
        chosen.append(f"{likelihood} likelihood")
    _check_likelihood(likelihood, is_binary, levels, dataset.name)
    return binarisation, likelihood, f"chosen by the data: {', '.join(chosen)}" if chosen else ""


def greyness(rows: Tensor, levels: int | None) -> float:
    """1 - v / (m (1 - m)) of pixels in [0, 1] with mean m and variance v: 0 for black and white, 1 for one grey.

    NaN for rows without levels.
    """
    if levels is None:
        return math.nan
    variance, mean = torch.var_mean(rows[:5000].float() / (levels - 1), correction=0)
    largest = float(mean * (1 - mean))
    return 1.0 - float(variance) / largest if largest else 0.0


def _drawing(binarisation: str, levels: int | None) -> Presentation:
    """From stored rows to floating ones, binary where they are to be."""
    highest = (levels or 2) - 1
    if binarisation == "threshold":
        return lambda rows, generator: (rows.float() > highest / 2).float()
    if binarisation == "none":
        return _as_they_are

    def draw(rows: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(rows.shape, generator=generator)
        return (noise < rows.float() / highest).float()

    return draw


def _as_they_are(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows.float()


def _presentation(draw: Presentation, noisy_levels: int | None) -> Presentation:
    """Rows as drawn, with uniform noise on the scale of their levels where there are any."""
    if noisy_levels is None:
        return draw

    def present(rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn = draw(rows, generator)
        return noisy_levels * dequantize(drawn, noisy_levels, generator=generator)[0]

    return present


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check_likelihood(likelihood: str, is_binary: bool, levels: int | None, name: str) -> None:
    if likelihood == "bernoulli" and not is_binary:
        raise ValueError(
            f"Expected binary pixels for the bernoulli likelihood, got those of {name}"
        )
    if likelihood == "logistic" and levels is None:
        raise ValueError(f"Expected integer levels for the logistic likelihood, got {name} without")


def load_split(name: str, key: str | None = None) -> tuple[Dataset, tuple[int, int] | None]:
    """A data set, with the official test rows where its file, or the file beside it, has them; and its image shape.

    Validation rows are a tenth of the training rows, at most 2,000, by a fixed permutation.

    Raises:
        FileNotFoundError: if there is no such file, or a folder without idx files of images.
        ValueError: if the file holds something else.
    """
    if name == "digits":
        return data.digits(), (8, 8)
    path = Path(name)
    parts = official_parts(path, key) if path.exists() else None
    if parts is not None:
        train, test = parts
        return _official(train, test, path.name.split(".")[0]), _shape_of(train)
    dataset = load(name, key=key)
    if dataset.levels is None:
        return dataset, None
    return dataset, _shape_of(_images(path, key))


def official_parts(path: Path, key: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Training and test images, if the file, its partner or the folder has both."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            train_key = key or "x_train"
            test_key = train_key.replace("train", "test")
            if test_key == train_key or not {train_key, test_key} <= set(arrays):
                return None
            return arrays[train_key], arrays[test_key]
    if path.is_dir():
        found = sorted(path.glob("train-images*"))
        if not found:
            raise FileNotFoundError(
                f"Expected idx files train-images* and t10k-images* in {path}, got none"
            )
        path = found[0]
    for train, test in TEST_PARTNERS:
        partner = path.with_name(path.name.replace(train, test, 1))
        if path.name.startswith(train) and partner.is_file():
            return data.read_idx(path), data.read_idx(partner)
    return None


def _official(train: np.ndarray, test: np.ndarray, name: str) -> Dataset:
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"Expected training and test rows of one shape in {name}, got {train.shape} and {test.shape}"
        )
    both = [part.reshape(len(part), -1) for part in (train, test)]
    levels = _levels_of(train)
    size = len(train)
    order = torch.from_numpy(np.random.default_rng(0).permutation(size))
    held_out = min(max(1, size // 10), MAX_VALIDATION)
    # grey values stay bytes until they are in a batch: a quarter of the memory
    rows, test_rows = (
        torch.tensor(part if part.dtype == np.uint8 else part.astype(np.float32)) for part in both
    )
    return Dataset(
        rows[order[held_out:]],
        rows[order[:held_out]],
        test_rows,
        name,
        tuple(rows.shape[1:]),
        levels,
    )


def _levels_of(rows: np.ndarray) -> int | None:
    """2 for zeros and ones, 256 for other bytes, None for anything else."""
    if rows.dtype == bool or bool(((rows == 0) | (rows == 1)).all()):
        return 2
    return 256 if rows.dtype == np.uint8 else None


def _images(path: Path, key: str | None) -> np.ndarray:
    if path.suffix != ".npz":
        return data.read_idx(path)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key or next(iter(arrays))]


def _shape_of(rows: np.ndarray) -> tuple[int, int] | None:
    if rows.ndim == 3:
        return int(rows.shape[1]), int(rows.shape[2])
    side = math.isqrt(rows.shape[1]) if rows.ndim == 2 else 0
    is_square_image = rows.dtype == np.uint8 and side * side == rows.shape[1]
    return (side, side) if is_square_image else None
