"""From a frame to rows that have a density: choosing columns and checking them.

A density needs columns that vary, that differ from each other, and that are continuous. A discrete column has
probabilities instead: a density could grow without bound on its values. Integers get uniform noise (see
preparation.py); single values that many rows share, in a column that is continuous otherwise, get probabilities (see
atoms.py); other columns of few distinct values are refused. A rounded column that has more of them counts as
continuous, and is named: its density is one of the numbers in the file, and may follow their grid.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pyro_flowkit.tables.atoms import find_atoms
from pyro_flowkit.tables.errors import TableError

DISCRETE_SHARE = 0.05  # a column with at most this share of distinct values is discrete
INTEGER_SHARE = 0.5  # for a column of integers
ROUNDED_SHARE = 0.5  # of distinct values among the rows, at most
LEAST_ROWS = 20
LARGEST = 1e300
FARTHEST = 1e15  # times the range of most rows
DISCRETE = ("noise", "drop", "keep")


@dataclass(frozen=True)
class Table:
    """Rows that passed all checks.

    Attributes:
        values: shape ``(N, D)``, float64, in the units of the file.
        columns: their D names.
        discrete: for each column whether it holds integers that need noise.
        dropped: names of discrete columns that were left out.
        atoms: by name of a column the values that many rows share, where it is continuous otherwise.
        rows: their numbers in the frame, shape ``(N,)``; None: 0, 1, ...
        filled: how many of them, the last ones, had missing values.
    """

    values: np.ndarray
    columns: tuple[str, ...]
    discrete: tuple[bool, ...]
    dropped: tuple[str, ...] = ()
    atoms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rows: np.ndarray | None = None
    filled: int = 0

    @property
    def noisy(self) -> list[str]:
        """Names of the columns of integers that get noise."""
        return [name for name, flag in zip(self.columns, self.discrete, strict=True) if flag]

    def copies(self) -> np.ndarray:
        """For every row the number of the first one with the same values, shape ``(N,)``.

        Rows of integers and atoms alone are no copies of each other: theirs coincide of themselves.
        """
        rows = np.arange(len(self.values))
        continuous = np.zeros(len(rows), dtype=bool)
        for name, noisy, column in zip(self.columns, self.discrete, self.values.T, strict=True):
            continuous |= ~np.isin(column, self.atoms.get(name, ())) & (not noisy)
        hashes = pd.util.hash_pandas_object(pd.DataFrame(self.values + 0.0), index=False)
        _, first, index = np.unique(hashes, return_index=True, return_inverse=True)
        return np.where(continuous, first[index], rows)

    @property
    def rounded(self) -> dict[str, int]:
        """Columns that count as continuous though most rows share their value, and how many values there are."""
        found = {}
        originals = self.values[np.unique(self.copies())]
        for name, noisy, column in zip(self.columns, self.discrete, originals.T, strict=True):
            beside = column[~np.isin(column, self.atoms.get(name, ()))]
            count = len(np.unique(beside))
            if not noisy and count <= ROUNDED_SHARE * len(beside):
                found[name] = count
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the values, whatever the order of the columns."""
        digest = hashlib.sha256()
        for i in sorted(range(len(self.columns)), key=lambda i: self.columns[i]):
            atoms = self.atoms.get(self.columns[i], ())
            digest.update(f"{self.columns[i]!r},{self.discrete[i]},{atoms}".encode())
            digest.update((np.ascontiguousarray(self.values[:, i]) + 0.0).astype("<f8").tobytes())
        return digest.hexdigest()


def without_columns(frame: pd.DataFrame, names: Sequence[str], *, where: str) -> pd.DataFrame:
    """The frame without the named columns.

    Raises:
        TableError: if there are no such columns.
    """
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise TableError(
            f"Expected the columns {listed(missing)}, to exclude, in {where}, got {listed(frame.columns)}"
        )
    return frame.drop(columns=list(names))


def choose_columns(
    frame: pd.DataFrame,
    names: Sequence[str] | None,
    *,
    where: str,
    allow_missing: bool = False,
    missing: str = "drop or impute",
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The named columns (None: all) as numbers.

    Args:
        frame: the table.
        names: columns to take, in this order.
        where: what to call the table in errors.
        allow_missing: whether values may be NaN.
        missing: what the caller can do with rows of NaN, for the error.

    Returns:
        values of shape ``(N, D)`` in float64, and the names of the columns.

    Raises:
        TableError: if columns are missing or named twice, or a value is no finite number.
    """
    names = list(frame.columns) if names is None else list(names)
    unknown = [name for name in names if name not in frame.columns]
    if unknown:
        raise TableError(
            f"Expected the columns {listed(unknown)} in {where}, got {listed(frame.columns)}"
        )
    if len(set(names)) < len(names):
        raise TableError(f"Expected each column once, got {listed(names)}")
    if not names or not len(frame):
        raise TableError(f"Expected a table with rows and columns in {where}, got {frame.shape}")
    text = [name for name in names if not _is_number(frame[name])]
    if text:
        raise TableError(
            f"Expected columns of numbers in {where}, got text or dates in {listed(text)}"
            f"{_first_text(frame[text[0]])}: leave them out (exclude)"
        )
    values = np.column_stack([frame[name].to_numpy(np.float64, na_value=np.nan) for name in names])
    bad = np.isinf(values) if allow_missing else ~np.isfinite(values)
    if bad.any():
        worst = [name for name, count in zip(names, bad.sum(0), strict=True) if count]
        rows = np.flatnonzero(bad.any(1))
        kind, advice = "NaN or infinite", f"fill them in or leave them out (missing: {missing})"
        if allow_missing:
            kind, advice = "infinite", "correct them, or make them missing values"
        raise TableError(
            f"Expected finite numbers in {where}, got {kind} values in {len(rows)} of {len(values)} rows "
            f"(first: row {rows[0]}, counted from 0), in the columns {listed(worst)}: {advice}"
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
            are left out; "keep": they are treated as continuous, and no atoms are looked for.
        where: what to call the table in errors.

    Raises:
        TableError: for too few rows, and for constant, equal or refused columns.
    """
    rows = len(values)
    if rows < LEAST_ROWS:
        raise TableError(f"Expected at least {LEAST_ROWS} rows in {where}, got {rows}")
    constant = [
        name for name, column in zip(columns, values.T, strict=True) if column.min() == column.max()
    ]
    if constant:
        raise TableError(
            f"Expected columns that vary in {where}, got one value only in {listed(constant)}: "
            "leave them out (exclude)"
        )
    _refuse_far_values(values, columns, where)
    atoms = {} if discrete == "keep" else _atoms_of(values, columns)
    beside = [
        column[~np.isin(column, atoms.get(name, ()))]
        for name, column in zip(columns, values.T, strict=True)
    ]
    integer, few = np.array([_kind_of(column) for column in beside]).T
    if discrete == "drop" and few.any():
        if few.all():
            raise TableError(f"Expected a continuous column in {where}, got discrete ones only")
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
        raise TableError(
            f"Expected continuous columns or integers in {where}, got few distinct values in {', '.join(counts)}: "
            "leave such columns out (discrete: drop), recode them as integers, or insist (discrete: keep)"
        )
    noisy = few if discrete == "noise" else np.zeros(len(columns), dtype=bool)
    return Table(values, columns, tuple(bool(flag) for flag in noisy), dropped, atoms)


def check_integers(
    values: np.ndarray, columns: Sequence[str], integers: Sequence[str], *, where: str
) -> None:
    """Raises a TableError if the named columns of values of shape ``(N, D)`` hold anything but integers."""
    broken = [
        name
        for name, column in zip(columns, values.T, strict=True)
        if name in integers and (column != np.round(column)).any()
    ]
    if broken:
        raise TableError(
            f"Expected integers in {where}, as in training, got other values in {listed(broken)}"
        )


def _atoms_of(values: np.ndarray, columns: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Atoms by the name of the column, of columns that are continuous beside them."""
    found = {}
    for name, column in zip(columns, values.T, strict=True):
        atoms = find_atoms(column)
        rest = column[~np.isin(column, atoms)]
        if atoms and len(rest) >= LEAST_ROWS and not _kind_of(rest)[1]:
            found[name] = atoms
    return found


def _kind_of(column: np.ndarray) -> tuple[bool, bool]:
    """Whether a column holds integers, and whether it has few distinct values."""
    integer = bool((column == np.round(column)).all())
    share = len(np.unique(column)) / len(column)
    return integer, share <= (INTEGER_SHARE if integer else DISCRETE_SHARE)


def _refuse_far_values(values: np.ndarray, columns: tuple[str, ...], where: str) -> None:
    """A single number that far away leaves all others no digits to differ in."""
    for name, column in zip(columns, values.T, strict=True):
        largest = np.abs(column).max()
        low, middle, high = np.quantile(column / largest, (0.1, 0.5, 0.9))
        distance = np.abs(column / largest - middle)
        row = int(distance.argmax())
        if largest > LARGEST or (high > low and distance[row] > FARTHEST * (high - low)):
            raise TableError(
                f"Expected numbers of one magnitude in {where}, got {column[row]:g} in {name} (row {row}, counted from "
                "0): leave the row or the column out (exclude)"
            )


def _refuse_equal(values: np.ndarray, columns: tuple[str, ...], where: str) -> None:
    seen: dict[bytes, str] = {}
    for name, column in zip(columns, values.T, strict=True):
        other = seen.setdefault(hashlib.sha256((column + 0.0).tobytes()).digest(), name)
        if other != name:
            raise TableError(
                f"Expected columns that differ in {where}, got {other!r} and {name!r} with the same values: leave "
                "one out (exclude)"
            )


def _first_text(column: pd.Series) -> str:
    found = pd.to_numeric(column.astype(str), errors="coerce").isna() & column.notna()
    if not found.any():
        return ""
    row = int(np.argmax(found.to_numpy()))
    return f" ({str(column.iloc[row])[:20]!r} in row {row}, counted from 0)"


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)


def listed(names: object) -> str:
    listed = [str(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(listed[:12]) + (f", ... ({len(listed)} in all)" if len(listed) > 12 else "")
