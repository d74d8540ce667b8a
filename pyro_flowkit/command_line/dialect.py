"""How a text file holds its table: what was said of it, and for the rest a guess by its first lines.

A separator is the one by which the lines have equal numbers of fields, most of them numbers. The first line names the
columns if a field of it is no number, or if all are numbers as only names are: integers above columns that hold none
(0, 1, 2, as pandas and this package name columns; years), or equal steps in a row. Where a guess could go either way,
and the numbers would differ, the file is refused with the option that decides.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyro_flowkit.command_line.errors import CommandError

SEPARATORS = ("\t", ";", "|", ",", " ")  # " ": any white space
COMMENTS = ("#", "%")
MISSING = frozenset(
    {"", "na", "n/a", "nan", "null", "none", "#n/a", "<na>", "-nan", "1.#qnan", "-1.#ind"}
)
LEAST_LINES = 10  # below a first line, to tell numbers that are names from those that are not
EVEN_SHARE = 0.9  # of the lines, that have as many fields as most

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?|true|false", re.I)
_WITH_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)?,\d+([eE][+-]?\d+)?")
_WITH_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_BY_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class ReadOptions:
    """What a user says of a file; None leaves it to a guess.

    Attributes:
        key: the array of an npz file.
        encoding: of text.
        separator: of fields: one character, "tab" or "space" (any white space).
        decimal: "." or ",".
        thousands: character between groups of digits.
        comment: character that begins a comment.
        header: whether the first line names the columns.
        index: whether the first column numbers or names the rows, and is left out.
        missing: further words for missing values.
    """

    key: str | None = None
    encoding: str | None = None
    separator: str | None = None
    decimal: str | None = None
    thousands: str | None = None
    comment: str | None = None
    header: bool | None = None
    index: bool | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """How to read a text; see :class:`ReadOptions`.

    Attributes:
        names: of the columns, or None.
        first: number of lines before the rows.
        width: fields of most lines.
        notes: what was guessed, in words.
    """

    separator: str
    decimal: str
    thousands: str | None
    comment: str | None
    names: tuple[str, ...] | None
    first: int
    width: int
    notes: tuple[str, ...]


def guess_dialect(
    lines: Sequence[str], options: ReadOptions, expected: Sequence[str] = ()
) -> Dialect:
    """The dialect of a text.

    Args:
        lines: its first ones.
        options: what is known.
        expected: names of columns, one of which in the first line says that it names the columns.

    Raises:
        CommandError: if there are no rows, or there is more than one way to read them.
    """
    start = 0
    hint = re.fullmatch(r"sep=(.)\s*", lines[0]) if lines else None
    if hint is not None:  # as Excel writes it
        start, options = 1, replace(options, separator=options.separator or hint[1])
    comment = options.comment or next(
        (mark for mark in COMMENTS if any(line.lstrip().startswith(mark) for line in lines)), None
    )
    remarks: list[str] = []
    rows: list[str] = []
    numbers: list[int] = []
    for number, line in enumerate(lines[start:], start):
        if comment is not None and line.lstrip().startswith(comment):
            remarks += [] if rows else [line.lstrip().lstrip(comment)]
        elif line.strip():
            rows.append(line if comment is None else line.split(comment)[0])
            numbers.append(number)
    if not rows:
        raise CommandError("Expected a table, got a file without rows")
    separator = _separator(rows, options)
    cells = [fields(line, separator) for line in rows]
    body = cells[1:] or cells
    decimal, thousands = _marks([cell for row in body for cell in row], separator, options)
    named = _is_header(cells, options, expected)
    names = tuple(cells[0]) if named else _names_in(remarks, cells[0], separator)
    if named and len(rows) < 2:
        raise CommandError("Expected rows below the names of the columns, got none")
    width = Counter(len(row) for row in body).most_common(1)[0][0]
    shown = {"\t": "tab", " ": "space"}.get(separator, f"'{separator}'")
    notes = [f"separator {shown}" if width > 1 else "one column"]
    notes += [f"decimal '{decimal}'"] if decimal != "." else []
    notes += [f"thousands '{thousands}'"] if thousands else []
    notes += [f"comments '{comment}'"] if comment else []
    where = f"line {numbers[0] + 1}" if named else "a comment"
    notes.append(f"names of columns in {where}" if names else "no names of columns")
    first = numbers[0] + named
    return Dialect(separator, decimal, thousands, comment, names, first, width, tuple(notes))


def fields(line: str, separator: str) -> list[str]:
    """Of one line, without white space and quotes around them."""
    if separator == " ":
        return [cell.strip('"') for cell in line.split()]
    row = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return [cell.strip() for cell in row]


def is_number(cell: str) -> bool:
    """Whether a field holds a number, with a decimal point or comma, or says that it is missing."""
    return (
        cell.lower() in MISSING
        or _NUMBER.fullmatch(cell) is not None
        or _WITH_COMMA.fullmatch(cell) is not None
    )


def _separator(rows: Sequence[str], options: ReadOptions) -> str:
    given = {"tab": "\t", "\\t": "\t", "space": " "}.get(options.separator or "", options.separator)
    if given:
        if len(given) != 1:
            raise CommandError(f"Expected a separator of one character, got {given!r}")
        return given
    if options.decimal != "." and all(_WITH_COMMA.fullmatch(line.strip()) for line in rows[1:]):
        if len(rows) > 1 and "," not in rows[0] or options.decimal == ",":
            return ";"  # one column of decimal commas
        if _WITH_COMMA.fullmatch(rows[0].strip()):
            raise CommandError(
                f"Expected --decimal to say whether {rows[0].strip()!r} is one number or two, got lines that may be "
                "either"
            )
    best, best_share = ",", 0.0
    for mark in SEPARATORS:
        if mark == options.decimal:
            continue
        cells = [fields(line, mark) for line in rows]
        body = cells[1:] or cells
        width, count = Counter(len(row) for row in body).most_common(1)[0]
        named_rows = len(cells[0]) == width - 1  # as R writes them
        even = count >= EVEN_SHARE * len(body) and (len(cells[0]) == width or named_rows)
        if width < 2 or not even:
            continue
        share = sum(is_number(cell) for row in body for cell in row) / sum(map(len, body))
        if share > best_share and (mark != " " or share > 0.5):
            best, best_share = mark, share
    return best


def _marks(cells: Sequence[str], separator: str, options: ReadOptions) -> tuple[str, str | None]:
    """The decimal mark, and that of thousands."""
    if options.decimal is not None or options.thousands is not None or separator == ",":
        return options.decimal or ".", options.thousands
    with_comma = [cell for cell in cells if _WITH_COMMA.fullmatch(cell)]
    grouped = [cell for cell in cells if _BY_THOUSANDS.fullmatch(cell)]
    if grouped and len(with_comma) <= len(grouped):
        raise CommandError(
            f"Expected --decimal or --thousands to say what the comma in {grouped[0]!r} is, got a table in which it "
            "could be either"
        )
    if not with_comma:
        return ".", None
    if any("." in cell for cell in with_comma):
        return ",", "."
    if any(_WITH_POINT.fullmatch(cell) for cell in cells):
        return ".", None  # one or the other is text, and is refused as such
    return ",", None


def _is_header(
    cells: Sequence[Sequence[str]], options: ReadOptions, expected: Sequence[str]
) -> bool:
    """Whether the first line names the columns."""
    first, body = cells[0], cells[1:]
    if options.header is not None:
        return options.header
    if not all(map(is_number, first)):
        return True
    if expected:
        return set(expected) <= set(first)
    return bool(body) and _are_names(first, body)


def _names_in(
    remarks: Sequence[str], first: Sequence[str], separator: str
) -> tuple[str, ...] | None:
    """The last comment above the rows, if it has a name for every column."""
    names = fields(remarks[-1], separator) if remarks else []
    if len(names) != len(first) or any(map(is_number, names)):
        return None
    return tuple(names)


def _are_names(first: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """Whether a first line of numbers names the columns."""
    if not first[0] and len(first) > 1:  # the corner above an index, if that is what is below it
        index = [row[0] for row in body if row]
        if len(set(index)) == len(index) and all(map(_INTEGER.fullmatch, index)):
            return _are_names(first[1:], [row[1:] for row in body])
    if len(set(first)) < len(first) or any(cell.lower() in MISSING for cell in first):
        return False
    if not all(map(_INTEGER.fullmatch, first)):
        values = [float(cell) for cell in first if _NUMBER.fullmatch(cell) and cell[-1] not in "eE"]
        return len(first) == len(values) >= 4 and _has_equal_steps(values)
    columns = [[row[i] for row in body if i < len(row)] for i in range(len(first))]
    integers = [[int(c) for c in column if _INTEGER.fullmatch(c)] for column in columns]
    if not any(integers) and len(body) >= LEAST_LINES:
        return True
    values = [int(cell) for cell in first]
    counted = values in (list(range(len(first))), list(range(1, len(first) + 1)))
    outside = all(
        not min(found) <= value <= max(found)
        for value, found in zip(values, integers, strict=True)
        if found
    )
    regular = counted or (len(first) >= 3 and _has_equal_steps(values))
    if regular and (not all(integers) or (len(first) >= 4 and outside)):
        return True
    if counted or not any(integers) or (outside and len(first) > 1 and len(body) >= LEAST_LINES):
        raise CommandError(
            f"Expected --header yes or no, got a first line, {', '.join(first)}, that may name the columns or be a row"
        )
    return False


def _has_equal_steps(values: Sequence[float]) -> bool:
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    return bool(steps) and steps[0] != 0 and max(steps) - min(steps) <= 1e-9 * abs(steps[0])
