r"""Guide against guide on posteriors with a known evidence, at equal CPU time.

    python -m models.posteriors                                 AutoSplineFlow on all, 3 seeds
    python -m models.posteriors --guides all --seeds 1          against Pyro's guides
    python -m models.posteriors --targets funnel --loop         trained in a loop of SVI instead of fit

AutoSplineFlow trains by its own recipe. Pyro's guides get what suits them: `fit` with 128 particles and the same
schedule. Where a guide's chance to find a good start differs (AutoIAFNormal has no init_loc_fn), that is part of the
guide. The targets are described in `_targets.py`.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.distributions.transforms import iterated, spline_coupling
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import init_to_value

from models._targets import Target, targets
from pyro_flowkit.diagnostics import evidence_bounds
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import Callback, FitState, fit

OURS = "AutoSplineFlow"
COUPLINGS = partial(iterated, 4, spline_coupling, hidden_dims=[32, 32], bound=10.0)
GUIDES: dict[str, Callable[[Target], Any]] = {
    OURS: lambda target: AutoSplineFlow(target.model),
    "AutoDiagonalNormal": lambda target: AutoDiagonalNormal(target.model, **_start(target)),
    "AutoMultivariateNormal": lambda target: AutoMultivariateNormal(target.model, **_start(target)),
    "AutoIAFNormal": lambda target: AutoIAFNormal(
        target.model, hidden_dim=[32, 32], num_transforms=4
    ),
    "AutoNormalizingFlow": lambda target: AutoNormalizingFlow(target.model, COUPLINGS),
}
NUM_PARTICLES = 128


def _start(target: Target) -> dict[str, Any]:
    return {"init_loc_fn": init_to_value(values=target.start)}


class _CpuLimit(Callback):
    """Ends a fit after so many seconds of CPU time."""

    def __init__(self, seconds: float):
        self._end = time.process_time() + seconds

    def on_step(self, state: FitState) -> None:
        if time.process_time() > self._end:
            state.stop = "cpu time"


def train(target: Target, guide: Any, *, seconds: float, steps: int | None, seed: int) -> int:
    """Train by `fit` for about so many CPU seconds; the number of steps."""
    ours = isinstance(guide, AutoSplineFlow)
    result = fit(
        target.model,
        guide,
        args=target.args,
        num_particles=None if ours else NUM_PARTICLES,
        scheduler=None if ours else "flat_cosine",
        lr=None if ours else 1e-2 if "Normal" in type(guide).__name__[-6:] else 3e-3,
        max_steps=steps,
        max_seconds=seconds,
        callbacks=[_CpuLimit(seconds)],
        seed=seed,
        progress=False,
    )
    return len(result.history["step"])


def train_in_a_loop(target: Target, guide: Any, *, seconds: float, steps: int | None) -> int:
    """What a user's own program does: SVI, Adam with a rate that falls, Trace_ELBO; the number of steps."""
    elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    limit = steps or 10**9
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 3e-3},
            "lr_lambda": lambda _: min(1.0, 2.0 * (1.0 - used)) ** 2,
        }
    )
    svi = SVI(target.model, guide, optimizer, elbo)
    begun, done, used = time.process_time(), 0, 0.0
    while used < 1.0:
        svi.step(*target.args)
        optimizer.step()
        done += 1
        used = max(done / limit, (time.process_time() - begun) / seconds)
    return done


@contextmanager
def _float64() -> Iterator[None]:
    """Pyro's flow guides make their networks and base in the default dtype, not in the model's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure(
    name: str, target: Target, *, seconds: float, steps: int | None, seed: int, loop: bool
) -> dict[str, float]:
    """Train a fresh guide; ELBO, gap, pareto k, CPU seconds and steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    begun = time.process_time()
    with _float64():
        guide = GUIDES[name](target)
        if loop:
            done = train_in_a_loop(target, guide, seconds=seconds, steps=steps)
        else:
            done = train(target, guide, seconds=seconds, steps=steps, seed=seed)
        cpu = time.process_time() - begun
        bounds = evidence_bounds(
            target.model,
            guide,
            args=target.args,
            num_samples=20_000 if steps is None else 1000,
            num_particles=(1,),
            exact_log_evidence=target.log_evidence,
            seed=seed,
        )
    return {
        "ELBO": float(bounds["elbo"]),
        "se": float(bounds["elbo_se"]),
        "gap": float(bounds["gap"]),
        "pareto k": float(bounds["pareto_k"]),
        "CPU s": cpu,
        "steps": done,
    }


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Train and print a row for every target, guide and seed."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    names = list(GUIDES) if "all" in args.guides else args.guides
    rows = []
    for target_name, target in targets().items():
        if not any(word in target_name for word in args.targets):
            continue
        for name in names:
            for seed in range(args.seeds):
                numbers = measure(
                    name,
                    target,
                    seconds=args.seconds,
                    steps=2 if args.fast else None,
                    seed=seed,
                    loop=args.loop,
                )
                rows.append({"target": target_name, "guide": name, "seed": seed, **numbers})
                print(_line(rows[-1]), flush=True)
    if args.output:
        _report(rows, args)
    return pd.DataFrame(rows)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['target']:<28}{row['guide']:<24}seed {row['seed']}  ELBO {row['ELBO']:9.3f} ({row['se']:.3f})  "
        f"gap {row['gap']:7.3f}  pareto k {row['pareto k']:5.2f}  {row['steps']:6d} steps  {row['CPU s']:5.0f} CPU s"
    )


def _report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    from benchmarks._measure import Report, table

    driver = "a loop of SVI" if args.loop else "fit"
    report = Report("Guides on posteriors with a known evidence")
    report.add(
        f"After {args.seconds:g} CPU seconds of {driver}, by 20,000 draws; nats, standard errors in brackets. The gap "
        "is the exact log evidence less the ELBO.",
        "",
        *table(
            ["posterior", "guide", "seed", "ELBO", "gap", "pareto k", "steps"],
            [
                [
                    row["target"],
                    row["guide"],
                    str(row["seed"]),
                    f"{row['ELBO']:.3f} ({row['se']:.3f})",
                    f"{row['gap']:.3f}",
                    f"{row['pareto k']:.2f}",
                    str(row["steps"]),
                ]
                for row in rows
            ],
        ),
    )
    report.save(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.posteriors",
        description="Guides on posteriors with a known evidence, at equal CPU time (nats).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--guides", nargs="+", choices=[*GUIDES, "all"], default=[OURS])
    parser.add_argument(
        "--targets", nargs="+", default=[""], metavar="WORD", help="those whose name holds a word"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU time, each")
    parser.add_argument("--loop", action="store_true", help="a loop of SVI instead of fit")
    parser.add_argument("--output", metavar="FILE", help="save the table there, in Markdown")
    parser.add_argument("--fast", action="store_true", help="two steps each, to try it")
    return parser


if __name__ == "__main__":
    main()
