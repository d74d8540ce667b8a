"""AutoSplineFlow in the place of AutoNormal at the learning rates that people use, in eighteen programs."""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context

from benchmarks._drop_in_runs import Cell, Run, append, missing, programs, read, train
from models.drop_in import GUIDES

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 5e-2)
DRAWS, BATCH = 10_000, 200


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Make the runs that are missing."""
    args = _parser().parse_args(argv)
    names = [name for name in programs() if any(word in name for word in args.programs)]
    cells = [
        Cell(name, guide, rate, particles, seed)
        for seed, name, particles, rate, guide in product(
            args.seeds, names, args.particles, args.rates, args.guides
        )
    ]
    steps = (3, 5) if args.fast else tuple(sorted(args.steps))
    job = partial(train, steps=steps, draws=400 if args.fast else DRAWS, batch=BATCH)
    for run in _train(job, missing(cells, read(args.runs), steps), args.jobs):
        append(args.runs, run)
        print(_line(run), flush=True)
    return read(args.runs)


def _train(job, cells, jobs):
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
        f"{cell.program:<25} {cell.guide:<14} lr {cell.rate:<6g} {cell.particles:2d} particles, "
        f"seed {cell.seed}  {run.ms:5.1f} ms  {elbos}{fault}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drop_in",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--programs", nargs="+", default=[""], metavar="WORD", help="those whose name holds a word"
    )
    parser.add_argument("--guides", nargs="+", choices=tuple(GUIDES), default=list(GUIDES))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[300, 2000])
    parser.add_argument("--runs", metavar="FILE", required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--fast", action="store_true")
    return parser


if __name__ == "__main__":
    main()
