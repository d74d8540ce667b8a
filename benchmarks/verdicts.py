r"""Are verdicts on guides right, and the same at every seed?

Forty guides that are good by truth (means within 0.05 sd, sds within 5 %, gap at most 0.02 nats) and twenty that are
wrong on purpose, of 1 to 50 dimensions. Posteriors are known: the model samples its latents from the posterior itself,
so that the log evidence is 0, and nothing is trained. What is true of each guide is measured on 200,000 draws. Each is
judged at ten seeds by ``diagnose(evidence_bounds(model, guide))`` at the default number of draws, with and without the
result of ``probe_modes``.

    python -m benchmarks.verdicts
    python -m benchmarks.verdicts --quick
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit.diagnostics import Verdict, diagnose, evidence_bounds, probe_modes

DOUBLE = torch.float64
TRUTH_DRAWS = 200_000
LEVELS = ("good", "usable", "bad")


@dataclass(frozen=True)
class Case:
    """A posterior and a guide, both over the one latent "z" of event_dim 1."""

    name: str
    posterior: dist.TorchDistribution
    proposal: dist.TorchDistribution

    def model(self) -> None:
        pyro.sample("z", self.posterior)

    def guide(self) -> None:
        pyro.sample("z", self.proposal)


@dataclass(frozen=True)
class Truth:
    """How far a guide is from its posterior: nats, the largest shift of a mean in sd, the sd farthest from right."""

    gap: float
    shift: float
    ratio: float

    @classmethod
    @torch.no_grad()
    def of(cls, case: Case) -> "Truth":
        torch.manual_seed(0)
        guide, posterior = (d.sample((TRUTH_DRAWS,)) for d in (case.proposal, case.posterior))
        gap = (case.proposal.log_prob(guide) - case.posterior.log_prob(guide)).mean()
        right = posterior.std(0)
        ratios = (guide.std(0) / right).log()
        return cls(
            float(gap),
            float(((guide.mean(0) - posterior.mean(0)) / right).abs().max()),
            math.exp(float(ratios[ratios.abs().argmax()])),
        )

    @property
    def is_good(self) -> bool:
        return self.gap <= 0.02 and self.shift <= 0.05 and 0.95 <= self.ratio <= 1.05


@dataclass(frozen=True)
class Run:
    """Verdicts on one guide, one a seed; and what was spent."""

    case: Case
    truth: Truth
    plain: list[Verdict]
    probed: list[Verdict]
    draws: list[int]
    probe_seconds: float


def full(size: int, value: float) -> Tensor:
    return torch.full((size,), value, dtype=DOUBLE)


def normal(size: int, loc: float = 0.0, scale: float = 1.0) -> dist.TorchDistribution:
    return dist.Normal(full(size, loc), scale).to_event(1)


def student(size: int, df: float, scale: float = 1.0) -> dist.TorchDistribution:
    return dist.StudentT(full(size, df), 0.0, scale).to_event(1)


def correlated(size: int, correlation: float, loc: float, scale: float) -> dist.TorchDistribution:
    covariance = torch.full((size, size), correlation, dtype=DOUBLE).fill_diagonal_(1.0)
    return dist.MultivariateNormal(full(size, loc), scale**2 * covariance)


def gamma(size: int, shape: float) -> dist.TorchDistribution:
    return dist.Gamma(full(size, shape), 1.0).to_event(1)


def log_normal(size: int, shape: float, wider: float = 1.0) -> dist.TorchDistribution:
    """The moments of the log of a Gamma."""
    a = torch.tensor(shape, dtype=DOUBLE)
    scale = torch.polygamma(1, a).sqrt() * wider
    return dist.LogNormal(full(size, float(torch.digamma(a))), scale).to_event(1)


def logit_normal(size: int, a: float, b: float) -> dist.TorchDistribution:
    """The moments of the logit of a Beta(a, b)."""
    first, second = torch.tensor([a, b], dtype=DOUBLE)
    loc = torch.digamma(first) - torch.digamma(second)
    scale = (torch.polygamma(1, first) + torch.polygamma(1, second)).sqrt()
    base = dist.Normal(loc.expand(size), scale)
    return dist.TransformedDistribution(base, [dist.transforms.SigmoidTransform()]).to_event(1)


def beta(size: int, a: float, b: float) -> dist.TorchDistribution:
    return dist.Beta(full(size, a), full(size, b)).to_event(1)


def one_off(size: int, loc: float = 0.0, scale: float = 1.0) -> dist.TorchDistribution:
    """Standard normals, but for the last one."""
    locs, scales = full(size, 0.0), full(size, 1.0)
    locs[-1], scales[-1] = loc, scale
    return dist.Normal(locs, scales).to_event(1)


def two_modes(size: int, weight: float) -> dist.TorchDistribution:
    """Normals at -6 and, with this weight, at 6 in all dimensions."""
    locs = torch.stack([full(size, -6.0), full(size, 6.0)])
    parts = dist.Independent(dist.Normal(locs, 1.0), 1)
    choice = torch.tensor([1 - weight, weight], dtype=DOUBLE)
    return dist.MixtureSameFamily(dist.Categorical(choice), parts)


def uniform(size: int, high: float = 1.0) -> dist.TorchDistribution:
    """On the unit cube, but for the last one, which ends at ``high``."""
    ends = full(size, 1.0)
    ends[-1] = high
    return dist.Uniform(full(size, 0.0), ends).to_event(1)


def good_cases() -> list[Case]:
    cases = []
    for size, loc, scale in (
        (1, 0.045, 0.955),
        (1, -0.045, 1.045),
        (2, 0.04, 0.96),
        (2, -0.03, 1.04),
        (5, 0.04, 0.96),
        (5, 0.04, 1.04),
        (10, 0.035, 0.97),
        (10, 0.03, 1.035),
        (20, 0.03, 0.98),
        (20, 0.02, 1.025),
        (50, 0.02, 0.99),
        (50, 0.015, 1.01),
    ):
        name = f"normal, {size} d, guide {loc:+g} sd, sd x {scale:g}"
        cases.append(Case(name, normal(size), normal(size, loc, scale)))
    for size, scale in ((2, 0.97), (2, 1.03), (10, 0.98), (10, 1.02), (30, 0.99), (50, 1.01)):
        name = f"normal, {size} d, correlations .9, guide +0.03 sd, sd x {scale:g}"
        posterior = correlated(size, 0.9, 0.0, 1.0)
        cases.append(Case(name, posterior, correlated(size, 0.9, 0.03, scale)))
    for size, shape in ((1, 20), (1, 50), (1, 100), (3, 20), (5, 50), (10, 100)):
        name = f"Gamma({shape}), {size} d, log-normal guide"
        cases.append(Case(name, gamma(size, shape), log_normal(size, shape)))
    for size, shape in ((1, 30), (3, 100)):
        name = f"Gamma({shape}), {size} d, log-normal guide, sd of log x 1.03"
        cases.append(Case(name, gamma(size, shape), log_normal(size, shape, 1.03)))
    for size, a, b in ((1, 20, 30), (1, 80, 15), (3, 20, 30), (8, 40, 40)):
        name = f"Beta({a}, {b}), {size} d, logit-normal guide"
        cases.append(Case(name, beta(size, a, b), logit_normal(size, a, b)))
    for size, df, scale in ((1, 10, 1.08), (1, 15, 1.05), (1, 30, 1.02), (3, 15, 1.06)):
        name = f"t({df}), {size} d, normal guide"
        cases.append(Case(name, student(size, df), normal(size, 0.0, scale)))
    for size, df, other in (
        (1, 5, 6),
        (1, 8, 10),
        (5, 8, 10),
        (10, 8, 10),
        (5, 12, 9),
        (20, 10, 10),
    ):
        name = f"t({df}), {size} d, guide t({other}), sd x 1.01"
        cases.append(Case(name, student(size, df), student(size, other, 1.01)))
    return cases


def wrong_cases() -> list[Case]:
    cases = []
    for scale in (0.8, 1.3):
        for size in (1, 5, 20):
            cases.append(Case(f"sd x {scale}, {size} d", normal(size), normal(size, scale=scale)))
        cases.append(Case(f"sd x {scale} in 1 of 10 d", normal(10), one_off(10, scale=scale)))
    cases += [
        Case("+0.3 sd, 1 d", normal(1), normal(1, 0.3)),
        Case("+0.3 sd, 5 d", normal(5), normal(5, 0.3)),
        Case("+0.3 sd in 1 of 10 d", normal(10), one_off(10, loc=0.3)),
        Case("tail of t(3), 1 d, normal guide", student(1, 3), normal(1, scale=1.2)),
        Case("tail of t(3), 5 d, normal guide", student(5, 3), normal(5, scale=1.2)),
        Case("tail of t(2), 2 d, normal guide", student(2, 2), normal(2, scale=1.3)),
        Case("one of two equal modes, 1 d", two_modes(1, 0.5), normal(1, 6.0)),
        Case("one of two equal modes, 5 d", two_modes(5, 0.5), normal(5, 6.0)),
        Case("the mode of .7 without that of .3, 2 d", two_modes(2, 0.7), normal(2, 6.0)),
        Case("half of U(0, 1), 1 d", uniform(1), uniform(1, 0.5)),
        Case("half of U(0, 1)^3", uniform(3), uniform(3, 0.5)),
        Case(
            "the positive half of a normal, 1 d",
            normal(1),
            dist.HalfNormal(full(1, 1.0)).to_event(1),
        ),
    ]
    return cases


def judged(case: Case, seeds: int) -> Run:
    start = time.process_time()
    probe = probe_modes(case.model, case.guide)
    seconds = time.process_time() - start
    plain, probed, draws = [], [], []
    for seed in range(seeds):
        bounds = evidence_bounds(case.model, case.guide, seed=seed)
        plain.append(diagnose(bounds))
        probed.append(diagnose(bounds, probe=probe))
        draws.append(int(bounds["num_draws"]))
    return Run(case, Truth.of(case), plain, probed, draws, seconds)


def counts(verdicts: Sequence[Verdict]) -> str:
    levels = Counter(verdict.level for verdict in verdicts)
    return " ".join(f"{levels[level]} {level}" for level in LEVELS if levels[level])


def share_of_same(runs: Sequence[Run], which: Callable[[Run], list[Verdict]]) -> float:
    """How many verdicts are the most frequent one of their guide."""
    most = [Counter(v.level for v in which(run)).most_common(1)[0][1] for run in runs]
    return sum(most) / sum(len(which(run)) for run in runs)


def rows(runs: Sequence[Run]) -> list[str]:
    cells = [
        [
            run.case.name,
            f"{run.truth.gap:.4f}",
            f"{run.truth.shift:.2f}",
            f"{run.truth.ratio:.2f}",
            counts(run.plain),
            counts(run.probed),
            f"{sum(run.draws) / len(run.draws):,.0f}",
            f"{run.probe_seconds:.1f}",
        ]
        for run in runs
    ]
    titles = [
        "guide",
        "gap",
        "means off",
        "sd ratio",
        "verdicts",
        "with a probe",
        "draws",
        "probe, CPU s",
    ]
    return table(titles, cells)


def summary(good: Sequence[Run], wrong: Sequence[Run]) -> list[str]:
    total = sum(len(run.plain) for run in good)
    cells = []

    def add(asked: str, found: str, holds: bool) -> None:
        cells.append([asked, found, "yes" if holds else "NO"])

    for title, which in (("", lambda r: r.plain), (", with a probe", lambda r: r.probed)):
        bad = sum(v.level == "bad" for run in good for v in which(run))
        same = share_of_same(good, which)
        add(f"good guides called bad{title}: at most 2 %", f"{bad} of {total}", bad <= 0.02 * total)
        add(f"good guides, the same verdict{title}: at least 90 %", f"{same:.1%}", same >= 0.9)
    unlimited = sum(
        any(v.level == "good" and not v.limits for v in (*run.plain, *run.probed)) for run in wrong
    )
    add("wrong guides called good without limits: none", f"{unlimited}", unlimited == 0)
    never = sum(all(v.level == "bad" for v in run.probed) for run in wrong)
    add(
        f"wrong guides called bad with a probe, at every seed: 18 of {len(wrong)}",
        f"{never}",
        never >= 18,
    )
    alone = sum(all(v.level == "bad" for v in run.plain) for run in wrong)
    cells.append(["wrong guides called bad without a probe, at every seed", f"{alone}", ""])
    return table(["asked for", "found", "holds"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    start = time.process_time()
    seeds = 2 if args.quick else args.seeds
    good, wrong = good_cases(), wrong_cases()
    if args.quick:
        good, wrong = good[::8], wrong[::5]
    runs = {}
    for name, cases in (("good", good), ("wrong", wrong)):
        runs[name] = [judged(case, seeds) for case in cases]
    not_good = [run.case.name for run in runs["good"] if not run.truth.is_good]
    if not_good:
        raise ValueError(f"Expected guides that are good by truth, got {not_good}")
    report = Report("Verdicts on guides")
    report.add(__doc__.split("\n    python")[0].strip(), "")
    report.add(f"{seeds} seeds; {time.process_time() - start:.0f} CPU seconds in all.", "")
    report.add(*summary(runs["good"], runs["wrong"]), "")
    report.add("## Good by truth", "", *rows(runs["good"]), "")
    report.add("## Wrong on purpose", "", *rows(runs["wrong"]), "")
    report.save(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verdicts",
        description="Verdicts on guides of known quality, over seeds.",
    )
    parser.add_argument("--seeds", type=int, default=10, help="seeds of each guide (default: 10)")
    parser.add_argument("--quick", action="store_true", help="a few guides and two seeds")
    parser.add_argument("--output", default=RESULTS / "verdicts.md", help="Markdown file")
    return parser


if __name__ == "__main__":
    main()
