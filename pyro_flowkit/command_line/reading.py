"""From a file to a frame: CSV, Parquet and npz."""

from pathlib import Path

import numpy as np
import pandas as pd

from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.tables.columns import listed


def read_table(path: Path, *, key: str | None = None) -> pd.DataFrame:
    """The table in a CSV, Parquet or npz file, with text as names of the columns.

    A CSV file may lack its header line; columns are then named 0, 1, ..., as those of an array in an npz file are. An
    npz file holds one array of two dimensions (or ``key`` says which), or arrays of one dimension and one length.

    Raises:
        CommandError: if there is no such file, or it holds no table.
    """
    if not path.is_file():
        raise CommandError(f"Expected a file, got {path}, which does not exist")
    suffix = path.suffix.lower()
    if key is not None and suffix != ".npz":
        raise CommandError(f"Expected --key with an npz file only, got {path.name}")
    try:
        if suffix == ".npz":
            frame = _from_npz(path, key)
        elif suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            frame = _from_csv(path)
    except ImportError as error:
        raise CommandError(
            f"Expected pyarrow to be installed, to read {path.name}: pip install pyarrow"
        ) from error
    except CommandError:
        raise
    except Exception as error:  # what readers raise for files of another kind has no common type
        reason = str(error).strip().split("\n")[0]
        raise CommandError(
            f"Expected a table in {path.name} (CSV, Parquet or npz by its ending), got {type(error).__name__}: {reason}"
        ) from error
    frame.columns = [str(name) for name in frame.columns]
    twice = frame.columns[frame.columns.duplicated()].unique().tolist()
    if twice:
        raise CommandError(f"Expected every column to have a name of its own, got twice: {twice}")
    return frame


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
        raise CommandError(f"Expected a table in {path.name}, got an empty first line")
    if all(_parses(cell) for cell in cells):
        return pd.read_csv(path, sep=separator, header=None)
    header = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str).iloc[0]
    frame = pd.read_csv(path, sep=separator, header=None, skiprows=1)
    if len(frame.columns) != len(header):
        raise CommandError(
            f"Expected {len(header)} values a line, as the first of {path.name} names, got {len(frame.columns)}"
        )
    frame.columns = [str(name).strip() for name in header]
    return frame


def _from_npz(path: Path, key: str | None) -> pd.DataFrame:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
        if key is not None and key not in shapes:
            raise CommandError(f"Expected --key to be one of {listed(shapes)}, got {key!r}")
        tables = [name for name, shape in shapes.items() if len(shape) == 2]
        if key is None and len(tables) == 1:
            key = tables[0]
        if key is None and len(tables) > 1:
            raise CommandError(
                f"Expected --key for one of the tables in {path.name}: {listed(tables)}"
            )
        if key is not None:
            if len(shapes[key]) != 2:
                raise CommandError(
                    f"Expected a table of two dimensions, got {key} of shape {shapes[key]}"
                )
            return pd.DataFrame(file[key])
        if (
            not shapes
            or any(len(shape) != 1 for shape in shapes.values())
            or len(set(shapes.values())) > 1
        ):
            raise CommandError(
                f"Expected a table or columns of one length in {path.name}, got {shapes}"
            )
        return pd.DataFrame({name: file[name] for name in file.files})


def _parses(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
