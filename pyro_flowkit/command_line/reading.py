"""From a file or a pipe to a frame: text in many dialects, Parquet, npz and npy, compressed or not.

What a file is, its first bytes say, not its name. How a text holds its table is guessed (see dialect.py) and said.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import stat
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pyro_flowkit.command_line.dialect import MISSING, Dialect, ReadOptions, guess_dialect
from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.tables.columns import listed
from pyro_flowkit.tables.density import as_frame

LINES = 200  # that a dialect is guessed by
COUNTERS = ("", "index", "id", "row", "rownames", "unnamed: 0")
_MARKS = [  # of byte order, the longer ones first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
_OTHERS = [
    (b"\x89HDF", "HDF5"),
    (b"SQLite", "a database"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet"),
    (b"%PDF", "PDF"),
    (b"\x28\xb5\x2f\xfd", "zstd, which is to be unpacked first"),
    (b"\x1f\x9d", "compress, which is to be unpacked first"),
    (b"7z\xbc\xaf", "7z, which is to be unpacked first"),
]


@dataclass(frozen=True)
class Source:
    """A table that was read.

    Attributes:
        frame: with text as names of the columns.
        name: what to call it.
        notes: what was guessed, in words; "" where there was nothing to guess.
    """

    frame: pd.DataFrame
    name: str
    notes: str


def read_table(
    path: str | os.PathLike[str], options: ReadOptions | None = None, expected: Sequence[str] = ()
) -> Source:
    """The table in a file, or in a pipe ("-" is standard input).

    An npz file holds one array of two dimensions (or ``options.key`` says which), or arrays of one dimension and one
    length. Columns without names are called 0, 1, ...

    Args:
        path: of the file.
        options: what is known of it.
        expected: names of columns, where they are known.

    Raises:
        CommandError: if there is no such file, it holds no table, or there is more than one way to read it.
    """
    options = options or ReadOptions()
    name = "standard input" if str(path) == "-" else Path(path).name
    try:
        content = _content(path)
        return _parsed(content, name, options, expected)
    except ImportError as error:
        raise CommandError(
            f"Expected pyarrow to be installed, to read {name}: pip install pyarrow"
        ) from error
    except CommandError as error:
        raise CommandError(f"{error} ({name})" if name not in str(error) else str(error)) from error
    except Exception as error:  # what readers raise for files of another kind has no common type
        reason = str(error).strip().split("\n")[0]
        raise CommandError(
            f"Expected a table in {name} (text, Parquet or npz), got a damaged one, {type(error).__name__}: {reason}"
        ) from error


def _content(path: str | os.PathLike[str]) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise CommandError(f"Expected a file, got {path}, which does not exist") from error
        raise
    if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
        raise CommandError(
            f"Expected a file or a pipe, got {'the folder' if stat.S_ISDIR(kind) else 'the device'} {path}"
        )
    return Path(path).read_bytes()


def _parsed(content: bytes, name: str, options: ReadOptions, expected: Sequence[str]) -> Source:
    content = _unpacked(content, name)
    if options.key is not None and not content.startswith(b"PK"):
        raise CommandError(f"Expected --key with an npz file only, got {name}")
    for mark, kind in _OTHERS:
        if content.startswith(mark):
            raise CommandError(f"Expected text, Parquet or npz in {name}, got {kind}")
    if content.startswith(b"PK"):
        return Source(as_frame(_from_npz(content, name, options.key)), name, "")
    if content.startswith(b"\x93NUMPY"):
        return Source(as_frame(np.load(io.BytesIO(content), allow_pickle=False)), name, "")
    if content.startswith(b"PAR1"):
        return _without_index(pd.read_parquet(io.BytesIO(content)), name, [], options, expected)
    return _from_text(content, name, options, expected)


def _unpacked(content: bytes, name: str) -> bytes:
    if content.startswith(b"\x1f\x8b"):
        return gzip.decompress(content)
    if content.startswith(b"BZh"):
        return bz2.decompress(content)
    if content.startswith(b"\xfd7zXZ"):
        return lzma.decompress(content)
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = [item for item in file.namelist() if not item.endswith("/")]
            if "[Content_Types].xml" in members or "mimetype" in members:
                raise CommandError(
                    f"Expected text, Parquet or npz in {name}, got a spreadsheet: save it as CSV"
                )
            if not all(item.endswith(".npy") for item in members):
                if len(members) != 1:
                    raise CommandError(
                        f"Expected one file in {name}, got {len(members)}: {listed(members)}"
                    )
                return file.read(members[0])
    return content


def _from_text(content: bytes, name: str, options: ReadOptions, expected: Sequence[str]) -> Source:
    text, encoding = _decoded(content, options.encoding)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\x00" in text[:10_000]:
        raise CommandError(f"Expected text, Parquet or npz in {name}, got a file of another kind")
    if text.lstrip()[:1] in ("<", "{") or text.lstrip()[:2] in ("[{", "[["):
        raise CommandError(f"Expected a table in {name}, got markup or JSON")
    lines = text.split("\n", LINES)[:LINES]
    dialect = guess_dialect(lines, options, expected)
    body = text.split("\n", dialect.first)[dialect.first] if dialect.first else text
    frame = _rows(body, dialect, name, options)
    notes = [f"encoding {encoding}"] if encoding not in ("utf-8", options.encoding) else []
    frame, named_rows = _named(frame, dialect, name)
    notes += [*dialect.notes, *named_rows]
    return _without_index(frame, name, notes, options, expected, bool(dialect.names))


def _rows(text: str, dialect: Dialect, name: str, options: ReadOptions) -> pd.DataFrame:
    try:
        return pd.read_csv(
            io.StringIO(text),
            sep=r"\s+" if dialect.separator == " " else dialect.separator,
            header=None,
            decimal=dialect.decimal,
            thousands=dialect.thousands,
            comment=dialect.comment,
            na_values=[*MISSING, *options.missing],
            skipinitialspace=True,
            low_memory=False,
        )
    except pd.errors.ParserError as error:
        found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if found is None:
            raise
        width, line, count = map(int, found.groups())
        raise CommandError(
            f"Expected {width} values a line in {name}, got {count} in line {line + dialect.first}"
        ) from error


def _decoded(content: bytes, encoding: str | None) -> tuple[str, str]:
    for mark, found in _MARKS:
        if encoding is None and content.startswith(mark):
            encoding = found
    try:
        return content.decode(encoding or "utf-8"), encoding or "utf-8"
    except LookupError as error:
        raise CommandError(f"Expected --encoding to name one, got {encoding!r}") from error
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise CommandError(
                f"Expected text in {encoding}, got other bytes at {error.start}: --encoding says which it is"
            ) from error
    return content.decode("latin-1"), "latin-1"


def _named(frame: pd.DataFrame, dialect: Dialect, name: str) -> tuple[pd.DataFrame, list[str]]:
    """The frame with names of its columns, without those that hold names of rows, as R writes them, or nothing."""
    notes, names = [], dialect.names
    empty = [
        i
        for i in range(len(frame.columns))
        if frame[i].isna().all() and (names is None or i >= len(names) or not names[i])
    ]
    if empty and len(empty) < len(frame.columns):
        names = None if names is None else tuple(n for i, n in enumerate(names) if i not in empty)
        frame = frame.drop(columns=empty)
        notes.append(f"{len(empty)} empty columns left out")
    if names is None:
        return frame.set_axis([str(i) for i in range(len(frame.columns))], axis=1), notes
    if len(frame.columns) == len(names) + 1:
        rows = frame.iloc[:, 0]
        if not pd.api.types.is_numeric_dtype(rows) or _counts(rows):
            frame = frame.iloc[:, 1:]
            notes.append("names of rows left out")
    if len(frame.columns) != len(names):
        raise CommandError(
            f"Expected {len(names)} values a line, as the names of columns in {name} are, got {len(frame.columns)}"
        )
    return frame.set_axis(list(names), axis=1), notes


def _without_index(
    frame: pd.DataFrame,
    name: str,
    notes: list[str],
    options: ReadOptions,
    expected: Sequence[str],
    has_names: bool = True,
) -> Source:
    frame = as_frame(frame)
    first = frame.columns[0] if len(frame.columns) else ""
    rest = frame.iloc[:, 1:]
    if options.index:
        frame, notes = rest, [*notes, f"first column {first!r} left out as an index"]
    elif options.index is None and first not in expected and len(frame.columns) > 1:
        unnamed = has_names and first.lower() in ("", "unnamed: 0")
        numbered = not has_names or first.lower() in COUNTERS
        if unnamed or (numbered and _counts(frame[first])):
            frame = rest
            notes = [*notes, f"first column {first!r} left out as an index (--index no)"]
    return Source(frame, name, ", ".join(notes))


def _counts(column: pd.Series) -> bool:
    """Whether a column numbers its rows, from 0 or 1."""
    if not pd.api.types.is_numeric_dtype(column) or len(column) < 3:
        return False
    values = column.to_numpy(np.float64, na_value=np.nan)
    return bool(values[0] in (0.0, 1.0) and (np.diff(values) == 1.0).all())


def _from_npz(content: bytes, name: str, key: str | None) -> pd.DataFrame:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
        if key is not None and key not in shapes:
            raise CommandError(f"Expected --key to be one of {listed(shapes)}, got {key!r}")
        tables = [name for name, shape in shapes.items() if len(shape) == 2]
        if key is None and len(tables) == 1:
            key = tables[0]
        if key is None and len(tables) > 1:
            raise CommandError(f"Expected --key for one of the tables in {name}: {listed(tables)}")
        if key is not None:
            if len(shapes[key]) != 2:
                raise CommandError(
                    f"Expected a table of two dimensions, got {key} of shape {shapes[key]}"
                )
            return pd.DataFrame(file[key])
        lengths = set(shapes.values())
        if len(lengths) != 1 or len(next(iter(lengths))) != 1:
            raise CommandError(f"Expected a table or columns of one length in {name}, got {shapes}")
        return pd.DataFrame({name: file[name] for name in file.files})
