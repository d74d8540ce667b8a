"""Results in words: what ``fit`` prints, and what ``diagnose`` makes of it."""

import numpy as np
import torch
import xarray as xr

from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.command_line.reading import Source
from pyro_flowkit.command_line.runs import Run
from pyro_flowkit.diagnostics import compare_densities
from pyro_flowkit.tables import TableDensity
from pyro_flowkit.tables.metrics import PARTS, SMALL_GAP, gap_of, has_failed, table_verdict
from pyro_flowkit.tables.split import per_original


def opening(density: TableDensity, source: Source) -> list[str]:
    """The lines that ``fit`` prints at its beginning."""
    table, split = density.table, density.split
    lines = [f"read {source.name}: {source.notes}"] if source.notes else []
    lines.append(
        f"{source.name}: {len(table.values)} rows, {len(table.columns)} columns; {len(split.train)} rows to train, "
        f"{len(split.validation)} to validate, {len(split.test)} to test"
    )
    if table.noisy:
        lines.append(f"integers, trained with noise: {', '.join(table.noisy)}")
    left_out = len(source.frame) - len(table.values)
    if left_out:
        lines.append(f"{left_out} rows with missing values left out")
    if table.filled:
        lines.append(f"{table.filled} rows filled in from rows like them, to train only")
    for name, atoms in table.atoms.items():
        column = table.values[:, table.columns.index(name)]
        shares = [f"{value:g} in {(column == value).mean():.0%} of the rows" for value in atoms]
        lines.append(f"atoms in {name}, which count by their probability: {', '.join(shares)}")
    if table.rounded:
        counts = ", ".join(f"{name} ({count} values)" for name, count in table.rounded.items())
        lines.append(
            f"rounded, and treated as continuous: {counts}; their density may follow the grid"
        )
    copies = len(split.copy_of) - len(np.unique(split.copy_of))
    if copies:
        lines.append(f"{copies} rows are copies of others, and in the same part as these")
    if table.dropped:
        lines.append(f"left out as discrete: {', '.join(table.dropped)}")
    return lines


def summary(density: TableDensity) -> list[str]:
    """The lines that ``fit`` prints at its end."""
    metrics, discrete = density.metrics, density.table.noisy
    test, scale = metrics["test"], metrics["log_scale"]
    is_flow = metrics["kept"] == "flow"
    outcome = (
        f"kept step {metrics['best_step']}"
        if is_flow
        else "no gain on the validation rows, so the Gaussian is kept"
        if metrics["steps"]
        else "so the Gaussian is kept"
    )
    if is_flow and metrics["base"] == "student_t":
        outcome += ", on a base of Student's t for tails without a variance"
    lines = [
        f"{metrics['steps']} steps in {metrics['seconds']:.1f} s ({metrics['stop_reason']}); {outcome}",
        f"test log-likelihood of {test['rows']} rows, nats per row in the units of the file (in brackets: of "
        "standardised columns):",
    ]
    names = {
        "flow" if is_flow else "kept": "log_prob",
        "full-covariance Gaussian": "gaussian",
    }
    width = max(len(name) for name in (*names, "difference"))
    for name, key in names.items():
        value, error = test[key]
        lines.append(f"  {name:<{width}} {value:10.4f}  s.e. {error:.4f}  [{value + scale:.4f}]")
    value, error = test["difference"]
    lines.append(f"  {'difference':<{width}} {value:+10.4f}  s.e. {error:.4f}  (paired)")
    if discrete:
        lines.append(f"  integers, counted by their probability: {', '.join(discrete)}")
    return lines


def diagnosis(run: Run) -> list[str]:
    """What ``diagnose`` prints."""
    metrics = run.metrics
    kept = "flow" if metrics["kept"] == "flow" else "full-covariance Gaussian"
    lines = [
        str(table_verdict(metrics)),
        "",
        f"density: {kept} of {len(run.density.columns)} columns, nats per row in the units of the file",
        f"  {'rows':<12}{'number':>8}{'log p':>12}{'Gaussian':>12}{'difference':>12}{'s.e.':>9}",
    ]
    for part in PARTS:
        entry = metrics[part]
        lines.append(
            f"  {part:<12}{entry['rows']:>8}{entry['log_prob'][0]:>12.4f}{entry['gaussian'][0]:>12.4f}"
            f"{entry['difference'][0]:>+12.4f}{entry['difference'][1]:>9.4f}"
        )
    gap, error = gap_of(metrics)
    early = metrics["best_step"] < 0.8 * metrics["steps"]
    lines += [
        f"overfitting: the gain over the Gaussian is {gap:+.4f} nats (s.e. {error:.4f}) greater on training rows than "
        "on test rows",
        f"training: {metrics['steps']} steps in {metrics['seconds']:.1f} s, ended by {metrics['stop_reason']}; best on "
        f"validation rows at step {metrics['best_step']}"
        + (": later steps overfitted" if early and metrics["kept"] == "flow" else ""),
        f"skipped steps (loss or gradient not finite): {metrics['skipped_steps']}",
    ]
    if metrics["kept"] == "flow" and not early and gap < SMALL_GAP and not has_failed(metrics):
        lines.append("hint: no sign of overfitting, so --seconds beyond its default may gain more")
    return lines


def comparison(runs: dict[str, Run]) -> list[str]:
    """Test log-likelihoods of runs on the same test rows, with their Gaussian, best first.

    Raises:
        CommandError: if the runs were made of different data, or their test rows differ.
    """
    (first_name, first), *others = runs.items()
    for name, other in others:
        for what, key in (
            ("columns", "columns"),
            ("data", "fingerprint"),
            ("test rows (another --seed)", "split_seed"),
        ):
            mine, theirs = first.info["data"][key], other.info["data"][key]
            same = set(mine) == set(theirs) if key == "columns" else mine == theirs
            if not same:
                detail = f": {mine} and {theirs}" if key != "fingerprint" else ""
                raise CommandError(
                    f"Expected runs with the same {what}, got {first_name} and {name} with different ones{detail}"
                )
        if not np.array_equal(first.tables["test"]["row"], other.tables["test"]["row"]):
            raise CommandError(
                f"Expected the same test rows in {first_name} and {name}, got others"
            )
    scores = {name: _dataset(run, "log_prob") for name, run in runs.items()}
    scores["full-covariance Gaussian"] = _dataset(first, "gaussian")
    table = compare_densities(scores)
    width = max(len(name) for name in scores)
    lines = [
        f"{len(first.tables['test']['row'])} test rows, nats per row in the units of the file",
        f"{'':<{width}}{'log p':>12}{'s.e.':>9}{'difference':>12}{'s.e.':>9}",
    ]
    for index, row in table.iterrows():
        name = index[0] if isinstance(index, tuple) else str(index)
        lines.append(
            f"{name:<{width}}{row['nats']:>12.4f}{row['se']:>9.4f}{row['diff']:>+12.4f}{row['diff_se']:>9.4f}"
        )
    return [*lines, "difference: to the best, paired over the rows"]


def _dataset(run: Run, column: str) -> xr.Dataset:
    test = run.tables["test"]
    values = per_original(torch.from_numpy(test[column]), test["copy_of"]).numpy()
    return xr.Dataset({"log_prob": ("obs_id", values)}, {"obs_id": np.unique(test["copy_of"])})
