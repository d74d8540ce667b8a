"""The run folder: plain files, written whole or not at all.

    run.json          what was trained on what, with which settings and versions; checksums of the other files
    preparation.json  columns, and the map between their units and what the flow sees
    metrics.json      log densities (nats per row) of the three parts of the rows, and how training ended
    flow.pt           the flow's tensors (``torch.load(..., weights_only=True)``); absent where the Gaussian was kept
    history.csv       every step; validation.csv: every validation
    test.csv          log density of every test row, under the run's density and the Gaussian

Files go into a new folder beside the target, which takes the target's name only when all of them are on disk.
"""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.tables.flow import FlowSettings, TableFlow
from pyro_flowkit.tables.preparation import Preparation
from pyro_flowkit.tables.rows import RowDensity

FORMAT, FORMAT_VERSION = "pyro-flowkit run", 1
TABLES = ("history", "validation", "test")


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        info: run.json: "settings", "options", "data" (with its fingerprint and the split), "versions".
        metrics: metrics.json.
        density: the density of the rows.
        tables: "history", "validation" and "test", columns by name.
    """

    info: dict[str, Any]
    metrics: dict[str, Any]
    density: RowDensity
    tables: Mapping[str, Mapping[str, np.ndarray]]


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Whether a run may be written there.

    Raises:
        CommandError: if something is there that may not be replaced.
    """
    if not folder.exists():
        if not folder.absolute().parent.is_dir():
            raise CommandError(
                f"Expected a folder {folder.absolute().parent} to write {folder.name} to, got none"
            )
        return
    if not folder.is_dir():
        raise CommandError(f"Expected a folder for the run, got the file {folder}")
    if not any(folder.iterdir()):
        return
    if not _is_run(folder):
        raise CommandError(
            f"Expected a new folder for the run, got {folder}, which holds something else"
        )
    if not overwrite:
        raise CommandError(
            f"Expected a new folder for the run, got {folder}, which holds one: --overwrite replaces it"
        )


def write_run(folder: Path, run: Run, *, overwrite: bool = False) -> None:
    """Write a run; after an error nothing has changed.

    Raises:
        CommandError: if something is there that may not be replaced, or the disk refuses.
    """
    check_free(folder, overwrite=overwrite)
    target = folder.absolute()
    try:
        with _scratch(target) as scratch:
            _write_files(scratch, run)
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.replace(target, old)
                try:
                    os.replace(scratch, target)
                except OSError:
                    os.replace(old, target)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(scratch, target)
    except OSError as error:
        raise CommandError(f"Expected to write {folder}, got {error}") from error


def read_run(folder: Path) -> Run:
    """Read a run back.

    Raises:
        CommandError: if the folder holds no run, one of another version, or a damaged one.
    """
    if not folder.is_dir():
        raise CommandError(f"Expected a run folder, got {folder}, which does not exist")
    if not _is_run(folder):
        raise CommandError(f"Expected a run folder, got {folder}, which was not written by `fit`")
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info["format_version"] != FORMAT_VERSION:
            raise CommandError(
                f"Expected a run of format {FORMAT_VERSION}, got {info['format_version']!r} in {folder}"
            )
        for name, checksum in info["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != checksum:
                raise CommandError(
                    f"Expected {folder / name} as it was written, got a damaged file"
                )
        preparation = Preparation.from_json(_json(folder / "preparation.json"))
        flow = None
        if "flow.pt" in info["files"]:
            flow = TableFlow(len(preparation.columns), FlowSettings(**info["settings"]))
            flow.load_state_dict(torch.load(folder / "flow.pt", weights_only=True))
            flow.eval()
        return Run(
            info,
            _json(folder / "metrics.json"),
            RowDensity(preparation, flow),
            {name: _read_csv(folder / f"{name}.csv") for name in TABLES},
        )
    except CommandError:
        raise
    except FileNotFoundError as error:
        raise CommandError(f"Expected {error.filename} in the run folder, got none") from error
    except (
        Exception
    ) as error:  # whatever else does not fit together is damage, of one kind or another
        reason = str(error).strip().split("\n")[0]
        raise CommandError(
            f"Expected a whole run in {folder}, got {type(error).__name__}: {reason}"
        ) from error


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place at the end.

    Raises:
        CommandError: if there is such a file and it may not be replaced, or the disk refuses.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        advice = "" if path.is_dir() else ", which exists: --overwrite replaces it"
        raise CommandError(f"Expected a new file, got {path}{advice}")
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.absolute().parent
        ) as scratch:
            yield Path(scratch) / path.name
            os.replace(Path(scratch) / path.name, path)
    except OSError as error:
        raise CommandError(f"Expected to write {path}, got {error}") from error


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, gone at the end unless it was renamed."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_files(folder: Path, run: Run) -> None:
    _write(folder / "preparation.json", _text(run.density.preparation.to_json()))
    _write(folder / "metrics.json", _text(run.metrics))
    for name in TABLES:
        table = pd.DataFrame(dict(run.tables[name]))
        _write(folder / f"{name}.csv", table.to_csv(index=False, na_rep="nan"))
    if run.density.flow is not None:
        torch.save(run.density.flow.state_dict(), folder / "flow.pt")
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }
    info = {"format": FORMAT, "format_version": FORMAT_VERSION, **run.info, "files": files}
    _write(folder / "run.json", _text(info))
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _is_run(folder: Path) -> bool:
    try:
        content = _json(folder / "run.json")
    except (OSError, ValueError):
        # damaged, but ours: nobody else writes both names
        return (folder / "run.json").is_file() and (folder / "preparation.json").is_file()
    return isinstance(content, dict) and content.get("format") == FORMAT


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns by name. Python reads every digit of a number, pandas not in all of its versions."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), len(header)).T
    integers = ("row", "step")
    return {
        name: column.astype(np.int64) if name in integers else column
        for name, column in zip(header, columns, strict=True)
    }


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
