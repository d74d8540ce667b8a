"""A verdict on a guide in plain words, from its importance weights.

R-hat and ESS look at how draws depend on each other. The draws of a guide are independent, so both
reassure whatever the guide is worth. The weights ``p(x, z) / q(z)`` do see it: their pareto k says
whether they can repair the guide, and ``log p(x) - ELBO = KL(guide || posterior)`` says how much
there is to repair.
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyro_flowkit.ops.psis import pareto_k_threshold

_GOOD_K = 0.5
_GOOD_GAP = 0.1
_BAD_GAP = 0.5


@dataclass(frozen=True)
class Verdict:
    """What `diagnose` says.

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


def diagnose(tree: xr.DataTree | xr.Dataset) -> Verdict:
    """Judges a guide by its pareto k and its gap.

    ===========================================  ======
    pareto k > 1, or above the threshold         bad
    gap > 0.5 nats                               bad
    0.5 < pareto k, or gap > 0.1 nats            usable
    otherwise                                    good
    ===========================================  ======

    The threshold is ``min(1 - 1 / log10(S), 0.7)`` for ``S`` draws (Vehtari et al. 2024), the gap
    the exact log evidence, where it is known, or else its PSIS estimate, minus the ELBO. A gap
    counts only by what of it exceeds two standard errors.

    Args:
        tree: the result of `from_svi`, or of `evidence_bounds`.

    Returns:
        The verdict; ``str`` of it is one line.

    Raises:
        ValueError: if there is no ``vi_diagnostics`` and no ``pareto_k``.
    """
    if isinstance(tree, xr.DataTree):
        if "vi_diagnostics" not in tree.children:
            raise ValueError(f"Expected a group vi_diagnostics, got {sorted(tree.children)}")
        bounds = tree["vi_diagnostics"].to_dataset()
    else:
        bounds = tree
    if "pareto_k" not in bounds or bounds["pareto_k"].ndim:
        raise ValueError(f"Expected one pareto_k for all data, got {sorted(map(str, bounds))}")

    num_samples = int(bounds.attrs["num_samples"])
    threshold = pareto_k_threshold(num_samples)
    k, elbo = float(bounds["pareto_k"]), float(bounds["elbo"])
    exact = "exact_log_evidence" in bounds
    evidence = float(bounds["exact_log_evidence" if exact else "log_evidence"])
    error = np.hypot(float(bounds["elbo_se"]), 0 if exact else float(bounds["log_evidence_se"]))
    gap = evidence - elbo
    surely = gap - 2 * error
    # A heavy tail hides weights, so that the estimate of the evidence, and with it the gap, is too
    # small.
    trusted = "" if exact or k <= threshold else "at least "
    reason = (
        f"pareto k is {k:.2f} (trusted up to {threshold:.2f} at {num_samples} draws) and the gap "
        f"between log evidence and ELBO is {trusted}{gap:.2f} +- {error:.2f} nats"
    )
    if not np.isfinite(elbo):
        return Verdict(
            "bad",
            f"the ELBO is {elbo}: the guide draws values that the model excludes",
            "Give the guide the support of the model's latents.",
        )
    if not k <= threshold:
        advice = (
            "The guide misses a part of the posterior and its weights cannot repair that: use a "
            "more flexible guide, train longer, reparametrise the model, or run NUTS."
        )
        if 1.0 >= k and threshold < 0.7 and k <= 0.7:
            advice = "Take more draws: at this number of draws such a pareto k cannot be trusted."
        return Verdict("bad", reason, advice)
    if surely > _BAD_GAP:
        return Verdict(
            "bad",
            reason,
            "The draws differ visibly from the posterior; their weights can repair that: use "
            "log_weight_psis, or better a more flexible guide.",
        )
    if k > _GOOD_K or surely > _GOOD_GAP:
        return Verdict(
            "usable", reason, "Weight the draws by log_weight_psis where the answer must be exact."
        )
    return Verdict("good", reason, "The draws can be used as posterior draws.")
