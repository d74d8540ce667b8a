"""The one type of verdict that there is on guides, calibrations, trainings, restarts and runs."""

from dataclasses import dataclass
from html import escape

import xarray as xr

LEVELS = ("good", "usable", "bad")
_COLORS = dict(zip(LEVELS, ("#009E73", "#E69F00", "#D55E00"), strict=True))


@dataclass(frozen=True)
class Verdict:
    """What ``diagnose`` says of a guide, a training or its restarts. It is true if it is "good".

    Attributes:
        level: "good" (use the draws), "usable" (use them with their weights) or "bad".
        reason: the numbers that led there.
        advice: what to do.
        limits: what these numbers cannot see; "" where that was looked for, or is known.

    Example:
        >>> from pyro_flowkit.diagnostics import Verdict
        >>> bool(Verdict("bad", "the gap is 2 nats", "Train longer."))
        False
    """

    level: str
    reason: str
    advice: str
    limits: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [f"{self.level}: {self.reason}.", self.advice, self.limits]))

    def _repr_html_(self) -> str:
        parts = (f"{self.reason}.", self.advice, self.limits)
        paragraphs = "".join(f"<p>{escape(part)}</p>" for part in parts if part)
        return (
            f'<div style="border-left: 4px solid {_COLORS[self.level]}; padding-left: 0.8em">'
            f"<strong>{escape(self.level)}</strong>{paragraphs}</div>"
        )

    def __bool__(self) -> bool:
        return self.level == "good"


def with_verdict(dataset: xr.Dataset, verdict: Verdict) -> xr.Dataset:
    """The dataset with the verdict in its attributes, where ``verdict_of`` finds it."""
    return dataset.assign_attrs(
        verdict=verdict.level, reason=verdict.reason, advice=verdict.advice, limits=verdict.limits
    )


def verdict_of(result: xr.DataTree | xr.Dataset) -> Verdict:
    """The verdict that a result carries in its attributes.

    Args:
        result: of :func:`with_verdict`, or a tree with a group ``vi_calibration``.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(result, xr.DataTree) and "vi_calibration" in result.children:
        result = result["vi_calibration"].to_dataset()
    attrs = result.attrs
    if "verdict" not in attrs:
        raise ValueError(f"Expected a result with the attribute verdict, got {sorted(attrs)}")
    return Verdict(attrs["verdict"], attrs["reason"], attrs["advice"], attrs["limits"])
