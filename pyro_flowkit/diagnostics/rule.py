r"""The one rule by which guides are judged, and the words for what it finds.

R-hat and ESS look at how draws depend on each other. The draws of a guide are independent, so both
reassure whatever the guide is worth. The weights ``w = p(x, z) / q(z)`` do see it. What counts is

- the gap, ``log p(x) - ELBO = KL(guide || posterior)``, from the exact log evidence, where that is
  given, or its PSIS estimate;
- how far the marginals of the draws move when they are weighted (:mod:`.marginals`);
- the share of the evidence that the draws may have left unseen, from the largest weight and pareto k
  (:mod:`.tails`);
- the spread of the weights, log(S / ESS) for S draws, twice the gap where guide and posterior are
  normal, and more where the tail is heavy.

Each is known within an error. A verdict that an error could turn is said to hang on noise; more
draws settle it.
"""

import math
from dataclasses import dataclass, field

from pyro_flowkit.diagnostics.tails import LARGE_GAP, MUCH_UNSEEN
from pyro_flowkit.diagnostics.verdict import LEVELS, Verdict
from pyro_flowkit.ops.psis import unseen_share

MIN_DRAWS = 100
"""From fewer draws no guide is called good."""

_SMALL_EXACT_GAP = 0.02  # nats; a part that is missed has no more than that share of the mass
_HEAVY_K = 0.7
_FAR_ABOVE = 10.0  # times the mean of the weights
_MANY_DRAWS = 4000
_MISSED = 0.05  # a share of the posterior; three nats

_TAIL_LIMITS = (
    "The weights have a heavy tail, though it carries little: the posterior's own tails, and with them "
    "raw moments of latents with heavy tails, may be wider than the guide's."
)
_LIMITS = (
    "The draws cannot see a mode that the guide never visits, nor a part of the support that it "
    "leaves out: probe_modes looks for those."
)


@dataclass(frozen=True)
class Check:
    """A number, the range that its error leaves it, and the borders beyond which a guide is not good, or bad."""

    value: float
    low: float
    high: float
    usable: float
    bad: float

    def _level(self, value: float) -> int:
        return 2 if not value <= self.bad else 1 if value > self.usable else 0

    @property
    def is_settled(self) -> bool:
        """Whether the error leaves one level."""
        return self._level(self.low) == self._level(self.high)

    @property
    def cannot_tell(self) -> bool:
        """Whether the error leaves all three levels."""
        return self._level(self.low) == 0 and self._level(self.high) == 2

    @property
    def level(self) -> int:
        """An index into ``LEVELS``: that of the value, or the middle one where all three are left."""
        return 1 if self.cannot_tell else self._level(self.value)

    @property
    def surely_bad(self) -> bool:
        return self._level(self.low) == 2

    @property
    def more_draws(self) -> float:
        """How many times as many draws would settle it, as the error falls with their root."""
        nearest = min(abs(self.value - border) for border in (self.usable, self.bad))
        return ((self.value - self.low) / nearest) ** 2 if nearest > 0 else math.inf


@dataclass(frozen=True)
class Marginal:
    """The marginal that moves most when the draws are weighted, in one respect.

    Attributes:
        latent: its name.
        value: how far the guide is from the weighted draws: in standard deviations for a location, as a ratio of
            standard deviations for a scale.
        size: of the move, its noise taken off; the absolute value or the absolute log-ratio.
        low: the largest size of any latent that is sure.
        high: the largest one of any latent that is possible.
    """

    latent: str
    value: float
    size: float
    low: float
    high: float


@dataclass(frozen=True)
class Numbers:
    """What a guide is judged by.

    Attributes:
        num_draws: of the guide.
        elbo: in nats.
        gap: log evidence minus ELBO, in nats.
        gap_error: its standard error.
        exact: whether the log evidence is exact.
        pareto_k: of the weights; ``inf`` where it is unknown.
        pareto_k_error: its standard error.
        largest_weight: of the normalised, smoothed weights.
        ess: of the weights, in draws.
        spread_error: standard error of the log of ``num_draws / ess``.
        shift: of the location that moves most; None where marginals were not looked at.
        scale: the same of the scale.
    """

    num_draws: int
    elbo: float
    gap: float
    gap_error: float
    exact: bool
    pareto_k: float
    pareto_k_error: float
    largest_weight: float
    ess: float
    spread_error: float
    shift: Marginal | None = None
    scale: Marginal | None = None

    def unseen(self, errors: float = 0.0) -> float:
        """The share of the evidence that may lie beyond the draws, with a pareto k larger by so many errors."""
        return unseen_share(self.largest_weight, self.pareto_k + errors * self.pareto_k_error)

    def _spread_without_largest(self) -> float:
        """The spread of the other weights: one draw is never sure."""
        p = self.largest_weight
        return math.log(
            self.num_draws * max(1.0 / self.ess - p**2, 1e-300) / max(1.0 - p, 1e-9) ** 2
        )

    @property
    def gap_is_exact_and_small(self) -> bool:
        return self.exact and self.gap + 2 * self.gap_error <= _SMALL_EXACT_GAP

    @property
    def checks(self) -> dict[str, Check]:
        """The checks by name; an exact gap that is small leaves nothing else to ask."""
        error = 2 * self.gap_error
        beyond = 0.0 if self.exact else math.log1p(self.unseen(1.0))
        checks = {
            "gap": Check(self.gap, self.gap - error, self.gap + error + beyond, 0.1, LARGE_GAP)
        }
        if self.gap_is_exact_and_small:
            return checks
        if not self.exact:
            unseen = Check(self.unseen(), self.largest_weight, self.unseen(1.0), MUCH_UNSEEN, 0.1)
            checks["unseen"] = unseen
            spread, error = math.log(self.num_draws / self.ess), 2 * self.spread_error
            low = min(spread - error, self._spread_without_largest())
            checks["spread"] = Check(spread, low, spread + error, -math.log(0.7), -math.log(0.35))
        for name, marginal, usable, bad in (
            ("shift", self.shift, 0.1, 0.2),
            ("scale", self.scale, math.log(1.1), math.log(1.2)),
        ):
            if marginal is not None:
                sizes = (marginal.size, marginal.low, marginal.high)
                checks[name] = Check(*sizes, usable, bad)
        return checks

    @property
    def hangs_on_noise(self) -> bool:
        """Whether more draws may lead to another verdict."""
        if not math.isfinite(self.elbo) or self.is_above_exact:
            return False
        checks = self.checks.values()
        if any(check.surely_bad for check in checks):
            return False
        return self.num_draws < MIN_DRAWS or not all(check.is_settled for check in checks)

    @property
    def is_above_exact(self) -> bool:
        """Whether the ELBO is above the exact log evidence, by more than 0.1 nats and four standard errors."""
        return self.exact and self.gap + 4 * self.gap_error < -0.1

    @property
    def is_heavy(self) -> bool:
        """Whether the tail of the weights is heavy, and its largest weight far above the others."""
        return not self.pareto_k <= _HEAVY_K and self.largest_weight * self.num_draws > _FAR_ABOVE


@dataclass(frozen=True)
class Probe:
    """What ``probe_modes`` found, as far as a verdict needs it.

    Attributes:
        num_starts: of the optimisations.
        missed: the share of the posterior, at least, that the guide leaves out.
        where: the place of the largest part of it, in words.
    """

    num_starts: int
    missed: float
    where: str


@dataclass
class _Words:
    reasons: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def verdict(self, level: int, limits: str = "") -> Verdict:
        return Verdict(LEVELS[level], ", ".join(self.reasons), " ".join(self.advice), limits)


def judge(numbers: Numbers, probe: Probe | None = None) -> Verdict:
    """The verdict on a guide, by its worst check; ``diagnose`` has the table."""
    if not math.isfinite(numbers.elbo):
        return Verdict(
            "bad",
            f"the ELBO is {numbers.elbo}: the guide draws values that the model excludes",
            "Give the guide the support of the model's latents.",
        )
    if numbers.is_above_exact:
        return Verdict(
            "bad",
            f"the ELBO of {numbers.elbo:.2f} is above the exact log evidence of "
            f"{numbers.elbo + numbers.gap:.2f} by {-numbers.gap:.2f} +- {numbers.gap_error:.2f} "
            "nats, which no bound can be: one of the two is wrong",
            "Check that the exact log evidence is that of this model (constants, prior, all data) "
            "and that the guide has the support of its latents.",
        )
    checks = numbers.checks
    level = max(check.level for check in checks.values())
    words = _Words(_causes(numbers, checks) + _summary(numbers))
    if probe is not None and probe.missed > _MISSED and not numbers.gap_is_exact_and_small:
        words.reasons.insert(0, _missed(probe))
        if level == 2:
            words.advice = _advice(level, numbers, checks)
            return words.verdict(2)
        words.advice.append(
            "Use a guide with a component for each mode (AutoSplineFlow(model, num_components=2)), "
            "or start there (init_loc_fn=init_to_value(values=...)) and compare the evidences; give "
            "the guide the support of the model's latents if it has a smaller one."
        )
        return words.verdict(2)
    if _are_few(level, numbers, checks):
        words.reasons.insert(0, f"too few draws: {numbers.num_draws:,} do not tell")
        words.advice.append(f"Take about {_draws_to_tell(numbers, checks):,} draws.")
        return words.verdict(1)
    words.advice = _advice(level, numbers, checks)
    if level:
        return words.verdict(level)
    if probe is not None:
        words.reasons.append(
            f"{probe.num_starts} searches from over-dispersed starts found no mode that it misses"
        )
    limits = [] if probe is not None or numbers.gap_is_exact_and_small else [_LIMITS]
    if numbers.pareto_k - numbers.pareto_k_error > _HEAVY_K and not numbers.gap_is_exact_and_small:
        limits.append(_TAIL_LIMITS)
    return words.verdict(0, " ".join(limits))


def _causes(numbers: Numbers, checks: dict[str, Check]) -> list[str]:
    """What is wrong with the marginals and the tail, in words."""
    found = []
    shift, scale = numbers.shift, numbers.scale
    if shift and "shift" in checks and shift.size > checks["shift"].usable:
        side = "above" if shift.value > 0 else "below"
        found.append(
            f"the guide's {shift.latent} is {abs(shift.value):.2f} sd {side} the weighted one"
        )
    if scale and "scale" in checks and scale.size > checks["scale"].usable:
        found.append(f"the guide's sd of {scale.latent} is {scale.value:.2f} of the weighted one")
    if "unseen" in checks and checks["unseen"].level:
        found.append(
            f"about {numbers.unseen():.0%} of the evidence may lie where there are no draws"
        )
    return found


def _summary(numbers: Numbers) -> list[str]:
    k, error = numbers.pareto_k, numbers.pareto_k_error
    digits = 4 if abs(numbers.gap) < 0.01 else 2
    gap, gap_error = (f"{x + 0.0:.{digits}f}" for x in (numbers.gap, numbers.gap_error))
    gap = gap.removeprefix("-") if float(gap) == 0 else gap
    at_least = "at least about " if numbers.is_heavy and not numbers.exact else ""
    return [
        f"the gap between log evidence and ELBO is {at_least}{gap} +- {gap_error} nats",
        f"the ESS of the weights {numbers.ess:,.0f} of {numbers.num_draws:,}",
        f"their pareto k {k:.2f} +- {error:.2f}",
    ]


def _missed(probe: Probe) -> str:
    return (
        f"at least {min(probe.missed, 1.0):.0%} of the posterior is where the guide hardly is, "
        f"around {probe.where}"
    )


def _are_few(level: int, numbers: Numbers, checks: dict[str, Check]) -> bool:
    """Whether the draws do not tell good from bad, and more of them would; with a heavy tail they hardly do."""
    if any(check.surely_bad for check in checks.values()):
        return False
    if numbers.num_draws < MIN_DRAWS:
        return True
    if level == 2 or (numbers.is_heavy and numbers.num_draws >= _MANY_DRAWS):
        return False
    return any(check.cannot_tell for check in checks.values())


def _draws_to_tell(numbers: Numbers, checks: dict[str, Check]) -> int:
    """How many draws would do, to one significant digit, between 1,000 and a million."""
    times = [1.0]
    for name, check in checks.items():
        if not check.is_settled:
            # what is unseen falls with the number of draws, errors with its root
            times.append(check.high / check.usable if name == "unseen" else check.more_draws)
    count = min(max(numbers.num_draws * max(times), 1000.0), 1e6)
    digit = 10 ** math.floor(math.log10(count))
    return math.ceil(count / digit) * digit


def _advice(level: int, numbers: Numbers, checks: dict[str, Check]) -> list[str]:
    if not level:
        return ["The draws can be used as posterior draws."]
    worst = max(checks, key=lambda name: checks[name].level)
    site = next((m.latent.split("[")[0] for m in (numbers.scale, numbers.shift) if m), None)
    if numbers.is_heavy:
        reparametrise = f"reparametrise {site}" if site else "reparametrise the model"
        return [
            "The weights have a heavy tail and cannot repair that: the guide's own tail is too "
            'light. Use AutoSplineFlow(model), with base="student_t" if the guide is one already, '
            f"{reparametrise}, or run NUTS in the guide's coordinates (NeuTraReparam).",
        ]
    repair = "The weights are light, so that reweight(tree) corrects the draws."
    if level == 1:
        return [repair]
    if worst == "gap":
        return [
            repair,
            "Better train longer, or a more flexible guide: AutoSplineFlow(model, num_transforms=8).",
        ]
    return [repair, "Better train longer, from another start, or with a more flexible guide."]
