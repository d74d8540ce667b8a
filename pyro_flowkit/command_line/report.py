"""Results in words: what ``fit`` prints, and what ``diagnose`` makes of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_flowkit.command_line.density import Trained
from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.command_line.runs import Run
from pyro_flowkit.diagnostics import Verdict, compare_densities, heldout_log_prob

PARTS = ("train", "validation", "test")
_SMALL_GAP = 0.1  # nats
_MANY_SKIPPED = 0.01  # of all steps


def metrics_of(trained: Trained) -> dict[str, Any]:
    """Means and standard errors in nats per row, and how training ended."""
    result = trained.result
    history, seconds = result.history, result.history["seconds"]
    metrics: dict[str, Any] = {
        "kept": "gaussian" if trained.density.flow is None else "flow",
        "log_scale": trained.density.preparation.log_scale,
        "steps": len(history["step"]),
        "best_step": int(result.best_step),
        "skipped_steps": int(result.skipped_steps),
        "stop_reason": result.stop_reason,
        "seconds": float(seconds[-1]) if len(seconds) else 0.0,
    }
    for part in PARTS:
        own, gaussian = trained.log_prob[part], trained.gaussian_log_prob[part]
        metrics[part] = {
            "rows": len(own),
            "log_prob": _mean_and_error(own),
            "gaussian": _mean_and_error(gaussian),
            "difference": _mean_and_error(own - gaussian),
        }
    return metrics


def summary(metrics: dict[str, Any], discrete: Sequence[str]) -> list[str]:
    """The lines that ``fit`` prints at its end."""
    test, scale = metrics["test"], metrics["log_scale"]
    is_flow = metrics["kept"] == "flow"
    outcome = (
        f"kept step {metrics['best_step']}"
        if is_flow
        else "no gain on the validation rows, so the Gaussian is kept"
    )
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


def verdict_of(run: Run) -> Verdict:
    """A judgement of a run by its held-out rows.

    ====================================================  ======
    below the Gaussian, or many or persistent bad steps    bad
    the Gaussian itself, a large gap, or interrupted       usable
    otherwise                                              good
    ====================================================  ======

    A gap is large if the gain over the Gaussian is greater on training rows than on test rows by more than 0.1 nats, a
    tenth of the gain, and three standard errors.
    """
    metrics = run.metrics
    gain, error = metrics["test"]["difference"]
    if metrics["kept"] == "gaussian":
        reason = "the flow gained nothing on the validation rows, so the density is the full-covariance Gaussian"
        return Verdict(
            "usable", reason, "More rows, or fewer columns, give a flow more to learn from."
        )
    reason = f"it is {abs(gain):.3f} nats per test row (s.e. {error:.3f}) "
    reason += "above" if gain >= 0 else "below"
    reason += " the full-covariance Gaussian"
    gap, gap_error = _gap(metrics)
    if not math.isfinite(gain) or gain < -2 * error:
        return Verdict(
            "bad", reason, "Look for rows unlike the others; try more rows or --dropout 0.2."
        )
    if _failed(metrics):
        return Verdict(
            "bad",
            f"{reason}, but its training broke down",
            "Try a smaller --lr; look for outliers.",
        )
    if gap > max(_SMALL_GAP, 0.1 * gain, 3 * gap_error):
        advice = "Validation rows stopped it in time; --dropout 0.2, a smaller --width or more rows may gain more."
        return Verdict(
            "usable", f"{reason}, and {gap:.3f} more on the rows that it was trained on", advice
        )
    if metrics["stop_reason"] in ("interrupted", "terminated"):
        return Verdict("usable", f"{reason}, but it was interrupted", "Train it to the end.")
    return Verdict("good", reason, "It holds on rows that training never saw.")


def diagnosis(run: Run) -> list[str]:
    """What ``diagnose`` prints."""
    metrics = run.metrics
    kept = "flow" if metrics["kept"] == "flow" else "full-covariance Gaussian"
    lines = [
        str(verdict_of(run)),
        "",
        f"density: {kept} of {len(run.density.preparation.columns)} columns, nats per row in the units of the file",
        f"  {'rows':<12}{'number':>8}{'log p':>12}{'Gaussian':>12}{'difference':>12}{'s.e.':>9}",
    ]
    for part in PARTS:
        entry = metrics[part]
        lines.append(
            f"  {part:<12}{entry['rows']:>8}{entry['log_prob'][0]:>12.4f}{entry['gaussian'][0]:>12.4f}"
            f"{entry['difference'][0]:>+12.4f}{entry['difference'][1]:>9.4f}"
        )
    gap, error = _gap(metrics)
    early = metrics["best_step"] < 0.8 * metrics["steps"]
    lines += [
        f"overfitting: the gain over the Gaussian is {gap:+.4f} nats (s.e. {error:.4f}) greater on training rows than "
        "on test rows",
        f"training: {metrics['steps']} steps in {metrics['seconds']:.1f} s, ended by {metrics['stop_reason']}; best on "
        f"validation rows at step {metrics['best_step']}"
        + (": later steps overfitted" if early and metrics["kept"] == "flow" else ""),
        f"skipped steps (loss or gradient not finite): {metrics['skipped_steps']}",
    ]
    if metrics["kept"] == "flow" and not early and gap < _SMALL_GAP and not _failed(metrics):
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
                    f"expected runs with the same {what}, got {first_name} and {name} with different ones{detail}"
                )
        if not np.array_equal(first.tables["test"]["row"], other.tables["test"]["row"]):
            raise CommandError(
                f"expected the same test rows in {first_name} and {name}, got others"
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


def score(run: Run, rows: Tensor) -> np.ndarray:
    """Log density (nats) of rows of shape ``(N, D)``, shape ``(N,)``."""
    return heldout_log_prob(run.density, rows)["log_prob"].to_numpy()


def _dataset(run: Run, column: str) -> xr.Dataset:
    test = run.tables["test"]
    return xr.Dataset({"log_prob": ("obs_id", test[column])}, {"obs_id": test["row"]})


def _gap(metrics: dict[str, Any]) -> tuple[float, float]:
    """How much more the flow gains on training rows than on test rows, and the standard error of that."""
    (train, train_error), (test, test_error) = (metrics[p]["difference"] for p in ("train", "test"))
    return train - test, math.hypot(train_error, test_error)


def _failed(metrics: dict[str, Any]) -> bool:
    skipped = metrics["skipped_steps"] > _MANY_SKIPPED * max(metrics["steps"], 1)
    return skipped or metrics["stop_reason"].startswith("non-finite")


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))
