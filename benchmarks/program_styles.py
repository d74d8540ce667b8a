"""What a fit costs a model written for one draw, beside the same model written for a plate of draws.

Ten models in both styles (``b[group]`` and ``b[..., group]``, ``x @ w`` and its batched form; ``models/_styles.py``):
the Gaussian that a fit starts with, its ELBO after 60 steps, warnings, and the CPU time of a step of 64 particles, in
rounds of both styles. Then a state space model of 1,000 latents, site by site and as one site: how long it takes to
record it, what the graphs of a fit weigh (memory of the process, before and after, in a process of its own), and the
time of a step.

    python -m benchmarks.program_styles
"""

import argparse
import gc
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks._posteriors import Posterior
from benchmarks._svi_models import fit_step
from models._measure import Report, cpu_times, table
from models._styles import MODELS
from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import CALLS_OF_A_GRAPH, LatentDensity
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.training import Callback, FitState

STEPS, PARTICLES, ROUNDS = 60, 64, 20
TIMES = 1000
STYLES = {False: "one draw", True: "a plate of draws"}


class _Start(Callback):
    """Keeps location and scale of the Gaussian that a fit starts with."""

    loc: Tensor
    scale: Tensor

    def on_start(self, state: FitState) -> None:
        affine = state.guide.affine
        self.loc, self.scale = affine.loc.detach().clone(), affine.scale.detach().clone()


def trained(model: Callable[..., None]) -> tuple[_Start, float, int, Any]:
    """The start of a short fit, its ELBO (nats), the number of its warnings, and its guide."""
    pyro.clear_param_store()
    guide, start = AutoSplineFlow(model), _Start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, guide, max_steps=STEPS, seed=0, callbacks=[start], progress=False)
    return start, float(guide.evidence(seed=0).elbo), len(caught), guide


def both_styles(rounds: int) -> list[list[str]]:
    """A row for every model."""
    rows = []
    for name, written in MODELS.items():
        models = {batched: partial(written, batched) for batched in STYLES}
        found = {batched: trained(model) for batched, model in models.items()}
        steps = {
            STYLES[batched]: fit_step(
                Posterior(models[batched], (), None), found[batched][3], PARTICLES
            )[0]
            for batched in STYLES
        }
        timings = cpu_times(steps, repeats=rounds, calls=5)
        (one, elbo, warned, _), (other, other_elbo, other_warned, _) = found[False], found[True]
        apart = max(
            float((one.loc - other.loc).abs().max()), float((one.scale - other.scale).abs().max())
        )
        plain, batched = (timings[style] for style in STYLES.values())
        rows.append(
            [
                name.replace("_", " "),
                f"{elbo:.4f}",
                f"{other_elbo:.4f}",
                f"{apart:.0e}",
                str(warned + other_warned),
                str(plain),
                str(batched),
                f"{plain.times(batched):.2f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    return rows


def site_by_site(y: Tensor) -> None:
    """A random walk with a site for every time; ``y`` has shape ``(T,)``."""
    state = y.new_zeros(())
    for t, observed in enumerate(y):
        state = pyro.sample(f"z_{t}", dist.Normal(state, 0.3))
        pyro.sample(f"y_{t}", dist.Normal(state, 0.5), obs=observed)


def as_one_site(y: Tensor) -> None:
    """The same walk by its steps; ``y`` has shape ``(T,)``."""
    steps = pyro.sample("steps", dist.Normal(torch.zeros_like(y), 0.3).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), 0.5).to_event(1), obs=y)


WALKS = {model.__name__: model for model in (site_by_site, as_one_site)}


def weigh(name: str) -> None:
    """Print what a walk's recording takes: CPU seconds, MB with the graphs that follow, CPU milliseconds of a step."""
    with fixed_seed(torch.device("cpu"), 0):
        y = 0.3 * torch.randn(TIMES).cumsum(0) + 0.5 * torch.randn(TIMES)
    model = WALKS[name]
    small: dict[str, Any] = {"num_transforms": 2, "hidden_dims": [32, 32], "affine": "diagonal"}
    guide = AutoSplineFlow(model, **small).setup(y)
    gc.collect()
    before, begun = _resident(), time.process_time()
    density = LatentDensity(model, guide, (y,))
    seconds = time.process_time() - begun
    latent = guide.get_posterior().sample((PARTICLES,))
    for _ in range(CALLS_OF_A_GRAPH + 1):  # then there is one of the derivative, too
        leaf = latent.clone().requires_grad_()
        torch.autograd.grad(density(leaf).sum(), leaf)
    gc.collect()
    megabytes = (_resident() - before) / 2**20
    step, _ = fit_step(Posterior(model, (y,), None), guide, PARTICLES)
    timing = cpu_times({"step": step}, repeats=5, calls=1)["step"]
    reason = density._program.reasons.get("graph", "")
    print(f"{seconds:.1f}\t{megabytes:.0f}\t{timing}\t{reason}")


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def long_walks() -> list[list[str]]:
    """A row for every way to write the walk, each measured in a process of its own."""
    rows = []
    for name in WALKS:
        command = [sys.executable, "-m", "benchmarks.program_styles", "--weigh", name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append([name.replace("_", " "), *printed.splitlines()[-1].split("\t")])
        print(*rows[-1], sep="  ", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables and write them to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timings")
    parser.add_argument("--weigh", choices=WALKS, help="measure this walk alone, in this process")
    parser.add_argument("--output", default=RESULTS / "program_styles.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.weigh:
        return weigh(args.weigh)
    report = Report("One model in two styles")
    report.add(
        f"ELBO after {STEPS} steps (nats) of a model written for one draw and for a plate of draws; how far apart the "
        f"Gaussians are that the two fits start with; warnings of both; CPU milliseconds of a step of {PARTICLES} "
        f"particles, median of {args.rounds} rounds (best in brackets), and their ratio within the rounds.",
        "",
    )
    names = ["model", "ELBO", "batched", "starts apart", "warnings", "step", "batched", "x"]
    report.add(*table(names, both_styles(args.rounds)), "")
    report.add(f"## A state space model of {TIMES:,} latents", "")
    names = [
        "written",
        "CPU s to record",
        "MB",
        f"step of {PARTICLES} particles, CPU ms",
        "not recorded",
    ]
    report.add(*table(names, long_walks()))
    report.save(args.output)


if __name__ == "__main__":
    main()
