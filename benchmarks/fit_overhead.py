"""What `fit` costs per step beyond a loop written by hand: same model, same batches, same optimizer.

The loop by hand is the shortest one that trains: rows by a random permutation, loss, backward, fused Adam. `fit` does
that, and looks for non-finite numbers, measures the gradient's norm, follows a schedule, judges windows and keeps the
history. The time of a step is the median over a run, one thread; loop and `fit` take turns, and their difference is the
median over the turns.

    python -m benchmarks.fit_overhead
"""

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from benchmarks._measure import RESULTS, Report, table
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AutoSplineFlow

ROWS, BATCH = 1000, 50
Loss = Callable[[Tensor], Tensor]


def regression(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x[..., :3] @ weights, 1.0), obs=x[..., 3])


def by_hand(loss: Loss, parameters: list[Tensor], rows: Tensor, steps: int) -> np.ndarray:
    """Train; the time after every step."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    times: list[float] = []
    while len(times) < steps:
        for index in torch.randperm(ROWS).split(BATCH):
            optimizer.zero_grad()
            loss(rows[index]).backward()
            optimizer.step()
            times.append(time.perf_counter())
    return np.array(times)


def density(rows: Tensor, steps: int, use_fit: bool) -> np.ndarray:
    flow = SplineFlow(4, num_transforms=2, hidden_dims=[16])
    if use_fit:
        options = {"lr": 1e-3, "max_steps": steps, "progress": False}
        return fit(flow, data=rows, batch_size=BATCH, **options).history["seconds"]
    return by_hand(lambda x: -flow.log_prob(x).mean(), list(flow.parameters()), rows, steps)


def variational(rows: Tensor, steps: int, use_fit: bool, make: Callable) -> np.ndarray:
    guide = make(regression)
    elbo = Trace_ELBO()
    if use_fit:
        options = {"objective": elbo, "lr": 1e-3, "scheduler": "cosine", "max_steps": steps}
        result = fit(regression, guide, data=rows, batch_size=BATCH, progress=False, **options)
        return result.history["seconds"]
    guide(rows[:BATCH])
    loss = lambda x: elbo.differentiable_loss(regression, guide, x) / ROWS  # noqa: E731
    return by_hand(loss, list(guide.parameters()), rows, steps)


CASES: dict[str, Callable[[Tensor, int, bool], np.ndarray]] = {
    "SplineFlow, maximum likelihood": density,
    "AutoNormal, ELBO": lambda *args: variational(*args, make=AutoNormal),
    "AutoSplineFlow, ELBO": lambda *args: variational(*args, make=AutoSplineFlow),
}


def microseconds(case: Callable, rows: Tensor, steps: int, use_fit: bool) -> float:
    """The median over the steps of a run."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return 1e6 * float(np.median(np.diff(case(rows, steps, use_fit))))


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Measure, print and save; the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--output", default=RESULTS / "fit_overhead.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    lines = []
    for name, case in CASES.items():
        turns = np.array(
            [
                [microseconds(case, rows, args.steps, use_fit) for use_fit in (False, True)]
                for _ in range(args.repeats)
            ]
        )
        loop, ours = np.median(turns, 0)
        difference = np.median(turns[:, 1] - turns[:, 0])
        lines.append([name, f"{loop:.0f}", f"{ours:.0f}", f"{difference:.0f}"])
        print(*lines[-1], sep="  ", flush=True)
    report = Report("What `fit` costs beyond a loop written by hand")
    report.add(
        f"Microseconds per step, the median of {args.repeats} runs of {args.steps} steps; batches of {BATCH}.",
        "",
        *table(["program", "by hand", "fit", "difference"], lines),
    )
    report.save(args.output)
    return lines


if __name__ == "__main__":
    main()
