"""CPU time of competing tasks, the machine in words, and tables in Markdown.

Other work on the machine, its clock and its caches change from second to second, so competitors are never timed one
after the other: every round times each of them once, and ratios are taken within the rounds. CPU time is that of the
whole process, so that a library which starts threads of its own gains nothing by it.
"""

import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from pyro_flowkit import ops

LIBRARIES = ("torch", "pyro-ppl", "nflows", "normflows", "zuko", "jax", "flowjax", "numpyro")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "asimd")

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """CPU milliseconds of one call, in every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    def times(self, other: "Timing") -> float:
        """How many times another task's: the median of the rounds' ratios, so that slow rounds are slow for both."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.best)})"


def cpu_times(
    tasks: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    block_ms: float = 20.0,
    calls: int | None = None,
    budget_s: float = math.inf,
) -> dict[str, Timing]:
    """Time tasks against each other, in rounds that run each of them once.

    Args:
        tasks: what to time, by name.
        repeats: number of rounds.
        block_ms: a round calls a task as often as fits into this time, at least once, and takes the mean.
        calls: how often a round calls each task, where that is not to depend on how long it takes.
        budget_s: leave out rounds beyond this CPU time; at least three are run.

    Returns:
        The timing of each task.
    """
    counts = {}
    for name, task in tasks.items():
        task()  # what is lazy is loaded and compiled here
        fitting = int(block_ms / max(_mean_ms(task, 1), 1e-6))
        counts[name] = calls or max(1, min(1000, fitting))
    gc.collect()
    gc.freeze()  # or a full collection through all that is loaded would hit one task at random
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    start = time.process_time()
    for i in range(repeats):
        for name in order if i % 2 == 0 else reversed(order):
            if counts[name] > 1:
                tasks[name]()  # brings its code and data back into the caches
            samples[name].append(_mean_ms(tasks[name], counts[name]))
        spent = time.process_time() - start
        if i + 1 >= MIN_ROUNDS and spent * (i + 2) / (i + 1) > budget_s:
            break
    gc.unfreeze()
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def _mean_ms(task: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        task()
    return (time.process_time() - start) * 1e3 / calls


def machine() -> list[str]:
    """Processor, its speed, versions and the kernel in use, a line of Markdown each."""
    model, flags = _processor()
    present = [name for name in INSTRUCTION_SETS if name in flags]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {_version(name)}" for name in LIBRARIES]
    return [
        f"- {model} ({', '.join(present) or 'no known vector instructions'}), {platform.system()}, one thread",
        f"- {_gflops():.0f} GFLOP/s in float32 matrix products of 1024 x 64 and 64 x 64",
        f"- {', '.join(versions)}",
        f"- `pyro_flowkit.ops.backend()`: {ops.backend()}; {date.today().isoformat()}",
    ]


def _gflops() -> float:
    a, b = torch.randn(1024, 64), torch.randn(64, 64)
    product = cpu_times({"product": lambda: a @ b}, repeats=5)["product"]
    return 2 * 1024 * 64 * 64 / product.best * 1e-6


def _processor() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = path.read_text().split("\n\n")[0].splitlines()
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.processor() or platform.machine()), set(flags.split())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def is_installed(module: str) -> bool:
    """Whether a library to compare with can be imported."""
    return importlib.util.find_spec(module) is not None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, its first column left-aligned, the others right-aligned and padded."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[j]) for row in cells) for j in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(cells[0]), line(rule), *(line(row) for row in cells[1:])]


def number(value: float) -> str:
    """Three digits, without an exponent for what is of everyday size."""
    if not 0.001 <= abs(value) < 1e4:
        return f"{value:.2g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


class Report:
    """Collects lines of Markdown, prints each as it comes, and saves them all."""

    def __init__(self, title: str):
        self._lines: list[str] = []
        self.add(f"# {title}", "", *machine(), "")

    def add(self, *lines: str) -> None:
        self._lines += lines
        print(*lines, sep="\n", flush=True)

    def save(self, output: str | os.PathLike[str]) -> None:
        """Write the report to a file, with the folder it lies in."""
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self._lines).rstrip() + "\n")
        print(f"Written to {path}")
