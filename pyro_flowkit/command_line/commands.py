"""The five commands; each takes the parsed arguments and prints what it found."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_flowkit.command_line import report
from pyro_flowkit.command_line.density import Trained, TrainOptions, train
from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.command_line.flow import FlowSettings
from pyro_flowkit.command_line.runs import Run, check_free, new_file, read_run, write_run
from pyro_flowkit.command_line.tables import (
    Split,
    Table,
    check_table,
    choose_columns,
    read_table,
    split_rows,
)


def fit(args: argparse.Namespace) -> None:
    """Train the density of a table and write its run folder."""
    path, folder = Path(args.data), Path(args.output)
    check_free(folder, overwrite=args.overwrite)
    frame = read_table(path, key=args.key)
    values, columns = choose_columns(frame, args.columns, where=path.name)
    table = check_table(values, columns, discrete=args.discrete, where=path.name)
    split = split_rows(len(table.values), len(table.columns), args.seed)
    settings = FlowSettings(
        layers=args.layers,
        width=args.width,
        bins=args.bins,
        dropout=args.dropout,
    )
    options = TrainOptions(
        steps=args.steps,
        seconds=args.seconds,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    discrete = [name for name, flag in zip(table.columns, table.discrete, strict=True) if flag]
    print(
        f"{path.name}: {len(table.values)} rows, {len(table.columns)} columns; {len(split.train)} rows to train, "
        f"{len(split.validation)} to validate, {len(split.test)} to test"
    )
    if discrete:
        print(f"integers, trained with noise: {', '.join(discrete)}")
    if table.dropped:
        print(f"left out as discrete: {', '.join(table.dropped)}")
    sys.stdout.flush()
    trained = train(table, split, settings, options, progress=sys.stderr.isatty())
    run = _run(path, table, split, options, trained)
    write_run(folder, run, overwrite=args.overwrite)
    print(*report.summary(run.metrics, discrete), f"written to {folder}", sep="\n")


def score(args: argparse.Namespace) -> None:
    """Write the log density of every row."""
    run, path = read_run(Path(args.run)), Path(args.data)
    columns = run.density.preparation.columns
    frame = read_table(path, key=args.key)
    values, _ = choose_columns(frame, columns, where=path.name)
    _check_integers(values, run, where=path.name)
    log_prob = report.score(run, torch.from_numpy(values))
    _write_table(pd.DataFrame({"log_prob": log_prob}), args)
    error = (
        f" (s.e. {log_prob.std(ddof=1) / len(log_prob) ** 0.5:.4f})" if len(log_prob) > 1 else ""
    )
    print(
        f"{len(log_prob)} rows: mean log density {log_prob.mean():.4f} nats{error}", file=sys.stderr
    )


def sample(args: argparse.Namespace) -> None:
    """Write rows drawn from the density."""
    density = read_run(Path(args.run)).density
    draws = density.sample(args.count, seed=args.seed).numpy()
    preparation = density.preparation
    table = pd.DataFrame(draws, columns=list(preparation.columns))
    for name, flag in zip(preparation.columns, preparation.discrete, strict=True):
        if flag:
            table[name] = table[name].astype(np.int64)
    _write_table(table, args)


def compare(args: argparse.Namespace) -> None:
    """Print runs side by side."""
    if len(set(args.runs)) < len(args.runs):
        raise CommandError(f"expected every run once, got {' '.join(args.runs)}")
    print(*report.comparison({name: read_run(Path(name)) for name in args.runs}), sep="\n")


def diagnose(args: argparse.Namespace) -> None:
    """Print what to make of a run."""
    print(*report.diagnosis(read_run(Path(args.run))), sep="\n")


def _run(
    path: Path,
    table: Table,
    split: Split,
    options: TrainOptions,
    trained: Trained,
) -> Run:
    result = trained.result
    info: dict[str, Any] = {
        "data": {
            "file": path.name,
            "rows": len(table.values),
            "columns": list(table.columns),
            "dropped": list(table.dropped),
            "fingerprint": table.fingerprint(),
            "split_seed": options.seed,
        },
        "settings": trained.settings.to_json(),
        "options": vars(options).copy(),
        "versions": result.versions,
    }
    test = {
        "row": split.test,
        "log_prob": trained.log_prob["test"].numpy(),
        "gaussian": trained.gaussian_log_prob["test"].numpy(),
    }
    tables = {"history": result.history, "validation": result.validation, "test": test}
    return Run(info, report.metrics_of(trained), trained.density, tables)


def _check_integers(values: np.ndarray, run: Run, *, where: str) -> None:
    preparation = run.density.preparation
    flags = np.array(preparation.discrete)
    broken = (values != np.round(values)).any(0) & flags
    if broken.any():
        names = [name for name, bad in zip(preparation.columns, broken, strict=True) if bad]
        raise CommandError(
            f"expected integers in {where}, as in training, got other values in {', '.join(names)}"
        )


def _write_table(table: pd.DataFrame, args: argparse.Namespace) -> None:
    if args.output is None:
        table.to_csv(sys.stdout, index=False)
        return
    with new_file(Path(args.output), overwrite=args.overwrite) as path:
        table.to_csv(path, index=False)
