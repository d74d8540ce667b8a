"""The command line's densities of tables, with its defaults, on every table of an npz file.

Of each table the columns with more than 5 % distinct values, standardised by the training rows; the split of the
command line (80 % to train, 10 % to validate, 10 % to test). Test log-likelihoods beside that of the full-covariance
Gaussian of the training rows; their difference is paired over the test rows. In some tables values repeat, in columns
that pass for continuous; a density that is narrow around such values gains by it.

    python -m benchmarks.tables DATA.npz
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit.tables.columns import Table
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import FlowSettings
from pyro_flowkit.tables.metrics import metrics_of
from pyro_flowkit.tables.split import split_rows
from pyro_flowkit.tables.training import BATCH_SIZE, TrainOptions, default_steps, train

MIN_DISTINCT = 0.05


def tables_of(path: Path) -> dict[str, np.ndarray]:
    """Every array of two dimensions, by its name without the ending "_xy"; its columns with enough distinct values."""
    found = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            values = file[key]
            if values.ndim == 2:
                values = values.astype(np.float64)
                distinct = np.array([len(np.unique(column)) for column in values.T])
                found[key.removesuffix("_xy")] = values[:, distinct > MIN_DISTINCT * len(values)]
    return found


def measure(values: np.ndarray, *, steps: int | None, seed: int) -> dict[str, Any]:
    """Train on one table; the metrics of the command line with the CPU seconds.

    The default limit of time is left out: what it cuts off depends on what else the machine does.
    """
    split = split_rows(*values.shape, seed)
    steps = default_steps(len(split.train), BATCH_SIZE) if steps is None else steps
    part = values[split.train]
    rows = Table(
        (values - part.mean(0)) / part.std(0),
        tuple(map(str, range(values.shape[1]))),
        (False,) * values.shape[1],
    )
    options = TrainOptions(steps=steps, seed=seed)
    begun = time.process_time()
    trained = train(rows, split, FlowSettings(), options, progress=False)
    cpu = time.process_time() - begun
    return {**metrics_of(trained), "CPU s": cpu, "D": values.shape[1]}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Print the table and write it to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "data", type=Path, help="npz file, an array of two dimensions for each table"
    )
    parser.add_argument("--only", nargs="+", help="names of tables, instead of all")
    parser.add_argument("--steps", type=int, default=None, help="of each, instead of the default")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training")
    parser.add_argument("--output", default=RESULTS / "tables.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found, left_out = {}, []
    for name, values in tables_of(args.data).items():
        if args.only and name not in args.only:
            continue
        try:
            if not values.shape[1]:
                raise TableError("no column with enough distinct values")
            found[name] = measure(values, steps=args.steps, seed=args.seed)
        except TableError as error:
            left_out.append(f"{name}: {error}")
            continue
        row = found[name]
        print(name, {key: row[key] for key in ("validation", "test", "best_step")}, flush=True)
    report = Report("Densities of tables from the command line, with its defaults")
    report.add(
        "Test log-likelihood (nats per row, standardised columns), standard errors in brackets.", ""
    )
    header = [
        "table",
        "D",
        "training rows",
        "Gaussian",
        "flow",
        "difference",
        "kept",
        "steps",
        "CPU seconds",
    ]
    report.add(*table(header, [_cells(name, row) for name, row in found.items()]))
    if left_out:
        report.add("", *(f"Left out: {line}." for line in left_out))
    report.save(args.output)
    return found


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    test, scale = row["test"], row["log_scale"]
    return [
        name,
        str(row["D"]),
        str(row["train"]["rows"]),
        f"{test['gaussian'][0] + scale:.3f}",
        f"{test['log_prob'][0] + scale:.3f}",
        f"{test['difference'][0]:+.3f} ({test['difference'][1]:.3f})",
        row["kept"],
        f"{row['best_step']} of {row['steps']}",
        f"{row['CPU s']:.0f}",
    ]


if __name__ == "__main__":
    main()
