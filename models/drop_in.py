r"""AutoSplineFlow in the place of AutoNormal, in programs that know nothing of it.

Eight programs in the style of Pyro's own examples (``_drop_in.py``) are trained twice in one plain loop, that of their
users: ``SVI``, Adam with a rate that falls, ``Trace_ELBO``, or ``TraceEnum_ELBO`` where discrete sites are enumerated.
Only the class of the guide differs. ``python -m benchmarks.drop_in`` does so at the constant rates that people use, in
these programs and ten more.

    python -m models.drop_in
    python -m models.drop_in --programs baseball mixture --steps 3000

Every training runs in a process of its own, so that its peak of memory can be told: that of the training above that of
the imports and the data.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from models._drop_in import Program, programs
from models._measure import Report, number, table
from pyro_flowkit.guides import AutoSplineFlow

GUIDES: dict[str, Callable[..., Any]] = {
    "AutoNormal": AutoNormal,
    "AutoSplineFlow": AutoSplineFlow,
}
LR = 2e-2
FINAL_RATE = 1e-2  # of the first
DRAWS, BATCH = 10_000, 100


def train(program: Program, guide: Any, *, steps: int, num_particles: int, lr: float = LR) -> None:
    """The loop of a user's own program."""
    optimizer = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": lr},
            "gamma": FINAL_RATE ** (1.0 / steps),
        }
    )
    svi = SVI(program.model, guide, optimizer, program.elbo(num_particles))
    for _ in range(steps):
        svi.step(*program.args)
        optimizer.step()


@torch.no_grad()
def elbo(
    program: Program, guide: Any, *, draws: int = DRAWS, batch: int = BATCH
) -> tuple[float, float]:
    """ELBO by the program's own objective, and its standard error (nats)."""
    batch = min(batch, draws // 2)
    objective = program.elbo(batch)
    means = torch.tensor(
        [-objective.loss(program.model, guide, *program.args) for _ in range(draws // batch)],
        dtype=torch.float64,
    )
    return float(means.mean()), float(means.std()) / math.sqrt(len(means))


def measure(
    name: str,
    guide_name: str,
    *,
    steps: int,
    num_particles: int,
    seed: int,
    lr: float = LR,
    draws: int = DRAWS,
) -> dict[str, float]:
    """Train a fresh guide of a program; dimension, ELBO with standard error, CPU seconds, peak of memory (MiB)."""
    torch.set_num_threads(1)
    program = programs()[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = program.guide(GUIDES[guide_name])
    memory, begun = _peak_memory(), time.process_time()
    train(program, guide, steps=steps, num_particles=num_particles, lr=lr)
    seconds, memory = time.process_time() - begun, _peak_memory() - memory
    value, error = elbo(program, guide, draws=draws)
    return {
        "D": _count_latents(guide),
        "ELBO": value,
        "se": error,
        "CPU s": seconds,
        "MiB": memory,
    }


def _count_latents(guide: Any) -> int:
    part = guide[0] if isinstance(guide, AutoGuideList) else guide
    if isinstance(part, AutoNormal):
        return sum(loc.numel() for name, loc in part.named_parameters() if "locs." in name)
    return part.latent_dim


def _peak_memory() -> float:
    """Of this process so far, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Train and print a row for every program."""
    args = _parser().parse_args(argv)
    settings: dict[str, Any] = {
        "steps": 5 if args.fast else args.steps,
        "num_particles": args.particles,
        "lr": args.lr,
        "seed": args.seed,
        "draws": 200 if args.fast else DRAWS,
    }
    rows = []
    for name, program in programs().items():
        if not any(word in name for word in args.programs):
            continue
        run = measure if args.fast else _in_a_fresh_process
        ours, theirs = (run(name, guide, **settings) for guide in reversed(GUIDES))
        rows.append(
            {
                "program": name,
                "objective": type(program.elbo(1)).__name__,
                "D": ours["D"],
                **{f"{column}, AutoNormal": theirs[column] for column in list(theirs)[1:]},
                **{f"{column}, AutoSplineFlow": ours[column] for column in list(ours)[1:]},
                "difference": ours["ELBO"] - theirs["ELBO"],
                "se": math.hypot(ours["se"], theirs["se"]),
            }
        )
        print(_line(rows[-1]), flush=True)
    if args.output:
        _report(rows, args)
    return pd.DataFrame(rows)


def _in_a_fresh_process(*args: Any, **settings: Any) -> dict[str, float]:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *args, **settings).result()


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['program']:<24}D {row['D']:5d}  AutoNormal {row['ELBO, AutoNormal']:9.3f}  "
        f"AutoSplineFlow {row['ELBO, AutoSplineFlow']:9.3f}  difference {row['difference']:7.3f} ({row['se']:.3f})"
    )


def _report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        pairs = [
            [format_(row[f"{column}, {guide}"]) for guide in GUIDES]
            for column, format_ in (("CPU s", number), ("MiB", lambda mib: f"{mib:.0f}"))
        ]
        elbos = [f"{row[f'ELBO, {g}']:.3f} ({row[f'se, {g}']:.3f})" for g in GUIDES]
        difference = f"{row['difference']:+.3f} ({row['se']:.3f})"
        return [
            f"{row['program']} ({row['objective']})",
            str(row["D"]),
            *elbos,
            difference,
            *(" / ".join(pair) for pair in pairs),
        ]

    report = Report("AutoSplineFlow in the place of AutoNormal")
    report.add(
        "ELBO in nats by 10,000 draws, after training in one loop that differs by the guide's class alone; standard "
        f"errors in brackets. {args.steps} steps of Adam, its rate falling exponentially from {args.lr} to "
        f"{args.lr * FINAL_RATE:g}; {args.particles} particles, vectorised; seed {args.seed}. CPU seconds and peak "
        "memory (MiB above that of the imports) are those of the training: AutoNormal / AutoSplineFlow.",
        "",
        *table(
            ["program", "D", *GUIDES, "difference", "CPU s", "MiB"], [cells(row) for row in rows]
        ),
    )
    report.save(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.drop_in",
        description="AutoSplineFlow and AutoNormal in the same programs and the same loop (nats).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--programs", nargs="+", default=[""], metavar="WORD", help="those whose name holds a word"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    parser.add_argument("--lr", type=float, default=LR, help="of the first step")
    parser.add_argument("--particles", type=int, default=16, help="draws of the guide in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="save the table there, in Markdown")
    parser.add_argument("--fast", action="store_true", help="five steps each, to try it")
    return parser


if __name__ == "__main__":
    main()
