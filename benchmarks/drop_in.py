"""AutoSplineFlow in the place of AutoNormal at the learning rates that people use, in eighteen programs.

The programs (``models/_drop_in.py``, ``models/_drop_in_more.py``) are in the style of Pyro's examples, and so is the
loop: ``svi.step`` with ``pyro.optim.ClippedAdam({"lr": rate})``, a rate that does not fall, ``Trace_ELBO`` or
``TraceEnum_ELBO``. Both guides have their defaults; only their class differs.

    python -m benchmarks.drop_in --jobs 2
    python -m benchmarks.drop_in --programs banana LKJ --rates 0.05 --runs runs/two.jsonl --output output/two.md

Every training is a line of ``--runs``, by default of ``benchmarks/results/drop_in.jsonl``, and what is there is not
done again: a command that was stopped goes on where it was, and one with fewer programs or rates reports on those
alone. After a change of a guide or a program its lines are to be taken out, or another file named.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context

from benchmarks import RESULTS
from benchmarks._drop_in_report import lines
from benchmarks._drop_in_runs import Cell, Run, append, has_steps, programs, read, train
from models._measure import Report
from models.drop_in import GUIDES

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 5e-2)
PARTICLES = (1, 8)
SEEDS = (0, 1, 2)
STEPS, FAST_STEPS = (300, 2000), (2, 4)
DRAWS, FAST_DRAWS, BATCH = 10_000, 400, 200


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Make the runs that are missing; of both guides, print and save the report. Returns all that were asked for."""
    args = _parser().parse_args(argv)
    if args.runs is None:
        args.runs = "runs/drop_in.jsonl" if args.fast else str(RESULTS / "drop_in.jsonl")
    steps = tuple(sorted(args.steps or (FAST_STEPS if args.fast else STEPS)))
    draws = FAST_DRAWS if args.fast else DRAWS
    names = [name for name in programs() if any(word in name for word in args.programs)]
    cells = [
        Cell(name, guide, rate, particles, seed)
        for seed, name, particles, rate, guide in product(
            args.seeds, names, args.particles, args.rates, args.guides
        )
    ]
    done = {run.cell: run for run in read(args.runs) if has_steps(run, steps)}
    missing = [cell for cell in cells if cell not in done]
    for run in _train(missing, args.jobs, steps=steps, draws=draws):
        append(args.runs, run)
        done[run.cell] = run
        print(_line(run), flush=True)
    if set(args.guides) != set(GUIDES):
        return [done[cell] for cell in cells]  # there is nothing to compare
    runs = sorted((done[cell] for cell in cells), key=lambda run: names.index(run.cell.program))
    report = Report("AutoSplineFlow in the place of AutoNormal, at constant rates")
    report.add(
        f"ELBO in nats by {draws:,} draws, after steps of `ClippedAdam` at a constant rate. A cell is a program with a "
        "rate, a number of particles, a seed and a number of steps; its difference is by how much AutoSplineFlow is "
        "ahead of AutoNormal. It is level from 0.1 nats below on. The best is the mean over seeds at each guide's own "
        "best setting, ms are CPU milliseconds of a step. The tables by rate show the least difference among seeds "
        f"{', '.join(map(str, args.seeds))}, its standard error in brackets, in bold where it is not level; ahead: "
        "only AutoSplineFlow has a finite ELBO, none: it has not.",
        "",
        *lines(runs, steps),
    )
    if args.output or not args.fast:
        report.save(args.output or RESULTS / "drop_in.md")
    return runs


def _train(
    cells: Sequence[Cell], jobs: int, *, steps: tuple[int, ...], draws: int
) -> Iterator[Run]:
    """The runs as they come."""
    job = partial(train, steps=steps, draws=draws, batch=BATCH)
    if jobs == 1:
        yield from map(job, cells)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(job, cell) for cell in cells]):
            yield future.result()


def _line(run: Run) -> str:
    cell = run.cell
    elbos = "  ".join(f"{n}: {v:.3f} ({run.se[n]:.3f})" for n, v in run.elbo.items())
    fault = f"  step {run.fault_step}: {run.fault}" if run.fault else ""
    return (
        f"{cell.program:<26}{cell.guide:<15}lr {cell.rate:<6g} particles {cell.particles:<2d} seed {cell.seed}  "
        f"{run.ms:5.1f} ms  {elbos}{fault}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drop_in",
        description="AutoSplineFlow and AutoNormal in the same programs and the same loop (nats).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--programs", nargs="+", default=[""], metavar="WORD", help="those whose name holds a word"
    )
    parser.add_argument(
        "--guides",
        nargs="+",
        choices=tuple(GUIDES),
        default=list(GUIDES),
        help="those to train; there is a report for both",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="RATE")
    parser.add_argument(
        "--particles", nargs="+", type=int, default=PARTICLES, metavar="N", help="a step's draws"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        metavar="N",
        help="when the ELBO is taken; the last is the length of a training (default: 300 2000)",
    )
    parser.add_argument(
        "--runs", metavar="FILE", help="where runs are kept (default: benchmarks/results)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument(
        "--output", metavar="FILE", help="the report, in Markdown (default: benchmarks/results)"
    )
    parser.add_argument("--fast", action="store_true", help="four steps each, to try it")
    return parser


if __name__ == "__main__":
    main()
