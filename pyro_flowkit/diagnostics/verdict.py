"""A verdict on a guide in plain words, from its importance weights.

R-hat and ESS look at how draws depend on each other. The draws of a guide are independent, so both
reassure whatever the guide is worth. The weights ``p(x, z) / q(z)`` do see it: their pareto k says
whether they can repair the guide, and ``log p(x) - ELBO = KL(guide || posterior)`` says how much
there is to repair.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import xarray as xr

from pyro_flowkit.diagnostics.schema import as_tree
from pyro_flowkit.diagnostics.tails import LARGE_GAP, Tail
from pyro_flowkit.ops.psis import error_factor

_GOOD_K = 0.5
_GOOD_GAP = 0.1
_LEVELS = ("good", "usable", "bad")


@dataclass(frozen=True)
class Verdict:
    """What `diagnose` says. It is true, as what ``az.diagnose`` returns, if something is wrong.

    Attributes:
        level: "good" (use the draws), "usable" (use them with their weights) or "bad".
        reason: the numbers that led there.
        advice: what to do.
    """

    level: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.level}: {self.reason}. {self.advice}"

    def __bool__(self) -> bool:
        return self.level == "bad"


@overload
def diagnose(
    tree: xr.DataTree | xr.Dataset,
    *,
    show_diagnostics: bool = False,
    return_diagnostics: Literal[False] = False,
) -> Verdict: ...


@overload
def diagnose(
    tree: xr.DataTree | xr.Dataset,
    *,
    show_diagnostics: bool = False,
    return_diagnostics: Literal[True],
) -> tuple[bool, dict[str, dict[str, Any]]]: ...


def diagnose(
    tree: xr.DataTree | xr.Dataset,
    *,
    show_diagnostics: bool = False,
    return_diagnostics: bool = False,
) -> Verdict | tuple[bool, dict[str, dict[str, Any]]]:
    """Judges a guide by its pareto k and its gap.

    =================================================  ======
    ELBO above the exact log evidence (one is wrong)   bad
    pareto k > 1, or above the threshold               bad
    gap surely > 0.5 nats                              bad
    gap perhaps > 0.5 nats, and 0.5 < pareto k         bad
    0.5 < pareto k, or gap surely > 0.1 nats           usable
    otherwise                                          good
    =================================================  ======

    The threshold is ``min(1 - 1 / log10(S), 0.7)`` for ``S`` draws (Vehtari et al. 2024), the gap
    the exact log evidence, where it is known, or else its PSIS estimate, minus the ELBO. "Surely"
    and "perhaps" are two standard errors below and above it. An ELBO is above the exact log
    evidence if it is so by more than 0.1 nats and four standard errors. A heavy tail hides the
    weights that the estimate of the evidence would need: with a pareto k above 0.5 it is mostly too
    small, and the gap with it, so that the upper end counts.

    Args:
        tree: the result of `from_svi`, of `evidence_bounds`, or of `join_restarts`, which is judged
            by its worst restart.
        show_diagnostics: whether to print the verdict.
        return_diagnostics: whether to return, as ``az.diagnose`` does, a pair: whether the verdict
            is "bad", and a dict of the checks.

    Returns:
        The verdict; ``str`` of it is one line, and it is true if it is "bad". With
        ``return_diagnostics`` ``(has_errors, diagnostics)``, where ``diagnostics`` has the keys
        ``pareto_k`` (``value``, ``error``, ``threshold``), ``gap`` (``value``, ``error``, in nats,
        ``exact``), ``ess`` (``value``, ``total_samples``) and ``verdict`` (``level``, ``reason``,
        ``advice``).

    Raises:
        ValueError: if there is no ``vi_diagnostics`` and no ``pareto_k``, or an exact log evidence
            that is not finite.
    """
    bounds = _bounds(tree)
    if bounds["pareto_k"].ndim:
        restarts = [bounds.isel(chain=i, drop=True) for i in range(bounds.sizes["chain"])]
        judged = [_judged(restart) for restart in restarts]
        worst = max(
            range(len(judged)),
            key=lambda i: (_LEVELS.index(judged[i][0].level), judged[i][1]["gap"]["value"]),
        )
        verdict, checks = judged[worst]
        reason = f"of restart {worst} of {len(judged)}, the worst: {verdict.reason}"
        verdict = Verdict(verdict.level, reason, verdict.advice)
    else:
        verdict, checks = _judged(bounds)
    if show_diagnostics:
        print(verdict)
    if not return_diagnostics:
        return verdict
    words = {"level": verdict.level, "reason": verdict.reason, "advice": verdict.advice}
    return bool(verdict), checks | {"verdict": words}


def _judged(bounds: xr.Dataset) -> tuple[Verdict, dict[str, dict[str, Any]]]:
    """The verdict on one guide, and the checks behind it."""
    elbo, exact = float(bounds["elbo"]), "exact_log_evidence" in bounds
    evidence = float(bounds["exact_log_evidence" if exact else "log_evidence"])
    if exact and not math.isfinite(evidence):
        raise ValueError(f"Expected a finite exact_log_evidence, got {evidence}")
    gap = evidence - elbo
    tail = Tail(int(bounds.attrs["num_samples"]), float(bounds["pareto_k"]), gap)
    factor = float(error_factor(torch.tensor(tail.pareto_k), tail.num_samples))
    evidence_se = 0.0 if exact else factor * float(bounds["log_evidence_se"])
    error = math.hypot(float(bounds["elbo_se"]), evidence_se)
    return _judge(elbo, tail, error, exact), {
        "pareto_k": {"value": tail.pareto_k, "error": tail.error, "threshold": tail.threshold},
        "gap": {"value": gap, "error": error, "exact": exact},
        "ess": {"value": float(bounds["ess"]), "total_samples": tail.num_samples},
    }


def _bounds(tree: xr.DataTree | xr.Dataset) -> xr.Dataset:
    tree = as_tree(tree)
    if isinstance(tree, xr.Dataset):
        bounds = tree
    elif "vi_diagnostics" in tree.children:
        bounds = tree["vi_diagnostics"].to_dataset()
    else:
        raise ValueError(f"Expected a group vi_diagnostics, got {sorted(tree.children)}")
    if "pareto_k" not in bounds or bounds["pareto_k"].dims not in ((), ("chain",)):
        raise ValueError(f"Expected one pareto_k for all data, got {sorted(map(str, bounds))}")
    return bounds


def _judge(elbo: float, tail: Tail, error: float, exact: bool) -> Verdict:
    k, gap = tail.pareto_k, tail.gap
    if not math.isfinite(elbo):
        return Verdict(
            "bad",
            f"the ELBO is {elbo}: the guide draws values that the model excludes",
            "Give the guide the support of the model's latents.",
        )
    if exact and gap + 4 * error < -_GOOD_GAP:
        return Verdict(
            "bad",
            f"the ELBO of {elbo:.2f} +- {error:.2f} nats is above the exact log evidence of "
            f"{elbo + gap:.2f}, which no bound can be: one of the two is wrong",
            "Check that the exact log evidence is that of this model (constants, prior, all data) "
            "and that the guide has the support of its latents.",
        )
    too_small = not exact and not k <= _GOOD_K
    gap_in_words = (
        f"at least about {gap:.2f} nats" if too_small else f"{gap:.2f} +- {error:.2f} nats"
    )
    reason = (
        f"pareto k is {k:.2f} (trusted up to {tail.threshold:.2f} at {tail.num_samples} draws) and "
        f"the gap between log evidence and ELBO is {gap_in_words}"
    )
    if not k <= tail.threshold:
        advice = (
            "The guide misses a part of the posterior and its weights cannot repair that: use a "
            "more flexible guide, train longer, reparametrise the model, or run NUTS."
        )
        if tail.threshold < 0.7 and k <= 0.7:
            advice = "Take more draws: at this number of draws such a pareto k cannot be trusted."
        return Verdict("bad", reason, advice)
    if gap - 2 * error > LARGE_GAP or (too_small and gap + 2 * error > LARGE_GAP):
        if tail.is_light:
            advice = (
                "The draws differ visibly from the posterior; their weights can repair that: use "
                "reweight or log_weight_psis, or better a more flexible guide."
            )
        else:
            advice = (
                "The guide misses a part of the posterior, and its weights may, too: use a more "
                "flexible guide, train longer, or reparametrise the model; NeuTra (NUTS in the "
                "guide's coordinates) may still do."
            )
        return Verdict("bad", reason, advice)
    if k > _GOOD_K or gap - 2 * error > _GOOD_GAP:
        return Verdict(
            "usable",
            reason,
            "Where the answer must be exact, weight the draws by reweight or log_weight_psis.",
        )
    return Verdict("good", reason, "The draws can be used as posterior draws.")
