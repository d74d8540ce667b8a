"""How good a density of a table is: means over the three parts of its rows, and a verdict in words."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from pyro_flowkit.diagnostics import Verdict
from pyro_flowkit.tables.split import per_original
from pyro_flowkit.tables.training import Trained

PARTS = ("train", "validation", "test")
SMALL_GAP = 0.1  # nats
OWN_GAP = 0.5  # nats for each column, of the Gaussian
MANY_SKIPPED = 0.01  # of all steps


def metrics_of(trained: Trained) -> dict[str, Any]:
    """Means and standard errors in nats per row, and how training ended."""
    result = trained.result
    seconds = np.empty(0) if result is None else result.history["seconds"]
    metrics: dict[str, Any] = {
        "kept": "flow" if trained.is_flow else "gaussian",
        "base": trained.settings.base,
        "log_scale": trained.log_scale,
        "columns": len(trained.density.columns),
        "steps": len(seconds),
        "best_step": 0 if result is None else int(result.best_step),
        "skipped_steps": 0 if result is None else int(result.skipped_steps),
        "stop_reason": "too few rows for a flow" if result is None else result.stop_reason,
        "seconds": float(seconds[-1]) if len(seconds) else 0.0,
    }
    for part in PARTS:
        own, gaussian = (
            per_original(values[part], trained.copy_of[part])
            for values in (trained.log_prob, trained.gaussian_log_prob)
        )
        metrics[part] = {
            "rows": len(trained.log_prob[part]),
            "log_prob": _mean_and_error(own),
            "gaussian": _mean_and_error(gaussian),
            "difference": _mean_and_error(own - gaussian),
        }
    return metrics


def table_verdict(metrics: dict[str, Any]) -> Verdict:
    """A judgement of a density by its held-out rows.

    ====================================================  ======
    below the Gaussian, or many or persistent bad steps    bad
    a Gaussian that knows its training rows by heart       bad
    the Gaussian itself, a large gap, or interrupted       usable
    otherwise                                              good
    ====================================================  ======

    The Gaussian knows its training rows by heart if its density is greater on them than on test rows by more than half
    a nat for each column and two standard errors. A gap is large if the gain over the Gaussian is greater on training
    rows than on test rows by more than 0.1 nats, a tenth of the gain, and three standard errors.
    """
    gain, error = metrics["test"]["difference"]
    if metrics["kept"] == "gaussian":
        (train, train_error), (test, test_error) = (
            metrics[part]["gaussian"] for part in ("train", "test")
        )
        if train - test > max(
            OWN_GAP * metrics["columns"], 2 * math.hypot(train_error, test_error)
        ):
            return Verdict(
                "bad",
                f"the density is the full-covariance Gaussian, {train - test:.1f} nats greater on its training rows "
                "than on test rows",
                "There are too few rows for so many columns: leave columns out, or take more rows.",
            )
        reason = "the flow gained nothing on the validation rows"
        if not metrics["steps"]:
            reason = "there are too few rows to judge a flow by"
        reason += ", so the density is the full-covariance Gaussian"
        return Verdict(
            "usable", reason, "More rows, or fewer columns, give a flow more to learn from."
        )
    reason = f"it is {abs(gain):.3f} nats per test row (s.e. {error:.3f}) "
    reason += "above" if gain >= 0 else "below"
    reason += " the full-covariance Gaussian"
    gap, gap_error = gap_of(metrics)
    if not math.isfinite(gain) or gain < -2 * error:
        return Verdict(
            "bad", reason, "Look for rows unlike the others; try more rows or a dropout of 0.2."
        )
    if has_failed(metrics):
        return Verdict(
            "bad",
            f"{reason}, but its training broke down",
            "Try a smaller lr; look for outliers.",
        )
    if gap > max(SMALL_GAP, 0.1 * gain, 3 * gap_error):
        advice = "Validation rows stopped it in time; a dropout of 0.2, a smaller width or more rows may gain more."
        return Verdict(
            "usable", f"{reason}, and {gap:.3f} more on the rows that it was trained on", advice
        )
    if metrics["stop_reason"] in ("interrupted", "terminated"):
        return Verdict("usable", f"{reason}, but it was interrupted", "Train it to the end.")
    return Verdict("good", reason, "It holds on rows that training never saw.")


def gap_of(metrics: dict[str, Any]) -> tuple[float, float]:
    """How much more the flow gains on training rows than on test rows, and the standard error of that."""
    (train, train_error), (test, test_error) = (metrics[p]["difference"] for p in ("train", "test"))
    return train - test, math.hypot(train_error, test_error)


def has_failed(metrics: dict[str, Any]) -> bool:
    skipped = metrics["skipped_steps"] > MANY_SKIPPED * max(metrics["steps"], 1)
    return skipped or metrics["stop_reason"].startswith("non-finite")


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))
