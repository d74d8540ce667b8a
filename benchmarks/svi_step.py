r"""A step of variational inference with AutoSplineFlow, beside Pyro's own guides.

Flows are 4 transforms with networks of two hidden layers of 32. Every guide takes the same steps: ``Trace_ELBO`` with
vectorised particles, once through Pyro's ``SVI`` and once in a loop by hand, whose optimizer is the cheapest of
PyTorch. A last table has the same step as ``fit`` takes it, as it is and with the density compiled, and that of
NumPyro's flows of the same sizes where NumPyro is installed. ``benchmarks/_svi_models.py`` has the models, guides and
steps.

    python -m benchmarks.svi_step
    python -m benchmarks.svi_step --problems seeds --particles 64 --profile
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import pyro
import torch

from benchmarks import RESULTS
from benchmarks._svi_models import (
    DRIVERS,
    HIDDEN_DIMS,
    LR,
    NUM_TRANSFORMS,
    REFERENCE_GUIDE,
    SPLINE,
    fit_step,
    guides,
    loop_step,
    problems,
)
from benchmarks._svi_numpyro import numpyro_steps
from benchmarks._svi_split import PARTS, profiles, split
from models._measure import Report, Timing, cpu_times, is_installed, number, table
from models._targets import Target

CALLS = 5
PROFILED_STEPS = 50
PARTICLES = (1, 64)
FIT_PARTICLES = 64


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    dtype = torch.float64 if args.float64 else torch.float32
    torch.set_default_dtype(dtype)
    rounds = 2 if args.quick else -(-args.steps // CALLS)
    report = Report("A step of variational inference, guide against guide")
    report.add(
        f"{str(dtype).removeprefix('torch.')}; CPU milliseconds of a step, median of {rounds} interleaved rounds of "
        f"{CALLS} steps (best in brackets); x: times {REFERENCE_GUIDE}, median of the rounds' "
        "ratios.",
        "",
    )
    chosen = {name: problems(dtype)[name] for name in args.problems}
    for driver in DRIVERS:
        columns = {
            (name, particles): measure(problem, driver, particles, rounds)
            for name, problem in chosen.items()
            for particles in args.particles
        }
        report.add(f"## {driver}", "", *_comparison(columns), "")
    report.add("## A step of fit beside the loop", "")
    report.add(*_beside_the_loop(chosen, rounds, compile=not args.quick), "")
    if args.profile:
        for name, problem in chosen.items():
            for particles in args.particles:
                report.add(*_profile(name, problem, particles), "")
    report.save(args.output)


def measure(problem: Target, driver: str, num_particles: int, rounds: int) -> dict[str, Timing]:
    """Timings by guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    steps = {
        name: DRIVERS[driver](problem, guide, num_particles)
        for name, guide in guides(problem).items()
    }
    return cpu_times(steps, repeats=rounds, calls=CALLS)


def _comparison(columns: dict[tuple[str, int], dict[str, Timing]]) -> list[str]:
    header = ["guide"]
    for problem, particles in columns:
        header += [f"{problem}, {_words(particles)}", "x"]
    rows = []
    for name in next(iter(columns.values())):
        row = [name]
        for timings in columns.values():
            ratio = timings[name].times(timings[REFERENCE_GUIDE])
            row += [str(timings[name]), f"{ratio:.2f}"]
        rows.append(row)
    return table(header, rows)


def _beside_the_loop(chosen: dict[str, Target], rounds: int, *, compile: bool) -> list[str]:
    """What ``fit`` takes for a step of AutoSplineFlow, and NumPyro for one of its flows, times what a loop takes."""
    columns: dict[str, dict[str, Timing]] = {}
    notes = []
    for name, problem in chosen.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loop, plain, compiled = (guides(problem)[f"{SPLINE}, path gradient"] for _ in range(3))
        steps = {
            "loop by hand": loop_step(problem, loop, FIT_PARTICLES),
            "fit": fit_step(problem, plain, FIT_PARTICLES)[0],
        }
        if compile:
            steps["fit(compile=True)"], note = fit_step(
                problem, compiled, FIT_PARTICLES, compile=True
            )
            notes.append(f"{name}: {note}.")
        if is_installed("numpyro"):
            sizes: dict[str, Any] = {"hidden_dims": HIDDEN_DIMS, "num_transforms": NUM_TRANSFORMS}
            steps |= numpyro_steps(name, problem, FIT_PARTICLES, lr=LR, **sizes)
        columns[name] = cpu_times(steps, repeats=rounds, calls=CALLS)
    header = [f"{FIT_PARTICLES} particles"]
    for name in columns:
        header += [name, "x"]
    rows = []
    for task in next(iter(columns.values())):
        row = [task]
        for timings in columns.values():
            row += [str(timings[task]), f"{timings[task].times(timings['loop by hand']):.2f}"]
        rows.append(row)
    return [*table(header, rows), "", *notes] if notes else table(header, rows)


def _words(particles: int) -> str:
    return "1 particle" if particles == 1 else f"{particles} particles"


def _profile(name: str, problem: Target, num_particles: int) -> list[str]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    made = guides(problem)
    found: dict[str, list[dict[str, float]]] = {guide_name: [] for guide_name in made}
    for _ in range(PROFILED_STEPS // CALLS):
        for guide_name, guide in made.items():
            found[guide_name].append(split(problem, guide, num_particles, CALLS))
    rows = [
        [guide_name, *(number(statistics.median(p[part] for p in parts)) for part in PARTS)]
        for guide_name, parts in found.items()
    ]
    lines = [f"## Where the time goes: {name}, {_words(num_particles)}, loop by hand, ms", ""]
    lines += table(["guide", *PARTS], rows)
    for guide_name in (n for n in made if n.startswith(SPLINE)):
        lines += ["", f"### {guide_name}", "", "```"]
        lines += [*profiles(problem, made[guide_name], num_particles, PROFILED_STEPS), "```"]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.svi_step",
        description="CPU time of a step of variational inference, guide against guide.",
    )
    names = tuple(problems(torch.float32))
    parser.add_argument("--problems", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--particles", nargs="+", type=int, default=PARTICLES, help="default: 1 64")
    parser.add_argument("--steps", type=int, default=100, help="timed steps (default: 100)")
    parser.add_argument("--float64", action="store_true", help="instead of float32")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes")
    parser.add_argument("--quick", action="store_true", help="few steps: a rehearsal")
    parser.add_argument("--output", default=RESULTS / "svi_step.md", help="Markdown file")
    return parser


if __name__ == "__main__":
    main()
