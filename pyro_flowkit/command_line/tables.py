"""From a file to rows that have a density: reading, choosing columns, checking them, splitting.

A density needs columns that vary, that differ from each other, and that are continuous. A discrete column has
probabilities instead: a density could grow without bound on its values. Integers get uniform noise (see
preparation.py); other columns of few distinct values are refused.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pyro_flowkit.command_line.errors import CommandError

DISCRETE_SHARE = 0.05  # a column with at most this share of distinct values is discrete
INTEGER_SHARE = 0.5  # for a column of integers
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1
LEAST_ROWS = 20
DISCRETE = ("noise", "drop", "keep")


@dataclass(frozen=True)
class Table:
    """Rows that passed all checks.

    Attributes:
        values: shape ``(N, D)``, float64, in the units of the file.
        columns: their D names.
        discrete: for each column whether it holds integers that need noise.
        dropped: names of discrete columns that were left out.
    """

    values: np.ndarray
    columns: tuple[str, ...]
    discrete: tuple[bool, ...]
    dropped: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of the values, whatever the order of the columns."""
        digest = hashlib.sha256()
        for i in sorted(range(len(self.columns)), key=lambda i: self.columns[i]):
            digest.update(f"{self.columns[i]!r},{self.discrete[i]}".encode())
            digest.update((np.ascontiguousarray(self.values[:, i]) + 0.0).astype("<f8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def read_table(path: Path, *, key: str | None = None) -> pd.DataFrame:
    """The table in a CSV, Parquet or npz file, with text as names of the columns.

    A CSV file may lack its header line; columns are then named 0, 1, ..., as those of an array in an npz file are. An
    npz file holds one array of two dimensions (or ``key`` says which), or arrays of one dimension and one length.

    Raises:
        CommandError: if there is no such file, or it holds no table.
    """
    if not path.is_file():
        raise CommandError(f"expected a file, got {path}, which does not exist")
    suffix = path.suffix.lower()
    if key is not None and suffix != ".npz":
        raise CommandError(f"expected --key with an npz file only, got {path.name}")
    try:
        if suffix == ".npz":
            frame = _from_npz(path, key)
        elif suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            frame = _from_csv(path)
    except ImportError as error:
        raise CommandError(
            f"expected pyarrow to be installed, to read {path.name}: pip install pyarrow"
        ) from error
    except CommandError:
        raise
    except Exception as error:  # what readers raise for files of another kind has no common type
        reason = str(error).strip().split("\n")[0]
        raise CommandError(
            f"expected a table in {path.name} (CSV, Parquet or npz by its ending), got {type(error).__name__}: {reason}"
        ) from error
    frame.columns = [str(name) for name in frame.columns]
    twice = frame.columns[frame.columns.duplicated()].unique().tolist()
    if twice:
        raise CommandError(f"expected every column to have a name of its own, got twice: {twice}")
    return frame


def choose_columns(
    frame: pd.DataFrame, names: Sequence[str] | None, *, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The named columns (None: all) as numbers.

    Args:
        frame: the table.
        names: columns to take, in this order.
        where: what to call the table in errors.

    Returns:
        values of shape ``(N, D)`` in float64, and the names of the columns.

    Raises:
        CommandError: if columns are missing or named twice, or a value is no finite number.
    """
    names = list(frame.columns) if names is None else list(names)
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise CommandError(
            f"expected the columns {_listed(missing)} in {where}, got {_listed(frame.columns)}"
        )
    if len(set(names)) < len(names):
        raise CommandError(f"expected each column once, got {_listed(names)}")
    if not names or not len(frame):
        raise CommandError(f"expected a table with rows and columns in {where}, got {frame.shape}")
    text = [name for name in names if not _is_number(frame[name])]
    if text:
        raise CommandError(
            f"expected columns of numbers in {where}, got text or dates in {_listed(text)}: "
            "choose others with --columns"
        )
    values = np.column_stack([frame[name].to_numpy(np.float64, na_value=np.nan) for name in names])
    bad = ~np.isfinite(values)
    if bad.any():
        worst = [name for name, count in zip(names, bad.sum(0), strict=True) if count]
        rows = np.flatnonzero(bad.any(1))
        raise CommandError(
            f"expected finite numbers in {where}, got NaN or infinite values in {len(rows)} of {len(values)} rows "
            f"(first: row {rows[0]}, counted from 0), in the columns {_listed(worst)}: fill them in or leave them out"
        )
    return values, tuple(names)


def check_table(
    values: np.ndarray, columns: tuple[str, ...], *, discrete: str = "noise", where: str
) -> Table:
    """Refuse what has no density, and decide about discrete columns.

    Args:
        values: shape ``(N, D)``, finite.
        columns: D names.
        discrete: "noise": integers get uniform noise and other discrete columns are refused; "drop": discrete columns
            are left out; "keep": they are treated as continuous.
        where: what to call the table in errors.

    Raises:
        CommandError: for too few rows, and for constant, equal or refused columns.
    """
    rows = len(values)
    if rows < LEAST_ROWS:
        raise CommandError(f"expected at least {LEAST_ROWS} rows in {where}, got {rows}")
    constant = [name for name, column in zip(columns, values.T, strict=True) if np.ptp(column) == 0]
    if constant:
        raise CommandError(
            f"expected columns that vary in {where}, got one value only in {_listed(constant)}: "
            "leave them out with --columns"
        )
    integer, few = np.array([_kind_of(column) for column in values.T]).T
    if discrete == "drop" and few.any():
        if few.all():
            raise CommandError(f"expected a continuous column in {where}, got discrete ones only")
        dropped = tuple(name for name, flag in zip(columns, few, strict=True) if flag)
        kept = tuple(name for name, flag in zip(columns, few, strict=True) if not flag)
        values, columns, integer, few = values[:, ~few], kept, integer[~few], few[~few]
    else:
        dropped = ()
    _refuse_equal(values, columns, where)
    refused = few & ~integer
    if discrete == "noise" and refused.any():
        counts = [
            f"{name} ({len(np.unique(column))})"
            for name, column, flag in zip(columns, values.T, refused, strict=True)
            if flag
        ]
        raise CommandError(
            f"expected continuous columns or integers in {where}, got few distinct values in {', '.join(counts)}: "
            "leave such columns out with --discrete drop, recode them as integers, or insist with --discrete keep"
        )
    noisy = few if discrete == "noise" else np.zeros(len(columns), dtype=bool)
    return Table(values, columns, tuple(bool(flag) for flag in noisy), dropped)


def split_rows(count: int, columns: int, seed: int) -> Split:
    """80 % of the rows to train, 10 % to validate and 10 % to test, by ``numpy.random.default_rng(seed)``.

    Raises:
        CommandError: if the training part is too small for a covariance of so many columns.
    """
    order = np.random.default_rng(seed).permutation(count)
    first = int(TRAIN_SHARE * count)
    second = int((TRAIN_SHARE + VALIDATION_SHARE) * count)
    if first < columns + 2:
        least = int(np.ceil((columns + 2) / TRAIN_SHARE))
        raise CommandError(
            f"expected at least {least} rows for {columns} columns, got {count}: choose fewer with --columns"
        )
    return Split(order[:first], order[first:second], order[second:])


def _from_csv(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline()
    separators = {mark: first.count(mark) for mark in (",", ";", "\t")}
    mark = max(separators, key=lambda mark: separators[mark])
    separator = mark if separators[mark] else (r"\s+" if first.split()[1:] else ",")
    cells = [
        cell.strip().strip('"')
        for cell in (first.split(mark) if separators[mark] else first.split())
    ]
    if not cells:
        raise CommandError(f"expected a table in {path.name}, got an empty first line")
    if all(_parses(cell) for cell in cells):
        return pd.read_csv(path, sep=separator, header=None)
    header = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str).iloc[0]
    frame = pd.read_csv(path, sep=separator, header=None, skiprows=1)
    if len(frame.columns) != len(header):
        raise CommandError(
            f"expected {len(header)} values a line, as the first of {path.name} names, got {len(frame.columns)}"
        )
    frame.columns = [str(name).strip() for name in header]
    return frame


def _from_npz(path: Path, key: str | None) -> pd.DataFrame:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
        if key is not None and key not in shapes:
            raise CommandError(f"expected --key to be one of {_listed(shapes)}, got {key!r}")
        tables = [name for name, shape in shapes.items() if len(shape) == 2]
        if key is None and len(tables) == 1:
            key = tables[0]
        if key is None and len(tables) > 1:
            raise CommandError(
                f"expected --key for one of the tables in {path.name}: {_listed(tables)}"
            )
        if key is not None:
            if len(shapes[key]) != 2:
                raise CommandError(
                    f"expected a table of two dimensions, got {key} of shape {shapes[key]}"
                )
            return pd.DataFrame(file[key])
        if (
            not shapes
            or any(len(shape) != 1 for shape in shapes.values())
            or len(set(shapes.values())) > 1
        ):
            raise CommandError(
                f"expected a table or columns of one length in {path.name}, got {shapes}"
            )
        return pd.DataFrame({name: file[name] for name in file.files})


def _kind_of(column: np.ndarray) -> tuple[bool, bool]:
    """Whether a column holds integers, and whether it has few distinct values."""
    integer = bool((column == np.round(column)).all())
    share = len(np.unique(column)) / len(column)
    return integer, share <= (INTEGER_SHARE if integer else DISCRETE_SHARE)


def _refuse_equal(values: np.ndarray, columns: tuple[str, ...], where: str) -> None:
    seen: dict[bytes, str] = {}
    for name, column in zip(columns, values.T, strict=True):
        other = seen.setdefault(hashlib.sha256((column + 0.0).tobytes()).digest(), name)
        if other != name:
            raise CommandError(
                f"expected columns that differ in {where}, got {other!r} and {name!r} with the same values: leave "
                "one out with --columns"
            )


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)


def _parses(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _listed(names: object) -> str:
    listed = [str(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(listed[:12]) + (f", ... ({len(listed)} in all)" if len(listed) > 12 else "")
