"""What ``fit`` costs per step beyond a loop written by hand: same model, same batches, same optimizer.

The loop by hand is the shortest one that trains: rows by a random permutation, loss, backward, fused Adam. ``fit`` does
that, and looks for non-finite numbers, measures the gradient's norm, follows a schedule, judges windows and keeps the
history. A callback takes a step by hand of a twin after every step of ``fit``, so that both see the same machine; one
thread. Two loops by hand differ by up to 100 microseconds in a step of ten milliseconds, according to where their
tensors lie in memory: hence many runs, and the mean of their median differences with its standard error.

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


class ByHand(Callback):
    """A loop by hand whose steps are taken between those of a fit.

    Args:
        loss: of a batch.
        parameters: to train.
        rows: the data.
        store: of its parameters, as if the fit were another program.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Iterable[Tensor],
        rows: Tensor,
        store: dict[str, Any] | None = None,
    ) -> None:
        self._loss, self._rows = loss, rows
        self._store = store or {"params": {}, "constraints": {}}
        self._optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        self._order: list[Tensor] = []
        self._before = 0.0
        self.own: list[float] = []
        self.of_fit: list[float] = []

    def on_step(self, state: FitState) -> None:
        self.of_fit.append(time.perf_counter() - self._before)
        with pyro.get_param_store().scope(self._store):
            begun = time.perf_counter()
            if not self._order:
                self._order = list(torch.randperm(ROWS).split(BATCH))
            batch = self._rows[self._order.pop()]
            self._optimizer.zero_grad()
            self._loss(batch).backward()
            self._optimizer.step()
            self.own.append(time.perf_counter() - begun)
        self._before = time.perf_counter()


def density(rows: Tensor, steps: int) -> ByHand:
    flow, twin = (SplineFlow(4, num_transforms=2, hidden_dims=[16]) for _ in range(2))
    hand = ByHand(lambda x: -twin.log_prob(x).mean(), twin.parameters(), rows)
    fit(flow, data=rows, callbacks=[hand], **_options(steps))
    return hand


def variational(rows: Tensor, steps: int, make: Callable) -> ByHand:
    elbo = Trace_ELBO()
    guide, twin = make(regression), make(regression)
    with pyro.get_param_store().scope() as store:
        twin(rows[:BATCH])
    hand = ByHand(
        lambda x: elbo.differentiable_loss(regression, twin, x) / ROWS,
        twin.parameters(),
        rows,
        store,
    )
    fit(regression, guide, data=rows, objective=elbo, callbacks=[hand], **_options(steps))
    return hand


def _options(steps: int) -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        "lr": 1e-3,
        "scheduler": "cosine",
        "max_steps": steps,
        "progress": False,
    }


CASES: dict[str, Callable[[Tensor, int], ByHand]] = {
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
            hand = case(rows, args.steps)
            times = np.array([hand.own, hand.of_fit])[:, args.steps // 10 :]
            turns.append(1e6 * np.median([*times, times[1] - times[0]], axis=1))
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
