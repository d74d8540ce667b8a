"""Nothing of the user's is deleted or replaced, and what cannot be written is known before training."""

import contextlib
import os
import shutil
import sys

import pytest

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line.places import reserved
from pyro_flowkit.command_line.runs import read_run
from tests.tables.small import FIT


@pytest.fixture
def run(trained, tmp_path):
    """A run that may be changed."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def test_overwriting_leaves_what_fit_did_not_write(run, table):
    (run / "notes.txt").write_text("mine")
    (run / "figures").mkdir()
    (run / "figures" / "one.png").write_text("mine, too")
    assert main(["fit", str(table), "-o", str(run), *FIT, "--overwrite", "--seed", "7"]) == 0
    assert read_run(run).info["options"]["seed"] == 7
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "figures" / "one.png").read_text() == "mine, too"
    assert sorted(os.listdir(run.parent)) == ["data.csv", "run"]


def test_files_of_a_run_that_somebody_changed_are_not_overwritten(run, fails):
    # no data are read: what may not be written is known before
    command = ["fit", run.parent / "none.csv", "-o", run, "--overwrite"]
    (run / "metrics.json").write_text("my own numbers")
    assert "got others: metrics.json" in fails(*command)
    assert (run / "metrics.json").read_text() == "my own numbers"
    (run / "run.json").write_text("{")
    assert "damaged run.json: remove it by hand" in fails(*command)
    assert (run / "run.json").read_text() == "{"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000])
def test_a_deeply_nested_file_is_damage(content, run, fails):
    (run / "run.json").write_text(content)
    assert "a whole run in" in fails("diagnose", run)
    assert "damaged run.json" in fails("fit", "none.csv", "-o", run, "--overwrite")


def test_links_are_followed(trained, table, tmp_path, fails):
    (tmp_path / "new").symlink_to(tmp_path / "place")
    (tmp_path / "to itself").symlink_to(tmp_path / "to itself")
    (tmp_path / "nowhere").symlink_to(tmp_path / "no" / "folder")
    assert main(["fit", str(table), "-o", str(tmp_path / "new"), *FIT]) == 0
    assert (tmp_path / "new").is_symlink() and read_run(tmp_path / "place").metrics
    command = ["fit", str(table), "-o", str(tmp_path / "new"), *FIT, "--overwrite", "--seed", "2"]
    assert main(command) == 0
    assert (tmp_path / "new").is_symlink()
    assert read_run(tmp_path / "place").info["options"]["seed"] == 2
    assert "to itself" in fails("fit", "none.csv", "-o", tmp_path / "to itself")
    assert "got none" in fails("fit", "none.csv", "-o", tmp_path / "nowhere")
    draws = tmp_path / "draws.csv"
    draws.write_text("old")
    (tmp_path / "link.csv").symlink_to(draws)
    words = ["sample", str(trained[0]), "-n", "3", "-o", str(tmp_path / "link.csv"), "--overwrite"]
    assert main(words) == 0
    assert (tmp_path / "link.csv").is_symlink() and len(draws.read_text().splitlines()) == 4


def test_a_second_fit_into_a_folder_is_refused_at_its_start(table, tmp_path, fails):
    with reserved(tmp_path / "run", overwrite=False):
        line = fails("fit", "none.csv", "-o", tmp_path / "run")
        assert "a folder that no other fit is to write, got" in line
        assert f"in which process {os.getpid()} on" in line
    assert main(["fit", str(table), "-o", str(tmp_path / "run"), *FIT]) == 0
    assert sorted(os.listdir(tmp_path)) == ["data.csv", "run"]


def test_devices_are_written_to_and_not_replaced(trained, fails):
    assert main(["sample", str(trained[0]), "-n", "3", "-o", os.devnull]) == 0
    assert os.path.exists(os.devnull) and not os.path.isfile(os.devnull)
    assert "No space left" in fails("sample", trained[0], "-o", "/dev/full", "--overwrite")


def test_a_full_disk_behind_standard_output_is_an_error_in_words(trained, monkeypatch, capsys):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["sample", str(trained[0]), "-n", "3"]) == 2
        sys.stdout.close()  # which nobody reads any more
    assert "expected to read and write, got [Errno 28] No space left" in capsys.readouterr().err


def test_scores_replace_neither_their_rows_nor_a_part_of_a_run(run, table, fails):
    before = table.read_bytes()
    command = ["score", run, table, "--overwrite", "-o"]
    assert "which holds the rows to score" in fails(*command, table)
    assert "which is part of a run" in fails(*command, run / "test.csv")
    assert table.read_bytes() == before and read_run(run).metrics
