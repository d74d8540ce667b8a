"""A zoo of files: how people's programs write tables, and what is no table at all.

``TABLES`` are to be read, with these names and these numbers; ``REFUSED`` are to be refused, with these words.
"""

import bz2
import gzip
import io
import lzma
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

NAMES = ("a", "b", "c")
ROWS = np.random.default_rng(0).normal(size=(30, 3)).round(4) + [0.00001, 100.00001, 0.00001]
INTEGERS = np.random.default_rng(1).poisson(20.0, size=(30, 3))
FRAME = pd.DataFrame(ROWS, columns=NAMES)


@dataclass(frozen=True)
class Animal:
    """A file.

    Attributes:
        name: of the file.
        content: of the file.
        names: its columns.
        values: its rows.
        words: in the error.
        options: of ``read_table``, by name.
        notes: among the guesses that are said.
    """

    name: str
    content: bytes
    names: tuple[str, ...] = NAMES
    values: np.ndarray = field(default_factory=lambda: ROWS)
    words: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    notes: str = ""


def text(separator=",", header=NAMES, rows=ROWS, end="\n", decimal=".", fmt="{:.5f}") -> str:
    """Rows as text."""
    lines = [separator.join(header)] if header else []
    for row in rows:
        lines.append(separator.join(fmt.format(value).replace(".", decimal) for value in row))
    return end.join(lines) + end


def written(frame=FRAME, **options) -> bytes:
    """As pandas writes it."""
    return frame.to_csv(**options).encode()


def archive(**files) -> bytes:
    """A zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "."), content)
    return out.getvalue()


def numpy_file(save, *args, **arrays) -> bytes:
    """As numpy writes it."""
    out = io.BytesIO()
    save(out, *args, **arrays)
    return out.getvalue()


PLAIN = text().encode()
NUMBERED = ("0", "1", "2")
YEARS = ("1990", "1991", "1992")

TABLES = [
    Animal("plain.csv", PLAIN, notes="separator ',', names of columns in line 1"),
    Animal("semicolons.csv", text(";").encode(), notes="separator ';'"),
    Animal("tabs.tsv", text("\t").encode(), notes="separator tab"),
    Animal("spaces.txt", text("   ").encode(), notes="separator space"),
    Animal("bars.psv", text("|").encode(), notes="separator '|'"),
    Animal("comma-and-space.csv", text(", ").encode()),
    Animal("padded.txt", text("  ").replace("\n", "\n   ").encode()),
    Animal("german.csv", text(";", decimal=",").encode(), notes="decimal ','"),
    Animal("german-tabs.txt", text("\t", decimal=",").encode(), notes="decimal ','"),
    Animal("german-spaces.txt", text(" ", decimal=",").encode(), notes="decimal ','"),
    Animal(
        "german-thousands.csv",
        b"a;b\n" + b"1.234,56;2,5\n-12.345.678,5;3,25\n" * 12,
        ("a", "b"),
        np.array([[1234.56, 2.5], [-12345678.5, 3.25]] * 12),
        notes="thousands '.'",
    ),
    Animal(
        "quoted-german.csv",
        b"a,b\n" + b'"1,5","2,25"\n"3,5","4,75"\n' * 12,
        ("a", "b"),
        np.array([[1.5, 2.25], [3.5, 4.75]] * 12),
        options={"decimal": ","},
    ),
    Animal(
        "one-german-column.csv",
        text(";", ("a",), ROWS[:, :1], decimal=",").encode(),
        ("a",),
        ROWS[:, :1],
        notes="one column, decimal ','",
    ),
    Animal("windows.csv", text(end="\r\n").encode()),
    Animal("old-mac.csv", text(end="\r").encode()),
    Animal("no-newline.csv", PLAIN.rstrip()),
    Animal("blank-lines.csv", b"\n\n" + PLAIN.replace(b"\n", b"\n\n")),
    Animal("bom.csv", b"\xef\xbb\xbf" + PLAIN, notes="encoding utf-8-sig"),
    Animal("utf-16.csv", text().encode("utf-16"), notes="encoding utf-16"),
    Animal(
        "latin-1.csv",
        text(";", ("größe", "b", "c"), decimal=",").encode("latin-1"),
        ("größe", "b", "c"),
        notes="encoding latin-1",
    ),
    Animal("kanji.csv", text(",", ("身長", "b", "c")).encode(), ("身長", "b", "c")),
    Animal("excel-hint.csv", b"sep=;\n" + text(";").encode()),
    Animal("quoted.csv", text(",", ('"a, in cm"', "b", "c")).encode(), ("a, in cm", "b", "c")),
    Animal("table.csv.gz", gzip.compress(PLAIN)),
    Animal("gz-by-content.csv", gzip.compress(PLAIN)),
    Animal("table.csv.bz2", bz2.compress(PLAIN)),
    Animal("table.csv.xz", lzma.compress(PLAIN)),
    Animal("table.zip", archive(table__csv=PLAIN)),
    Animal("index.csv", written(), notes="first column '' left out as an index (--index no)"),
    Animal("shuffled-index.csv", written(FRAME.set_axis(range(29, -1, -1)))),
    Animal("dates-index.csv", written(FRAME.set_axis(pd.date_range("2020", periods=30)))),
    Animal("kept-index.csv", PLAIN, options={"index": False}),
    Animal(
        "id.csv", written(FRAME.assign(id=range(1, 31))[["id", *NAMES]], index=False), notes="'id'"
    ),
    Animal(
        "asked-for-index.csv",
        written(FRAME.assign(person=np.arange(30) ** 2)[["person", *NAMES]], index=False),
        options={"index": True},
        notes="'person' left out",
    ),
    Animal("numbers-for-names.csv", text(",", NUMBERED).encode(), NUMBERED),
    Animal("from-one.csv", text(",", ("1", "2", "3")).encode(), ("1", "2", "3")),
    Animal("years.csv", text(",", YEARS).encode(), YEARS),
    Animal("years-index.csv", written(FRAME.set_axis(YEARS, axis=1)), YEARS),
    Animal("numbers-and-index.csv", written(pd.DataFrame(ROWS)), NUMBERED),
    Animal(
        "wavelengths.csv",
        text(",", ("400.5", "401.0", "401.5", "402.0"), np.hstack([ROWS, ROWS[:, :1]])).encode(),
        ("400.5", "401.0", "401.5", "402.0"),
        np.hstack([ROWS, ROWS[:, :1]]),
    ),
    Animal(
        "one-number-for-a-name.csv", text(",", ("0",), ROWS[:, :1]).encode(), ("0",), ROWS[:, :1]
    ),
    Animal(
        "counts-and-years.csv",
        text(",", (*YEARS, "1993"), INTEGERS[:, [0, 1, 2, 0]], fmt="{}").encode(),
        (*YEARS, "1993"),
        INTEGERS[:, [0, 1, 2, 0]],
    ),
    Animal("no-header.csv", text(",", None).encode(), NUMBERED, notes="no names of columns"),
    Animal(
        "no-header-counts.csv", text(",", None, INTEGERS, fmt="{}").encode(), NUMBERED, INTEGERS
    ),
    Animal(
        "a-row-like-names.csv",
        b"0,1,2\n" + text(",", None, INTEGERS, fmt="{}").encode(),
        NUMBERED,
        np.vstack([[0, 1, 2], INTEGERS]),
        options={"header": False},
    ),
    Animal(
        "names-for-counts.csv",
        text(",", NUMBERED, INTEGERS, fmt="{}").encode(),
        NUMBERED,
        INTEGERS,
        options={"header": True},
    ),
    Animal(
        "numbered-rows.csv",
        text(",", None, np.column_stack([np.arange(30), ROWS])).encode(),
        ("1", "2", "3"),
        notes="'0' left out as an index",
    ),
    Animal(
        "one-column.csv",
        text(",", ("body mass",), ROWS[:, :1]).encode(),
        ("body mass",),
        ROWS[:, :1],
        notes="one column",
    ),
    Animal("comments.csv", b"# made by a program, today\n# version 2\n" + PLAIN + b"# end\n"),
    Animal(
        "comments-inside.csv",
        PLAIN.replace(b"\n", b" # checked\n", 3),
        options={"comment": "#"},
    ),
    Animal("percent.txt", b"% units: cm\n" + text(" ").encode(), notes="comments '%'"),
    Animal(
        "savetxt.txt",
        numpy_file(np.savetxt, ROWS, fmt="%.5f", header="a b c"),
        notes="names of columns in a comment",
    ),
    Animal(
        "r.txt",
        (
            '"a" "b" "c"\n'
            + "\n".join(f'"{i + 1}" {r}' for i, r in enumerate(text(" ", None).splitlines()))
        ).encode(),
        notes="names of rows left out",
    ),
    Animal(
        "trailing-commas.csv",
        PLAIN.replace(b"\n", b",\n"),
        notes="1 empty columns left out",
    ),
    Animal("exponents.csv", text(fmt="{:.10e}").encode()),
    Animal("plus.csv", text(fmt="{:+.5f}").encode()),
    Animal(
        "skipped-column.csv",
        written(FRAME.assign(who="x"), index=False),
        options={"columns": NAMES},
    ),
    Animal(
        "question-marks.csv",
        PLAIN + b"?,?,?\n",
        values=np.vstack([ROWS, [[np.nan] * 3]]),
        options={"missing": ("?",)},
    ),
    Animal("columns.npz", numpy_file(np.savez, a=ROWS[:, 0], b=ROWS[:, 1], c=ROWS[:, 2])),
    Animal("table.npz", numpy_file(np.savez_compressed, x=ROWS, y=ROWS[0]), NUMBERED),
    Animal("table.npy", numpy_file(np.save, ROWS), NUMBERED),
]

REFUSED = [
    Animal("empty.csv", b"", words="got a file without rows"),
    Animal("blank.csv", b"\n \n\n", words="got a file without rows"),
    Animal("only-comments.csv", b"# a\n# b\n", words="got a file without rows"),
    Animal("only-names.csv", b"a,b\n", words="rows below the names of the columns, got none"),
    Animal(
        "ragged.csv",
        b"a,b\n1,2,3\n4,5,6\n",
        words="2 values a line, as the names of columns in ragged.csv are, got 3",
    ),
    Animal(
        "longer-later.csv",
        PLAIN + b"1,2,3,4,5\n",
        words="3 values a line in longer-later.csv, got 5 in line 32",
    ),
    Animal("shorter.csv", PLAIN + b"1.5,2\n", words="got NaN or infinite values in 1 of 31 rows"),
    Animal("cut-off.csv", PLAIN[:-12], words="NaN or infinite"),
    Animal("cut-off.csv.gz", gzip.compress(PLAIN)[:-20], words="a table in cut-off.csv.gz"),
    Animal("twice.csv", text(",", ("a", "b", "a")).encode(), words="got twice: ['a']"),
    Animal(
        "words.csv", text(",", NAMES).replace("\n", ",x\n").encode(), words="text or dates in x"
    ),
    Animal(
        "dates.csv",
        written(FRAME.assign(day="2020-01-02"), index=False),
        words="text or dates in day",
    ),
    Animal("units.csv", b"a,b,c\ncm,kg,s\n" + text(",", None).encode(), words="'cm' in row 0"),
    Animal("question.csv", PLAIN + b"?,1.5,2.5\n", words="'?' in row 30"),
    Animal("hex.csv", b"a,b\n" + b"0x1F,1.5\n" * 30, words="text or dates in a"),
    Animal("complex.csv", b"a\n" + b"1+2j\n" * 30, words="text or dates in a"),
    Animal("euros.csv", b"a;b\n" + "1,50 €;2,5\n".encode() * 30, words="text or dates in a"),
    Animal("thousands.csv", b"a;b\n" + b"1,234;5,678\n" * 30, words="--decimal or --thousands"),
    Animal("one-or-two.csv", b"1,5\n2,25\n" * 15, words="--decimal to say whether '1,5'"),
    Animal("names-or-row.csv", b"0;1\n" + b"3;5\n4;1\n" * 15, words="--header yes or no"),
    Animal("count-or-row.csv", b"1,2,3\n" + b"4,5,6\n7,9,8\n" * 15, words="--header yes or no"),
    Animal("years-or-row.csv", b"2010;2011\n" + b"3;5\n4;1\n" * 15, words="--header yes or no"),
    Animal("few-below.csv", b"5\n1.5\n2.5\n", words="--header yes or no"),
    Animal("bytes.csv", b"\xff\xfe\x00\x80\n", words="text in utf-16, got other bytes"),
    Animal("picture.csv", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", words="a file of another kind"),
    Animal("zeros.csv", bytes(200), words="a file of another kind"),
    Animal("page.csv", b"<html><body>not found</body></html>", words="markup or JSON"),
    Animal("records.json", b'[{"a": 1}, {"a": 2}]', words="markup or JSON"),
    Animal(
        "sheet.xlsx",
        archive(**{"[Content_Types]__xml": "", "xl/a__xml": ""}),
        words="save it as CSV",
    ),
    Animal("two.zip", archive(a__csv=PLAIN, b__csv=PLAIN), words="one file in two.zip, got 2"),
    Animal("table.h5", b"\x89HDF\r\n\x1a\n", words="got HDF5"),
    Animal("table.csv.zst", b"\x28\xb5\x2f\xfd\x00", words="to be unpacked first"),
    Animal("broken.npz", b"PK\x03\x04 not a zip file", words="a table in broken.npz"),
    Animal("cube.npy", numpy_file(np.save, np.zeros((2, 2, 2))), words="an array of shape (N, D)"),
    Animal("vectors.npz", numpy_file(np.savez, a=np.zeros(3), b=np.zeros(4)), words="one length"),
    Animal("broken.parquet", b"PAR1", words="broken.parquet"),
    Animal("constant.csv", written(FRAME.assign(c=1.5), index=False), words="one value only in c"),
    Animal("copy.csv", written(FRAME.assign(c=FRAME["a"]), index=False), words="the same values"),
    Animal("infinite.csv", PLAIN + b"inf,1.5,2.5\n", words="NaN or infinite"),
    Animal("few.csv", text(rows=ROWS[:5]).encode(), words="at least 20 rows"),
]
