"""The run folder: plain files, written whole or not at all.

run.json          what was trained on what, with which settings and versions; checksums of the other files
preparation.json  columns, and the map between their units and what the flow sees
metrics.json      log densities (nats per row) of the three parts of the rows, and how training ended
flow.pt           the flow's tensors (``torch.load(..., weights_only=True)``); absent where the Gaussian was kept
history.csv       every step; validation.csv: every validation
test.csv          log density of every test row, under the run's density and the Gaussian
"""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.command_line.places import FILES, FORMAT, checksum, is_run, write_folder
from pyro_flowkit.tables.atoms import AtomHeads
from pyro_flowkit.tables.flow import FlowSettings, TableFlow
from pyro_flowkit.tables.preparation import Preparation
from pyro_flowkit.tables.rows import RowDensity

FORMAT_VERSION = 2
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


def write_run(target: Path, run: Run, *, overwrite: bool = False) -> None:
    """Write a run; after an error nothing has changed.

    Raises:
        CommandError: if something is there that may not be replaced, or the disk refuses.
    """
    write_folder(target, partial(_write_files, run=run), overwrite=overwrite)


def read_run(folder: Path) -> Run:
    """Read a run back.

    Raises:
        CommandError: if the folder holds no run, one of another version, or a damaged one.
    """
    if not folder.is_dir():
        raise CommandError(f"Expected a run folder, got {folder}, which does not exist")
    if not is_run(folder):
        raise CommandError(f"Expected a run folder, got {folder}, which was not written by `fit`")
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info["format_version"] != FORMAT_VERSION:
            raise CommandError(
                f"Expected a run of format {FORMAT_VERSION}, got {info['format_version']!r} in {folder}"
            )
        for name in FILES[1:]:
            if name in info["files"] and checksum(folder / name) != info["files"][name]:
                raise CommandError(
                    f"Expected {folder / name} as it was written, got a damaged file"
                )
        content = _json(folder / "preparation.json")
        preparation, heads = Preparation.from_json(content), None
        flow = None
        if "flow.pt" in info["files"]:
            flow = TableFlow(len(preparation.columns), FlowSettings(**info["settings"]))
            flow.load_state_dict(torch.load(folder / "flow.pt", weights_only=True))
            flow.eval()
        if "atoms" in content:
            heads = AtomHeads(**content["atoms"])
            heads.load_state_dict(torch.load(folder / "atoms.pt", weights_only=True))
            heads.eval()
        return Run(
            info,
            _json(folder / "metrics.json"),
            RowDensity(preparation, flow, heads),
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


def _write_files(folder: Path, run: Run) -> None:
    content = run.density.preparation.to_json()
    if run.density.heads is not None:
        content["atoms"] = run.density.heads.to_json()
    _write(folder / "preparation.json", _text(content))
    _write(folder / "metrics.json", _text(run.metrics))
    for name in TABLES:
        table = pd.DataFrame(dict(run.tables[name]))
        _write(folder / f"{name}.csv", table.to_csv(index=False, na_rep="nan"))
    density = run.density
    for name, module in (("flow.pt", density.flow), ("atoms.pt", density.heads)):
        if module is not None:
            torch.save(module.state_dict(), folder / name)
    files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    info = {"format": FORMAT, "format_version": FORMAT_VERSION, **run.info, "files": files}
    _write(folder / "run.json", _text(info))
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns by name. Python reads every digit of a number, pandas not in all of its versions."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), len(header)).T
    integers = ("row", "copy_of", "step")
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
