"""The ELBO that so many CPU seconds buy: ``fit(model, AutoSplineFlow(model), max_seconds=...)`` and NumPyro's guides.

Six posteriors, budgets of 1, 3, 10 and 40 seconds. Each budget is a fit of its own, for its plan depends on it; a
guide of NumPyro's (12,000 steps of 64 particles) is trained once, with its compilation on the clock, and has at a
budget the best ELBO that it has had by then. The best Gaussian is the best ELBO of NumPyro's AutoMultivariateNormal.
A small fit and a small program of NumPyro run before, so that the import of libraries is not on the clock. ELBOs are
by 8,192 draws.

    python -m benchmarks.budgets
"""

import argparse
import math
from collections.abc import Sequence

import torch

from benchmarks import RESULTS
from benchmarks._posteriors import Posterior, for_budgets
from benchmarks.near_gaussian import linear
from benchmarks.time_to_posterior import NEAR, OURS, Course, by_flow, by_numpyro
from models._measure import Report, table

BUDGETS = (1.0, 3.0, 10.0, 40.0)
PEERS = ("NumPyro IAF", "NumPyro BNAF", "NumPyro MVN")
GAUSSIAN = "NumPyro MVN"


def measure(
    name: str, posterior: Posterior, budgets: Sequence[float], seed: int
) -> list[list[str]]:
    """A row for every guide, its ELBO at every budget."""
    rows = [[name, OURS]]
    for budget in budgets:
        course = by_flow(posterior, seed, only_at_end=True, max_seconds=budget)
        rows[0].append(f"{course.elbos[-1]:.3f} ({course.end:.1f} s)")
    for peer in PEERS:
        course = by_numpyro(posterior, seed, budgets[-1], peer)
        rows.append([name, peer, *(_best(course, budget) for budget in budgets)])
        if peer == GAUSSIAN:
            rows[-1].append(_best_of_all(course))
    for row in rows:
        row += [""] * (len(budgets) + 3 - len(row))
    return rows


def _best(course: Course, budget: float) -> str:
    pairs = zip(course.seconds, course.elbos, strict=True)
    elbos = [elbo for seconds, elbo in pairs if seconds <= budget and math.isfinite(elbo)]
    return f"{max(elbos):.3f}" if elbos else "-"


def _best_of_all(course: Course) -> str:
    elbos = [elbo for elbo in course.elbos if math.isfinite(elbo)]
    if not elbos:
        return "no number"
    best = max(elbos)
    return f"best {best:.3f}, within {NEAR:g} after {course.first(best - NEAR):.1f} s"


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Print the table and write it to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--posteriors", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=RESULTS / "budgets.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warm = Posterior(*linear(20, 1), None)
    by_flow(warm, 0, max_steps=20)
    by_numpyro(warm, 0, 0.0, GAUSSIAN)
    rows: list[list[str]] = []
    for name, posterior in for_budgets().items():
        if any(word in name for word in args.posteriors):
            rows += measure(name, posterior, sorted(args.budgets), args.seed)
            for row in rows[-1 - len(PEERS) :]:
                print(*row, sep="  ", flush=True)
    report = Report("What a budget of seconds buys")
    report.add(
        "ELBO in nats after so many CPU seconds; in brackets what a fit took, which ends before its budget where it is "
        f"near enough to the posterior; - is nothing yet, while a program is compiled (seed {args.seed}).",
        "",
    )
    columns = [f"{budget:g} s" for budget in sorted(args.budgets)]
    report.add(*table(["posterior", "guide", *columns, "the best Gaussian"], rows))
    report.save(args.output)
    return rows


if __name__ == "__main__":
    main()
