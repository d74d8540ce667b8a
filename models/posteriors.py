r"""Guide against guide, and NUTS, on posteriors with a known evidence, at equal CPU time.

    python -m models.posteriors                                 AutoSplineFlow on all, 3 seeds
    python -m models.posteriors --guides all --seeds 1          against Pyro's guides and NUTS
    python -m models.posteriors --targets funnel --loop         trained in a loop of SVI instead of fit

AutoSplineFlow trains by its own recipe. Pyro's guides get what suits them: ``fit`` with 128 particles and the same
schedule. Where a guide's chance to find a good start differs (AutoIAFNormal has no init_loc_fn), that is part of the
guide. The targets are described in ``_targets.py``.

NUTS has no ELBO and no pareto k. With it in the list, all rows get the worst errors of posterior means and standard
deviations, in posterior standard deviations (``_nuts.py``), and its own get r_hat, effective sample size and
divergences. The comparison is fair on eight schools non-centred, Seeds, the terrain and the banana, where NUTS is at
home. It is not on the funnel and on eight schools centred, its best-known failures, for which one would write the model
differently. On what has no exact draws the reference is an AutoSplineFlow with importance weights, trained apart: a
guide row there is measured with its own kind, NUTS is not.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
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

from models._measure import Report, table
from models._nuts import errors, reference, run_nuts
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
NUTS = "NUTS"
NUM_PARTICLES = 128
NUM_DRAWS = 20_000
REFERENCE_SEED = 1000
MIN_REFERENCE_SECONDS = 60.0
COLUMNS = {
    "ELBO": ".3f",
    "se": ".3f",
    "gap": ".3f",
    "pareto k": ".2f",
    "mean error": ".3f",
    "sd error": ".3f",
    "r_hat": ".3f",
    "ESS": ".0f",
    "divergences": ".0f",
    "steps": ".0f",
    "CPU s": ".0f",
}


def _start(target: Target) -> dict[str, Any]:
    return {"init_loc_fn": init_to_value(values=target.start)}


class _CpuClock(Callback):
    """Notes the CPU time at the start of a fit, when a guide's own start has been found, and after every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_start(self, state: FitState) -> None:
        self.times.append(time.process_time())

    def on_step(self, state: FitState) -> None:
        self.times.append(time.process_time())


def train(target: Target, guide: Any, *, seconds: float, steps: int | None, seed: int) -> int:
    """Train by ``fit`` for about so many CPU seconds; the number of steps."""
    ours = isinstance(guide, AutoSplineFlow)
    run = partial(
        fit,
        target.model,
        args=target.args,
        num_particles=None if ours else NUM_PARTICLES,
        scheduler=None if ours else "flat_cosine",
        lr=None if ours else 1e-2 if "Normal" in type(guide).__name__[-6:] else 3e-3,
        seed=seed,
        progress=False,
    )
    if steps is None:
        steps = _steps_in(seconds, run, GUIDES[type(guide).__name__](target))
    return len(run(guide=guide, max_steps=steps).history["step"])


def _steps_in(seconds: float, run: Callable[..., Any], guide: Any) -> int:
    """How many steps fit into the CPU time, by a trial; the time of day would count what else the machine does."""
    clock, begun = _CpuClock(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forty steps are too few for a flow to gain anything
        run(guide=guide, max_steps=40, callbacks=[clock])
    pyro.clear_param_store()
    per_step = statistics.median(b - a for a, b in pairwise(clock.times))
    return max(1, int((seconds - (clock.times[0] - begun)) / per_step))


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
    name: str,
    target: Target,
    *,
    seconds: float,
    steps: int | None,
    seed: int,
    loop: bool,
    exact: torch.Tensor | None = None,
) -> dict[str, float]:
    """Train a fresh guide, or run NUTS; those of the ``COLUMNS`` that there are numbers for.

    Args:
        name: one of the ``GUIDES``, or "NUTS", whose steps are the draws that it has kept.
        target: the posterior.
        seconds: of CPU time.
        steps: in place of the seconds, to try it.
        seed: of everything random.
        loop: train the guide in a loop of SVI instead of ``fit``.
        exact: draws of the posterior, for the errors of means and standard deviations.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    begun = time.process_time()
    with _float64():
        if name == NUTS:
            chains = run_nuts(target, seconds=seconds, steps=steps, seed=seed)
            numbers: dict[str, float] = {
                **chains.numbers(),
                "steps": chains.draws.shape[:2].numel(),
            }
            numbers["CPU s"] = time.process_time() - begun
            draws = chains.draws.flatten(0, 1)
        else:
            guide = GUIDES[name](target)
            if loop:
                done = train_in_a_loop(target, guide, seconds=seconds, steps=steps)
            else:
                done = train(target, guide, seconds=seconds, steps=steps, seed=seed)
            numbers = {"steps": done, "CPU s": time.process_time() - begun}
            numbers |= _bounds(target, guide, NUM_DRAWS if steps is None else 1000, seed)
            with torch.no_grad():
                draws = guide.get_posterior().sample((NUM_DRAWS,))
    return numbers if exact is None else {**numbers, **errors(draws, exact)}


def _bounds(target: Target, guide: Any, num_samples: int, seed: int) -> dict[str, float]:
    bounds = evidence_bounds(
        target.model,
        guide,
        args=target.args,
        num_samples=num_samples,
        num_particles=(1,),
        exact_log_evidence=target.log_evidence,
        seed=seed,
    )
    names = {"ELBO": "elbo", "se": "elbo_se", "gap": "gap", "pareto k": "pareto_k"}
    return {column: float(bounds[name]) for column, name in names.items()}


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Train and print a row for every target, guide and seed; NaN where there is no number."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    names = [*GUIDES, NUTS] if "all" in args.guides else args.guides
    steps = 2 if args.fast else None
    train_reference = partial(
        train, seconds=max(args.seconds, MIN_REFERENCE_SECONDS), steps=steps, seed=REFERENCE_SEED
    )
    rows = []
    for target_name, target in targets().items():
        if not any(word in target_name for word in args.targets):
            continue
        exact = None
        if NUTS in names:
            exact = reference(target, partial(train_reference, target))
        for name in names:
            for seed in range(args.seeds):
                numbers = measure(
                    name,
                    target,
                    seconds=args.seconds,
                    steps=steps,
                    seed=seed,
                    loop=args.loop,
                    exact=exact,
                )
                rows.append({"target": target_name, "guide": name, "seed": seed, **numbers})
                print(_line(rows[-1]), flush=True)
    if args.output:
        _report(rows, args)
    return pd.DataFrame(rows, columns=["target", "guide", "seed", *COLUMNS])


def _cell(row: dict[str, Any], column: str) -> str:
    return format(row[column], COLUMNS[column]) if column in row else "-"


def _line(row: dict[str, Any]) -> str:
    numbers = "  ".join(f"{column} {_cell(row, column)}" for column in COLUMNS if column in row)
    return f"{row['target']:<28}{row['guide']:<24}seed {row['seed']}  {numbers}"


def _report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    driver = "a loop of SVI" if args.loop else "fit"
    text = (
        f"After {args.seconds:g} CPU seconds of {driver}, by {NUM_DRAWS:,} draws; nats, standard errors in brackets. "
        "The gap is the exact log evidence less the ELBO."
    )
    columns = [column for column in COLUMNS if column not in ("se", "CPU s")]
    if all(row["guide"] != NUTS for row in rows):
        columns = [column for column in columns if column in rows[0]]
    else:
        text += (
            " The errors are those of the worst posterior mean and standard deviation of an unconstrained latent, in "
            "posterior standard deviations, against exact draws or, for eight schools and Seeds, importance-weighted "
            "ones of a flow trained apart. NUTS has no ELBO; its steps are the draws kept of two chains, r_hat and ESS "
            "those of the worst latent. The funnel and eight schools centred are not fair to it."
        )
    report = Report("Guides on posteriors with a known evidence")
    cells = [[row["target"], row["guide"], str(row["seed"])] for row in rows]
    for cell, row in zip(cells, rows, strict=True):
        for column in columns:
            se = f" ({_cell(row, 'se')})" if column == "ELBO" and "se" in row else ""
            cell.append(_cell(row, column) + se)
    report.add(text, "", *table(["posterior", "guide", "seed", *columns], cells))
    report.save(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.posteriors",
        description="Guides and NUTS on posteriors with a known evidence, at equal CPU time (nats).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--guides", nargs="+", choices=[*GUIDES, NUTS, "all"], default=[OURS])
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
