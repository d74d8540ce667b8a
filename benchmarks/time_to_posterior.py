"""CPU seconds from the call of fit to a posterior: until the ELBO is within .05 and .01 nats of the evidence.

On the posteriors of ``models._targets``, ten nearly Gaussian ones, a Gaussian process and a Lotka-Volterra model, by
AutoSplineFlow with the defaults, by AutoMultivariateNormal in a loop of SVI (2,000 steps of 128 particles), and, where
NumPyro can be imported, by its AutoIAFNormal (12,000 steps of 64 particles) and NUTS (to an effective sample size of
400), with their compilation on the clock. A small fit and a small program of NumPyro run before, so that the import of
libraries is not. ELBOs are by 8,192 draws of a fixed seed, off the clock. Where the evidence has no closed form it is
an estimate by 50,000 importance weights of the trained flow.

    python -m benchmarks.time_to_posterior
"""

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from benchmarks import RESULTS
from benchmarks._posteriors import Posterior, posteriors
from benchmarks.near_gaussian import MODELS, linear
from models._measure import Report, table
from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.training import Callback, FitState

JUDGES = 8192
EVIDENCE_DRAWS = 50_000
NEAR, NEARER = 0.05, 0.01
OURS, GAUSSIAN, IAF, NUTS = (
    "AutoSplineFlow",
    "AutoMultivariateNormal",
    "NumPyro IAF",
    "NumPyro NUTS",
)


@dataclass
class Course:
    """CPU seconds and ELBOs of one training, and the seconds when it returned."""

    seconds: list[float] = field(default_factory=list)
    elbos: list[float] = field(default_factory=list)
    end: float = math.nan
    log_evidence: float = math.nan

    def first(self, elbo: float) -> float | None:
        """When the ELBO was first so large; None if never. One that is larger by a nat and more is an overflow."""
        pairs = zip(self.seconds, self.elbos, strict=True)
        return next((seconds for seconds, found in pairs if elbo <= found < elbo + 1.0), None)


class _Clock(Callback):
    """Takes the ELBO every now and then, while the clock of CPU time stands still; or at the end only."""

    def __init__(self, posterior: Posterior, only_at_end: bool = False) -> None:
        self._posterior, self._only_at_end, self.course = posterior, only_at_end, Course()
        self._density: LatentDensity | None = None
        self._away = 0.0
        self._begun = time.process_time()

    def now(self) -> float:
        return time.process_time() - self._begun - self._away

    def _look(self, state: FitState) -> None:
        seconds, before = self.now(), time.process_time()
        if self._density is None:
            self._density = LatentDensity(self._posterior.model, state.guide, self._posterior.args)
        self.course.seconds.append(seconds)
        self.course.elbos.append(_elbo(state.guide, self._density))
        self._away += time.process_time() - before

    def on_start(self, state: FitState) -> None:
        if not self._only_at_end:
            self._look(state)

    def on_step(self, state: FitState) -> None:
        step = state.step
        if not self._only_at_end and step % (10 if step < 100 else 25 if step < 1000 else 100) == 0:
            self._look(state)

    def on_end(self, state: FitState) -> None:
        self.course.end = self.now()
        self._look(state)


@torch.no_grad()
def _elbo(guide: Any, density: LatentDensity) -> float:
    posterior = guide.get_posterior()
    with fixed_seed(guide._init_loc().device, 1):
        latent = posterior.sample((JUDGES,))
        log_prob = posterior.log_prob(latent)
    return float(torch.cat([density(part) for part in latent.split(2048)]).sub(log_prob).mean())


def by_flow(posterior: Posterior, seed: int, only_at_end: bool = False, **limits: Any) -> Course:
    """``fit`` with an AutoSplineFlow and nothing else, but for the limits given.

    Looks at the ELBO on the way count as time in ``max_seconds``, which is by the wall clock.
    """
    pyro.clear_param_store()
    guide = AutoSplineFlow(posterior.model)
    clock = _Clock(posterior, only_at_end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            posterior.model,
            guide,
            args=posterior.args,
            seed=seed,
            callbacks=[clock],
            progress=False,
            **limits,
        )
    evidence = guide.evidence(*posterior.args, num_samples=EVIDENCE_DRAWS, seed=0)
    clock.course.log_evidence = evidence.log_evidence
    return clock.course


def by_gaussian(posterior: Posterior, seed: int, seconds: float) -> Course:
    """Stochastic gradients for a Gaussian, as a loop of SVI takes them."""
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(posterior.model)
    clock = _Clock(posterior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            posterior.model,
            guide,
            args=posterior.args,
            num_particles=128,
            lr=1e-2,
            scheduler="flat_cosine",
            max_steps=2000,
            max_seconds=seconds,
            seed=seed,
            callbacks=[clock],
            progress=False,
        )
    return clock.course


def by_numpyro(posterior: Posterior, seed: int, seconds: float, guide: str) -> Course:
    """A guide of NumPyro's, until it is trained or the seconds are over."""
    from benchmarks._numpyro_peers import courses

    course = Course()
    for now, elbo in courses(posterior, seed, guide):
        course.seconds.append(now)
        course.elbos.append(elbo)
        if now > seconds:
            break
    course.end = course.seconds[-1]
    return course


def measure(
    name: str, posterior: Posterior, seed: int, seconds: float, guides: Sequence[str]
) -> Iterator[list[str]]:
    """The rows of a posterior; AutoSplineFlow's, which says what the evidence is, comes first."""
    ours = by_flow(posterior, seed)
    known = posterior.log_evidence
    log_evidence = ours.log_evidence if known is None else known
    yield _row(name, OURS, ours, log_evidence)
    if GAUSSIAN in guides:
        yield _row(name, GAUSSIAN, by_gaussian(posterior, seed, seconds), log_evidence)
    if IAF in guides:
        yield _row(name, IAF, by_numpyro(posterior, seed, seconds, IAF), log_evidence)
    if NUTS in guides:
        from benchmarks._numpyro_peers import nuts_seconds

        yield [name, NUTS, "", "", _seconds(nuts_seconds(posterior, seed)), ""]


def _row(name: str, guide: str, course: Course, log_evidence: float) -> list[str]:
    near = [_seconds(course.first(log_evidence - nats)) for nats in (NEAR, NEARER)]
    return [name, guide, *near, _seconds(course.end), _nats(log_evidence - course.elbos[-1])]


def _nats(gap: float) -> str:
    if gap < -1.0:
        return "overflow"
    return f"{gap:.1e}" if gap > 1e3 else f"{gap:.4f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Print the table and write it to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words = {"nargs": "+", "metavar": "WORD"}
    parser.add_argument("--posteriors", default=[""], help="those with one of these words", **words)
    parser.add_argument("--others", default=[""], help="posteriors for the other guides", **words)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, of every other guide")
    parser.add_argument("--output", default=RESULTS / "time_to_posterior.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    has_numpyro = importlib.util.find_spec("numpyro") is not None
    guides = [GAUSSIAN, IAF, NUTS] if has_numpyro else [GAUSSIAN]
    warm = Posterior(*linear(20, 1), None)
    by_flow(warm, 0, max_steps=20)
    if has_numpyro:
        by_numpyro(warm, 0, 0.0, IAF)
    rows: list[list[str]] = []
    for name, posterior in posteriors().items():
        if any(word in name for word in args.posteriors):
            others = guides if any(word in name for word in args.others) else ()
            for row in measure(name, posterior, args.seed, args.seconds, others):
                rows.append(row)
                print(*row, sep="  ", flush=True)
    _report(rows, args, has_numpyro)
    return rows


def _report(rows: Sequence[list[str]], args: argparse.Namespace, has_numpyro: bool) -> None:
    report = Report("Time to a posterior")
    text = (
        "CPU seconds from the call of fit until the ELBO is within 0.05 and 0.01 nats of the log evidence, and until "
        f"it returns; the gap in nats at the end (seed {args.seed}). NUTS: until the smallest effective sample size is "
        "400; - is never."
    )
    if not has_numpyro:
        text += " NumPyro could not be imported: its rows are left out."
    report.add(text, "")
    report.add(*table(["posterior", "guide", "to 0.05", "to 0.01", "returned", "gap"], rows), "")
    ends = [float(row[4]) for row in rows if row[0] in MODELS and row[1] == OURS]
    if ends:
        report.add(f"{OURS}, median of the nearly Gaussian ones: {statistics.median(ends):.1f} s.")
    report.save(args.output)


if __name__ == "__main__":
    main()
