"""One training of a drop-in program, and the file that keeps what is done.

A file of runs has a line of JSON for each. It is only ever added to, so that a command that was stopped goes on where
it was, and the runs of one guide can be kept while those of another are repeated.
"""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from models._drop_in import Program
from models._drop_in_more import small_programs
from models.drop_in import GUIDES, elbo

EVALUATION_SEED = 1_000_003
LONGEST_MESSAGE = 300

programs = cache(small_programs)


@dataclass(frozen=True)
class Cell:
    """What is trained: a program, a guide, and the settings of its user's loop."""

    program: str
    guide: str
    rate: float
    particles: int
    seed: int


@dataclass(frozen=True)
class Run:
    """What came of it.

    Attributes:
        cell: what was trained.
        steps: after how many steps the ELBO was to be taken.
        elbo: ELBO by the number of steps (nats); short of some where the run ended early.
        se: its standard error.
        fault: message of the first NaN loss or exception, in training or in taking an ELBO; None is none.
        fault_step: the step it came at, from 1.
        infinite: number of steps whose loss was infinite.
        warnings: what was warned of, each message once.
        ms: CPU milliseconds of a training step.
    """

    cell: Cell
    steps: tuple[int, ...]
    elbo: dict[int, float]
    se: dict[int, float]
    fault: str | None = None
    fault_step: int | None = None
    infinite: int = 0
    warnings: list[str] = field(default_factory=list)
    ms: float = math.nan

    def to_json(self) -> str:
        """A line without its end."""
        return json.dumps(
            asdict(self.cell) | {k: v for k, v in asdict(self).items() if k != "cell"}
        )

    @classmethod
    def from_json(cls, line: str) -> "Run":
        values = json.loads(line)
        cell = Cell(**{f.name: values.pop(f.name) for f in fields(Cell)})
        for name in ("elbo", "se"):
            values[name] = {int(k): v for k, v in values[name].items()}
        return cls(cell=cell, **values | {"steps": tuple(values["steps"])})


def train(cell: Cell, *, steps: Sequence[int], draws: int, batch: int) -> Run:
    """Train a fresh guide in a plain loop, at a constant rate, and take its ELBO on the way and at the end.

    The random numbers of the training are those of a loop that takes no ELBO on the way.

    Args:
        cell: what to train.
        steps: after how many steps to take the ELBO, rising; the last is the length of the training.
        draws: how many the ELBO is a mean over.
        batch: how many of them are made at a time.
    """
    torch.set_num_threads(1)
    logging.getLogger("pyro.infer").setLevel(logging.WARNING)  # the guessed nesting of plates
    program = programs()[cell.program]
    pyro.clear_param_store()
    pyro.set_rng_seed(cell.seed)
    run: dict[str, Any] = {"elbo": {}, "se": {}, "infinite": 0}
    step, seconds = 0, 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            guide = program.guide(GUIDES[cell.guide])
            optimizer = pyro.optim.ClippedAdam({"lr": cell.rate})
            svi = SVI(program.model, guide, optimizer, program.elbo(cell.particles))
            for step in range(1, steps[-1] + 1):
                begun = time.process_time()
                loss = svi.step(*program.args)
                seconds += time.process_time() - begun
                if math.isnan(loss):
                    raise FloatingPointError("the loss is NaN")
                run["infinite"] += math.isinf(loss)
                if step in steps:
                    run["elbo"][step], run["se"][step] = _evaluate(program, guide, draws, batch)
        except Exception as error:  # whatever it is, it is the result of this cell
            run["fault"] = _one_line(f"{type(error).__name__}: {error}")
            run["fault_step"] = step
    messages = dict.fromkeys(_one_line(str(w.message)) for w in caught)
    ms = seconds * 1e3 / step if step else math.nan
    return Run(cell, tuple(steps), warnings=list(messages), ms=round(ms, 3), **run)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:LONGEST_MESSAGE]


def _evaluate(program: Program, guide: Any, draws: int, batch: int) -> tuple[float, float]:
    state = pyro.util.get_rng_state()
    pyro.set_rng_seed(EVALUATION_SEED)
    try:
        return elbo(program, guide, draws=draws, batch=batch)
    finally:
        pyro.util.set_rng_state(state)


def read(path: str | os.PathLike[str]) -> list[Run]:
    """The runs of a file, none if it does not exist.

    A last line that was cut short, by the end of the process that wrote it, is left out.
    """
    if not Path(path).exists():
        return []
    *lines, rest = Path(path).read_text().split("\n")
    del rest  # nothing, unless it was cut short
    return [Run.from_json(line) for line in lines]


def has_steps(run: Run, steps: Sequence[int]) -> bool:
    """Whether a run was to take the ELBO after these steps, the last of them at its end."""
    return set(steps) <= set(run.steps) and max(steps) == max(run.steps)


def append(path: str | os.PathLike[str], run: Run) -> None:
    """Add a run to a file, with the folder it lies in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a+") as file:
        file.seek(0)
        text = file.read()
        if text and not text.endswith("\n"):  # a line cut short; the run is repeated
            file.truncate(text.rfind("\n") + 1)
        file.write(run.to_json() + "\n")
