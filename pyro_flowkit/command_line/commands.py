"""The five commands; each takes the parsed arguments and prints what it found."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_flowkit.command_line import report
from pyro_flowkit.command_line.dialect import ReadOptions
from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.command_line.places import new_file, reserved
from pyro_flowkit.command_line.reading import Source, read_table
from pyro_flowkit.command_line.runs import Run, read_run, write_run
from pyro_flowkit.tables import FlowSettings, TableDensity
from pyro_flowkit.training.result import versions


def fit(args: argparse.Namespace) -> None:
    """Train the density of a table and write its run folder."""
    with reserved(Path(args.output), overwrite=args.overwrite) as target:
        source = read_table(args.data, read_options(args))
        density = TableDensity(
            source.frame,
            columns=args.columns,
            exclude=args.exclude,
            discrete=args.discrete,
            missing=args.missing,
            settings=FlowSettings(
                layers=args.layers,
                width=args.width,
                bins=args.bins,
                dropout=args.dropout,
                base=args.base,
            ),
            seed=args.seed,
            name=source.name,
        )
        options = {name: getattr(args, name) for name in ("steps", "seconds", "batch_size", "lr")}
        print(*report.opening(density, source), sep="\n", flush=True)
        density.fit(**options, progress=sys.stderr.isatty())
        run = _run(source.name, density, {**options, "seed": args.seed})
        write_run(target, run, overwrite=args.overwrite)
    print(*report.summary(density), f"written to {args.output}", sep="\n")


def score(args: argparse.Namespace) -> None:
    """Write the log density of every row."""
    density = read_run(Path(args.run)).density
    source = read_table(args.data, read_options(args), density.columns)
    log_prob = density.log_prob_of(
        source.frame, where=source.name, allow_missing=args.missing == "drop"
    )
    rows = np.flatnonzero(~np.isnan(log_prob))
    if not len(rows):
        raise CommandError(f"Expected rows without missing values in {source.name}, got none")
    without = len(log_prob) - len(rows)
    left_out = f"; {without} rows with missing values left out" if without else ""
    log_prob = log_prob[rows]
    _write_table(pd.DataFrame({"row": rows, "log_prob": log_prob}), args)
    error = (
        f" (s.e. {log_prob.std(ddof=1) / len(log_prob) ** 0.5:.4f})" if len(log_prob) > 1 else ""
    )
    print(
        f"{len(log_prob)} rows{_read_as(source)}: mean log density {log_prob.mean():.4f} nats{error}"
        f"{left_out}",
        file=sys.stderr,
    )


def sample(args: argparse.Namespace) -> None:
    """Write rows drawn from the density."""
    density = read_run(Path(args.run)).density
    _write_table(density.sample_frame(args.count, seed=args.seed), args)


def compare(args: argparse.Namespace) -> None:
    """Print runs side by side."""
    if len(set(args.runs)) < len(args.runs):
        raise CommandError(f"Expected every run once, got {' '.join(args.runs)}")
    print(*report.comparison({name: read_run(Path(name)) for name in args.runs}), sep="\n")


def diagnose(args: argparse.Namespace) -> None:
    """Print what to make of a run."""
    print(*report.diagnosis(read_run(Path(args.run))), sep="\n")


def read_options(args: argparse.Namespace) -> ReadOptions:
    """What the arguments say of the file with the table."""
    yes_or_no = {None: None, "yes": True, "no": False}
    return ReadOptions(
        key=args.key,
        encoding=args.encoding,
        separator=args.sep,
        decimal=args.decimal,
        thousands=args.thousands,
        comment=args.comment,
        header=yes_or_no[args.header],
        index=yes_or_no[args.index],
        missing=tuple(args.na),
    )


def _read_as(source: Source) -> str:
    return f" ({source.notes})" if source.notes else ""


def _run(file: str, density: TableDensity, options: dict[str, Any]) -> Run:
    table, trained = density.table, density.trained
    info: dict[str, Any] = {
        "data": {
            "file": file,
            "rows": len(table.values),
            "filled_in": table.filled,
            "columns": list(table.columns),
            "dropped": list(table.dropped),
            "atoms": {name: list(values) for name, values in table.atoms.items()},
            "fingerprint": table.fingerprint(),
            "split_seed": options["seed"],
        },
        "settings": trained.settings.to_json(),
        "options": options,
        "versions": versions(),
    }
    test = {
        "row": np.asarray(table.rows)[density.split.test],
        "copy_of": trained.copy_of["test"],
        "log_prob": trained.log_prob["test"].numpy(),
        "gaussian": trained.gaussian_log_prob["test"].numpy(),
    }
    result = trained.result
    none = {"step": np.empty(0)}
    tables = {
        "history": none if result is None else result.history,
        "validation": none if result is None else result.validation,
        "test": test,
    }
    return Run(info, density.metrics, trained.density, tables)


def _write_table(table: pd.DataFrame, args: argparse.Namespace) -> None:
    if args.output is None:
        table.to_csv(sys.stdout, index=False)
        return
    inputs = (Path(args.data),) if "data" in args else ()
    with new_file(Path(args.output), overwrite=args.overwrite, inputs=inputs) as path:
        table.to_csv(path, index=False)
