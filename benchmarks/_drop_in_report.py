"""What the runs of two guides in the same programs and loops say: differences, faults, and verdicts.

A cell is a program with a rate, a number of particles, a seed and a number of steps. It has the difference between the
ELBOs of AutoSplineFlow and of AutoNormal, in nats. Where AutoNormal has none that is finite, for an exception, a NaN or
a bound that is infinite, AutoSplineFlow is ahead by any that is; where AutoSplineFlow has none, it is behind.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from benchmarks._drop_in_runs import Cell, Run
from models._measure import number, table

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

OURS, THEIRS = "AutoSplineFlow", "AutoNormal"
TOLERANCE = 0.1  # nats
SHARE = 0.95  # of the cells, within the tolerance
RELATIVE = 0.01  # of the magnitude of AutoNormal's ELBO
PROGRAMS = 10  # better by more than the error


@dataclass(frozen=True)
class Comparison:
    """A cell: the ELBOs of the two guides at an equal number of steps, NaN where there is none."""

    program: str
    rate: float
    particles: int
    seed: int
    steps: int
    ours: float
    theirs: float
    error: float

    @property
    def difference(self) -> float:
        """Nats by which AutoSplineFlow is ahead."""
        if not math.isfinite(self.ours):
            return -math.inf
        return self.ours - self.theirs if math.isfinite(self.theirs) else math.inf

    @property
    def is_level(self) -> bool:
        return self.difference >= -TOLERANCE

    @property
    def is_far_below(self) -> bool:
        """By more than 1 % of the magnitude, and by more than the tolerance, which is more where that is below 10."""
        return not self.is_level and self._is_below_by_share

    @property
    def is_below_by_share(self) -> bool:
        """By more than 1 % of the magnitude and more than the error of the difference."""
        return self._is_below_by_share and not self.difference >= -self.error

    @property
    def _is_below_by_share(self) -> bool:
        return self.difference < -RELATIVE * abs(self.theirs) or self.difference == -math.inf

    @property
    def is_better(self) -> bool:
        return self.difference > (self.error if math.isfinite(self.error) else 0.0)


def compare(runs: Iterable[Run], steps: Sequence[int]) -> list[Comparison]:
    """The cells that both guides were trained for; the last run of a cell counts."""
    found = {run.cell: run for run in runs}
    cells = []
    for cell, ours in found.items():
        theirs = found.get(Cell(cell.program, THEIRS, cell.rate, cell.particles, cell.seed))
        if cell.guide != OURS or theirs is None:
            continue
        for count in steps:
            values = [run.elbo.get(count, math.nan) for run in (ours, theirs)]
            error = math.hypot(*(run.se.get(count, math.nan) for run in (ours, theirs)))
            cells.append(
                Comparison(
                    cell.program, cell.rate, cell.particles, cell.seed, count, *values, error
                )
            )
    return cells


def verdicts(runs: Sequence[Run], steps: Sequence[int]) -> list[tuple[str, str, bool]]:
    """What was asked, what was found, and whether it holds."""
    cells, last = compare(runs, steps), max(steps)
    ours = [run for run in runs if run.cell.guide == OURS]
    faults = sum(run.fault is not None for run in ours)
    level = sum(cell.is_level for cell in cells)
    far = sum(cell.is_far_below for cell in cells)
    strictly = sum(cell.is_below_by_share for cell in cells)
    at_the_end = _group((c for c in cells if c.steps == last), lambda c: c.program)
    typically = sum(_is_typically_better(group) for group in at_the_end.values())
    always = sum(all(c.is_better for c in group) for group in at_the_end.values())
    return [
        (
            f"no run of {OURS} ends in NaN or an exception",
            f"{faults} of {len(ours)} do",
            faults == 0 and bool(ours),
        ),
        (
            f"ELBO at most {TOLERANCE} nats below {THEIRS}'s in {SHARE:.0%} of the cells",
            f"{level} of {len(cells)}" + (f", {level / len(cells):.1%}" if cells else ""),
            bool(cells) and level >= SHARE * len(cells),
        ),
        (
            f"never below by more than {RELATIVE:.0%} of its magnitude (or {TOLERANCE} nats, where that is more)",
            f"{far} are; {strictly} by the share alone, beyond their error",
            far == 0 and bool(cells),
        ),
        (
            f"better by more than the error on {PROGRAMS} programs after {last} steps",
            f"{typically} of {len(at_the_end)} at the median of their cells; {always} in every cell",
            typically >= PROGRAMS,
        ),
    ]


def _is_typically_better(cells: Sequence[Comparison]) -> bool:
    return statistics.median_low(cell.difference for cell in cells) > statistics.median(
        cell.error if math.isfinite(cell.error) else 0.0 for cell in cells
    )


def lines(runs: Sequence[Run], steps: Sequence[int]) -> list[str]:
    """The report in Markdown, without its title."""
    cells = compare(runs, steps)
    text = [
        *table(
            ["asked", "found", "holds"],
            [
                [asked, found, "yes" if holds else "**no**"]
                for asked, found, holds in verdicts(runs, steps)
            ],
        ),
        "",
        *_programs(runs, cells, steps),
    ]
    for count, particles in product(steps, sorted({cell.particles for cell in cells})):
        chosen = [c for c in cells if (c.steps, c.particles) == (count, particles)]
        text += [
            "",
            f"## {count} steps, {particles} particle{'s' if particles > 1 else ''}",
            "",
            *_differences(chosen),
        ]
    return text + _faults(runs)


def _programs(runs: Sequence[Run], cells: Sequence[Comparison], steps: Sequence[int]) -> list[str]:
    by_program = _group(cells, lambda cell: cell.program)
    header = ["program", "cells", "level", *(f"median, {n} steps" for n in steps)]
    header += [
        f"{column}, {guide}" for column in ("best", "faults", "ms") for guide in (THEIRS, OURS)
    ]
    rows = []
    for name, group in by_program.items():
        row = [name, str(len(group)), str(sum(cell.is_level for cell in group))]
        for count in steps:
            differences = [cell.difference for cell in group if cell.steps == count]
            row.append(_signed(statistics.median_low(differences)))
        of_guide = [
            [run for run in runs if (run.cell.program, run.cell.guide) == (name, guide)]
            for guide in (THEIRS, OURS)
        ]
        row += [_best(chosen, max(steps)) for chosen in of_guide]
        row += [str(sum(run.fault is not None for run in chosen)) for chosen in of_guide]
        row += [number(statistics.median(run.ms for run in chosen)) for chosen in of_guide]
        rows.append(row)
    return table(header, rows)


def _best(runs: Sequence[Run], steps: int) -> str:
    """The ELBO at the best setting, a mean over its seeds."""
    settings = _group(runs, lambda run: (run.cell.rate, run.cell.particles))
    means = [
        statistics.fmean(run.elbo.get(steps, math.nan) for run in group)
        for group in settings.values()
    ]
    return f"{max((mean for mean in means if math.isfinite(mean)), default=math.nan):.3f}"


def _differences(cells: Sequence[Comparison]) -> list[str]:
    """A row for every program, a column for every rate: the least over the seeds."""
    rates = sorted({cell.rate for cell in cells})
    rows = []
    for name, group in _group(cells, lambda cell: cell.program).items():
        by_rate = _group(group, lambda cell: cell.rate)
        rows.append([name, *(_worst(by_rate.get(rate, [])) for rate in rates)])
    return table(["program", *(f"{rate:g}" for rate in rates)], rows)


def _worst(cells: Sequence[Comparison]) -> str:
    if not cells:
        return ""
    worst = min(cells, key=lambda cell: cell.difference)
    text = f"{_signed(worst.difference)} ({worst.error:.2f})"
    return text if worst.is_level else f"**{text}**"


def _signed(difference: float) -> str:
    if math.isinf(difference):
        return "ahead" if difference > 0 else "none"
    return f"{difference:+.2f}" if abs(difference) < 1e5 else f"{difference:+.1e}"


def _faults(runs: Sequence[Run]) -> list[str]:
    """Every run that ended early, and what was warned of how often."""
    rows = [
        [
            run.cell.guide,
            run.cell.program,
            f"{run.cell.rate:g}",
            str(run.cell.particles),
            str(run.cell.seed),
            str(run.fault_step),
            str(run.fault)[:80].replace("|", "/"),
        ]
        for run in runs
        if run.fault is not None
    ]
    header = ["guide", "program", "rate", "particles", "seed", "step", "message"]
    text = ["", "## Runs that ended early", "", *(table(header, rows) if rows else ["None."])]
    warned = _group(
        ((run.cell.guide, message) for run in runs for message in run.warnings), lambda pair: pair
    )
    rows = [
        [guide, str(len(group)), message[:100].replace("|", "/")]
        for (guide, message), group in warned.items()
    ]
    return text + [
        "",
        "## Warnings",
        "",
        *(table(["guide", "runs", "message"], rows) if rows else ["None."]),
    ]


def _group(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """In the order of their first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
