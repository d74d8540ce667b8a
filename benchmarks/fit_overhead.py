"""What ``fit`` costs per step beyond a loop written by hand: same model, same batches, same optimizer.

The loop by hand is the shortest one that trains: rows by a random permutation, loss, backward, fused Adam. ``fit`` does
that, and looks for non-finite numbers, measures the gradient's norm, follows a schedule, judges windows and keeps the
history. Both train by turns, whole runs each, on one thread; a run's number is the median of its steps. Two loops by
hand differ by up to 100 microseconds in a step of ten milliseconds, according to where their tensors lie in memory:
hence many runs, and the mean of the differences with its standard error.

    python -m benchmarks.fit_overhead
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import Callback, FitState

ROWS, BATCH = 1000, 50
Loss = Callable[[Tensor], Tensor]


def regression(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x[..., :3] @ weights, 1.0), obs=x[..., 3])


class Stopwatch(Callback):
    """The time of every step, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._before = 0.0

    def on_step(self, state: FitState) -> None:
        now = time.perf_counter()
        self.times.append(now - self._before)
        self._before = now


def by_hand(loss: Loss, parameters: Iterable[Tensor], rows: Tensor, steps: int) -> list[float]:
    """The times of the steps of a loop by hand (seconds)."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    order: list[Tensor] = []
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        if not order:
            order = list(torch.randperm(ROWS).split(BATCH))
        batch = rows[order.pop()]
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        times.append(time.perf_counter() - begun)
    return times


def density(rows: Tensor, steps: int) -> tuple[list[float], list[float]]:
    flow, twin = (SplineFlow(4, num_transforms=2, hidden_dims=[16]) for _ in range(2))
    own = by_hand(lambda x: -twin.log_prob(x).mean(), twin.parameters(), rows, steps)
    watch = Stopwatch()
    fit(flow, data=rows, callbacks=[watch], **_options(steps))
    return own, watch.times


def variational(rows: Tensor, steps: int, make: Callable) -> tuple[list[float], list[float]]:
    elbo = Trace_ELBO()
    twin = make(regression)
    twin(rows[:BATCH])
    own = by_hand(
        lambda x: elbo.differentiable_loss(regression, twin, x) / ROWS,
        twin.parameters(),
        rows,
        steps,
    )
    pyro.clear_param_store()
    watch = Stopwatch()
    options = _options(steps)
    fit(regression, make(regression), data=rows, objective=elbo, callbacks=[watch], **options)
    return own, watch.times


def _options(steps: int) -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        "lr": 1e-3,
        "scheduler": "cosine",
        "max_steps": steps,
        "progress": False,
    }


CASES: dict[str, Callable[[Tensor, int], tuple[list[float], list[float]]]] = {
    "SplineFlow, maximum likelihood": density,
    "AutoNormal, ELBO": partial(variational, make=AutoNormal),
    "AutoSplineFlow, ELBO": partial(variational, make=AutoSplineFlow),
}


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Measure, print and save; the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each")
    parser.add_argument("--output", default=RESULTS / "fit_overhead.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    lines = []
    for name, case in CASES.items():
        turns = []
        for _ in range(args.repeats):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            own, of_fit = np.median(np.array(case(rows, args.steps))[:, args.steps // 10 :], axis=1)
            turns.append(1e6 * np.array([own, of_fit, of_fit - own]))
        loop, ours, difference = np.mean(turns, axis=0)
        error = np.std(turns, axis=0, ddof=1)[2] / args.repeats**0.5
        lines.append([name, f"{loop:.0f}", f"{ours:.0f}", f"{difference:.0f} ({error:.0f})"])
        print(*lines[-1], sep="  ", flush=True)
    report = Report("What `fit` costs beyond a loop written by hand")
    report.add(
        f"Microseconds per step, the mean (standard error) over {args.repeats} runs of their medians over {args.steps} "
        f"steps; batches of {BATCH}.",
        "",
        *table(["program", "by hand", "fit", "difference"], lines),
    )
    report.save(args.output)
    return lines


if __name__ == "__main__":
    main()
