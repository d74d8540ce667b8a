"""Reading tables: every kind of file that is accepted gives the same rows."""

import io
import os
import re
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line.dialect import ReadOptions
from pyro_flowkit.command_line.reading import read_table
from pyro_flowkit.tables.columns import choose_columns
from tests.tables.small import FIT, small_table


def values_of(path, **options):
    return choose_columns(read_table(path, ReadOptions(**options)).frame, None, where=path.name)


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", [True, False])
def test_csv_files_of_several_dialects(separator, header, tmp_path):
    table = small_table(rows=30)
    path = tmp_path / "rows.csv"
    table.to_csv(path, sep=separator, header=header, index=False)
    values, columns = values_of(path)
    np.testing.assert_array_equal(values, table.to_numpy())
    assert columns == (tuple(table.columns) if header else ("0", "1", "2"))


def test_npz_files_of_columns_or_of_one_table(tmp_path):
    table = small_table(rows=30)
    np.savez(tmp_path / "columns.npz", **{name: table[name].to_numpy() for name in table})
    np.savez(tmp_path / "table.npz", rows=table.to_numpy(), other=np.zeros(3))
    values, columns = values_of(tmp_path / "columns.npz")
    assert columns == tuple(table.columns)
    np.testing.assert_array_equal(values, table.to_numpy())
    np.testing.assert_array_equal(values_of(tmp_path / "table.npz")[0], table.to_numpy())


def test_pipes_are_read(tmp_path, monkeypatch):
    table = small_table(rows=30)
    content = table.to_csv(index=False).encode()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    values, columns = values_of(tmp_path / "pipe")
    writer.join()
    assert columns == tuple(table.columns)
    np.testing.assert_array_equal(values, table.to_numpy())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    source = read_table("-")
    assert source.name == "standard input"
    pd.testing.assert_frame_equal(source.frame, table)


def test_folders_devices_and_impossible_names_are_refused(tmp_path, fails):
    for path, words in (
        (tmp_path, "got the folder"),
        (os.devnull, "got the device"),
        ("x" * 5000, "File name too long"),
    ):
        assert words in fails("fit", path, "-o", tmp_path / "run")


def test_columns_of_a_run_name_the_columns_of_new_rows(trained, tmp_path, capsys):
    # two rows, of which the first would else be taken for a row that names nothing
    (tmp_path / "two.csv").write_text("height,bent,visits\n170,0.001,3\n180,0.001,2\n")
    assert main(["score", str(trained[0]), str(tmp_path / "two.csv")]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.startswith("2 rows (separator ',', names of columns in line 1): mean log")


def test_draws_are_rows_again(tmp_path, capsys):
    # names 0, 1, 2 are no row: rows of the draws are all that is scored
    rows = np.random.default_rng(0).normal(size=(200, 3))
    np.save(tmp_path / "rows.npy", rows)
    run, draws = str(tmp_path / "run"), str(tmp_path / "draws.csv")
    assert main(["fit", str(tmp_path / "rows.npy"), "-o", run, *FIT]) == 0
    assert main(["sample", run, "-n", "1000", "-o", draws]) == 0
    capsys.readouterr()
    assert main(["score", run, draws]) == 0
    assert capsys.readouterr().err.startswith("1000 rows")
    assert main(["fit", draws, "-o", str(tmp_path / "again"), *FIT]) == 0
    out = capsys.readouterr().out
    assert out.startswith("read draws.csv: separator ',', names of columns in line 1\n")
    assert "draws.csv: 1000 rows, 3 columns" in out


@pytest.mark.parametrize("names", ["a,b", "0,1", "2019,2020"])
@pytest.mark.parametrize("index", [False, True])
def test_frames_of_pandas_have_the_density_of_their_columns(names, index, tmp_path, capsys):
    # with the header as a row, or the index as a column, the mean log density was -1619 and -158
    rows = np.random.default_rng(0).normal(size=(1000, 2))
    frame = pd.DataFrame(rows, columns=names.split(","))
    frame.to_csv(tmp_path / "frame.csv", index=index)
    run = str(tmp_path / "run")
    assert main(["fit", str(tmp_path / "frame.csv"), "-o", run, *FIT]) == 0
    assert "frame.csv: 1000 rows, 2 columns" in capsys.readouterr().out
    assert main(["score", run, str(tmp_path / "frame.csv")]) == 0
    said = re.match(r"1000 rows .*mean log density (\S+) nats", capsys.readouterr().err)
    assert float(said[1]) == pytest.approx(-(np.log(2 * np.pi) + 1.0), abs=0.1)  # -2.8379


def test_what_is_said_of_a_file_reaches_its_reader(tmp_path, capsys):
    rows = [f"{i};{i % 7},5;{1.0 / (i + 1):.6f};note" for i in range(40)]
    path = tmp_path / "odd.txt"
    path.write_text("!by hand\n" + "\n".join(rows).replace(".", ","))
    said = ["--sep", ";", "--decimal", ",", "--comment", "!", "--header", "no", "--index", "no"]
    more = ["--exclude", "3", "1", "--discrete", "keep", "--encoding", "ascii"]
    assert main(["fit", str(path), "-o", str(tmp_path / "run"), *FIT, *said, *more]) == 0
    out = capsys.readouterr().out
    assert "separator ';', decimal ',', comments '!', no names of columns" in out
    assert "40 rows, 2 columns" in out


def test_columns_to_exclude_must_be_there(table, tmp_path, fails):
    line = fails("fit", table, "-o", tmp_path / "run", "--exclude", "weight")
    assert "the columns weight, to exclude, in data.csv, got height, bent, visits" in line
