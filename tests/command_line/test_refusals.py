"""What is refused: one line that says what is wrong, exit status 2, and nothing written."""

import builtins
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from pyro_flowkit.__main__ import main
from tests.tables.small import FIT, small_table


@pytest.fixture
def refused(tmp_path, fails):
    """Writes a table, fits it, and returns the one line of the error; nothing may have been written."""

    def run(table, *options, name="table.csv"):
        table.to_csv(tmp_path / name, index=False)
        before = sorted(tmp_path.iterdir())
        line = fails("fit", tmp_path / name, "-o", tmp_path / "run", *FIT, *options)
        assert sorted(tmp_path.iterdir()) == before
        return line

    return run


def test_missing_columns(refused):
    assert "the columns weight in table.csv, got height, bent" in refused(
        small_table(), "--columns", "height", "weight"
    )


def test_a_column_named_twice(refused):
    assert "each column once, got height, height" in refused(
        small_table(), "--columns", "height", "height"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(refused, bad):
    table = small_table()
    table.loc[[5, 9], "bent"] = bad
    line = refused(table)
    assert "2 of 400 rows (first: row 5" in line and "columns bent" in line


def test_constant_columns(refused):
    assert "one value only in always" in refused(small_table().assign(always=1.5))


def test_equal_columns(refused):
    table = small_table()
    assert "'height' and 'again' with the same values" in refused(
        table.assign(again=table["height"])
    )


def test_a_column_that_others_determine(refused):
    table = small_table()
    line = refused(table.assign(feet=table["height"] / 30.48))
    assert "linear function of others, got 'feet'" in line


def test_a_column_that_is_constant_among_the_training_rows_only(refused):
    table = small_table(rows=40)
    odd = np.zeros(40)
    odd[np.random.default_rng(0).permutation(40)[-1]] = 1.5
    line = refused(table.assign(odd=odd), "--discrete", "keep")
    assert "vary among the training rows, got one value in odd" in line


def test_text_columns(refused):
    line = refused(small_table().assign(name="someone"))
    assert (
        "got text or dates in name ('someone' in row 0, counted from 0): leave them out (exclude)"
        in line
    )


def test_discrete_columns_that_are_no_integers(refused):
    table = small_table()
    line = refused(table.assign(level=0.5 * (table["visits"] % 3) + 0.25))
    assert "few distinct values in level (3)" in line and "discrete: drop" in line


def test_discrete_columns_only(refused):
    table = small_table()[["visits"]]
    assert "got discrete ones only" in refused(table, "--discrete", "drop")


def test_too_few_rows(refused):
    assert "at least 20 rows in table.csv, got 12" in refused(small_table(rows=12))


def test_too_few_rows_for_so_many_columns(refused):
    wide = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 40))).add_prefix("x")
    assert "at least 53 rows for 40 columns, got 30" in refused(wide)


def test_a_header_with_equal_names(tmp_path, fails):
    (tmp_path / "twice.csv").write_text("a,b,a\n" + "1,2,3\n" * 30)
    assert "a name of its own, got twice: ['a']" in fails(
        "fit", tmp_path / "twice.csv", "-o", tmp_path / "run"
    )


def test_a_file_that_does_not_exist(tmp_path, fails):
    line = fails("fit", tmp_path / "none.csv", "-o", tmp_path / "run")
    assert "none.csv, which does not exist" in line


def test_an_array_with_objects_is_not_unpickled(tmp_path, fails):
    np.savez(tmp_path / "objects.npz", x=np.array([[{}]], dtype=object))
    assert "allow_pickle=False" in fails("fit", tmp_path / "objects.npz", "-o", tmp_path / "run")


def test_several_arrays_need_a_key(tmp_path, fails):
    rows = np.random.default_rng(0).normal(size=(50, 2))
    np.savez(tmp_path / "two.npz", a=rows, b=rows + 1.0, c=rows[:, 0])
    command = ["fit", tmp_path / "two.npz", "-o", tmp_path / "run"]
    assert "--key for one of the tables in two.npz: a, b" in fails(*command)
    assert "--key to be one of a, b, c, got 'd'" in fails(*command, "--key", "d")
    assert "two dimensions, got c of shape (50,)" in fails(*command, "--key", "c")
    assert main([*map(str, command), *FIT, "--key", "b"]) == 0


def test_a_key_without_npz(table, tmp_path, fails):
    assert "--key with an npz file only" in fails("fit", table, "-o", tmp_path / "r", "--key", "a")


def test_parquet_without_pyarrow(tmp_path, fails, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("pyarrow", "fastparquet"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    line = fails("fit", tmp_path / "rows.parquet", "-o", tmp_path / "run")
    assert "pip install pyarrow" in line


def test_a_run_folder_that_exists(trained, table, tmp_path, fails):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    before = (folder / "run.json").read_bytes()
    assert "--overwrite replaces it" in fails("fit", table, "-o", folder)
    assert (folder / "run.json").read_bytes() == before


def test_a_folder_with_other_things_is_never_overwritten(table, tmp_path, fails):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    line = fails("fit", table, "-o", tmp_path / "photos", "--overwrite")
    assert "holds something else" in line
    assert (tmp_path / "photos" / "one.png").exists()
    assert "got the file" in fails("fit", table, "-o", table, "--overwrite")
    assert "got none" in fails("fit", table, "-o", tmp_path / "no" / "folder")


def test_files_of_scores_and_draws_that_exist(trained, tmp_path, fails):
    out = tmp_path / "out.csv"
    out.write_text("precious")
    assert "--overwrite replaces it" in fails("sample", trained[0], "-o", out)
    assert out.read_text() == "precious"
    assert main(["sample", str(trained[0]), "-o", str(out), "--overwrite", "-n", "2"]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert "expected to write" in fails("sample", trained[0], "-o", tmp_path / "no" / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv"]


@pytest.mark.parametrize("command", ["score", "sample", "compare", "diagnose"])
def test_folders_that_hold_no_run(command, table, tmp_path, fails):
    more = [table] if command == "score" else []
    assert "which does not exist" in fails(command, tmp_path / "none", *more)
    assert "was not written by `fit`" in fails(command, tmp_path, *more)


@pytest.mark.parametrize("name", ["flow.pt", "preparation.json", "metrics.json", "test.csv"])
def test_damaged_and_missing_files(name, trained, tmp_path, fails):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} as it was written, got a damaged file" in fails("diagnose", folder)
    (folder / name).unlink()
    assert f"{name} in the run folder, got none" in fails("diagnose", folder)


def test_a_damaged_list_of_files(trained, tmp_path, fails):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text[: len(text) // 2])
    assert "a whole run in" in fails("diagnose", folder)
    info = json.loads(text)
    (folder / "run.json").write_text(json.dumps({**info, "format_version": 99}))
    assert "format 2, got 99" in fails("diagnose", folder)
    info["settings"]["width"] = 17
    (folder / "run.json").write_text(json.dumps(info))
    assert "a whole run in" in fails("diagnose", folder)


def test_rows_to_score(trained, tmp_path, fails):
    folder, _ = trained
    table = small_table(rows=5)
    table.drop(columns="bent").to_csv(tmp_path / "fewer.csv", index=False)
    assert "the columns bent in fewer.csv" in fails("score", folder, tmp_path / "fewer.csv")
    table.assign(visits=0.5).to_csv(tmp_path / "halves.csv", index=False)
    assert "integers in halves.csv" in fails("score", folder, tmp_path / "halves.csv")


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--seconds", "nan"],
        ["--steps", "many"],
        ["--bins", "1"],
        ["--dropout", "1"],
        ["--seed", "-1"],
        ["--seed", str(2**40)],
        ["--width", str(10**9)],
        ["--layers", str(10**9)],
        ["--discrete", "perhaps"],
    ],
)
def test_numbers_out_of_range(options, table, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", str(table), "-o", str(tmp_path / "run"), *options])
    assert stopped.value.code == 2
    assert f"argument {options[0]}:" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
