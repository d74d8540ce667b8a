"""How good a density of a table is: means over the three parts of its rows, and a verdict in words."""

import math
from typing import Any

from torch import Tensor

from pyro_flowkit.diagnostics import Verdict
from pyro_flowkit.tables.training import Trained

PARTS = ("train", "validation", "test")
SMALL_GAP = 0.1  # nats
MANY_SKIPPED = 0.01  # of all steps


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


def table_verdict(metrics: dict[str, Any]) -> Verdict:
    """A judgement of a density by its held-out rows.

    ====================================================  ======
    below the Gaussian, or many or persistent bad steps    bad
    the Gaussian itself, a large gap, or interrupted       usable
    otherwise                                              good
    ====================================================  ======

    A gap is large if the gain over the Gaussian is greater on training rows than on test rows by more than 0.1 nats, a
    tenth of the gain, and three standard errors.
    """
    gain, error = metrics["test"]["difference"]
    if metrics["kept"] == "gaussian":
        reason = "the flow gained nothing on the validation rows, so the density is the full-covariance Gaussian"
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
