"""``diagnose``: which results there are to judge, and one verdict for each."""

from collections import Counter
from typing import Any, Literal, overload

import numpy as np
import xarray as xr

from pyro_flowkit.diagnostics.bounds import bounds_dataset
from pyro_flowkit.diagnostics.collapse import collapse_verdict
from pyro_flowkit.diagnostics.point_estimates import with_points
from pyro_flowkit.diagnostics.reading import numbers_of
from pyro_flowkit.diagnostics.reweighting import guide_weights
from pyro_flowkit.diagnostics.rule import Numbers, Probe, judge
from pyro_flowkit.diagnostics.schema import as_result
from pyro_flowkit.diagnostics.verdict import LEVELS, Verdict, verdict_of
from pyro_flowkit.ops.psis import pareto_k_threshold

_FEW = 0.05  # a share of the data
NO_GUIDE = "Expected a probe together with the result of from_svi, got another result"

Checks = dict[str, dict[str, Any]]


@overload
def diagnose(
    tree: xr.DataTree | xr.Dataset,
    *,
    probe: xr.Dataset | None = None,
    show_diagnostics: bool = False,
    return_diagnostics: Literal[False] = False,
) -> Verdict: ...


@overload
def diagnose(
    tree: xr.DataTree | xr.Dataset,
    *,
    probe: xr.Dataset | None = None,
    show_diagnostics: bool = False,
    return_diagnostics: Literal[True],
) -> tuple[bool, Checks]: ...


def diagnose(
    tree: xr.DataTree | xr.Dataset,
    *,
    probe: xr.Dataset | None = None,
    show_diagnostics: bool = False,
    return_diagnostics: bool = False,
) -> Verdict | tuple[bool, Checks]:
    """Judges a guide, the use of its latents, a calibration, a training or its restarts, in plain words.

    A guide is judged by its worst check:

    ====================================================  =======  =====
    a check is                                            usable   bad
    ====================================================  =======  =====
    gap, in nats                                          > 0.1    > 0.5
    share of the evidence that may be unseen              > 0.03   > 0.1
    share of the draws that the ESS of the weights is     < 0.7    < 0.35
    weighted and plain means apart, in sd                 > 0.1    > 0.2
    ratio of weighted and plain sd, either way            > 1.1    > 1.2
    share of the posterior that a probe finds left out             > 0.05
    the ELBO is above the exact log evidence, or -inf              yes
    fewer than 100 draws                                  yes
    the error leaves both good and bad                    yes
    ====================================================  =======  =====

    The gap is the exact log evidence, where it is known, or else its PSIS estimate, minus the ELBO. If it is exact,
    what is unseen and the ESS do not count, and if it is not above 0.02 nats, nothing else does. What may be unseen is
    the largest weight's share of the evidence over ``1 - k`` (k: pareto k, 0.9 at most); a pareto k counts for nothing
    else, since weights that hardly differ may have a large one. The gap of a normal guide of a normal posterior is
    half the log of draws over ESS; a heavy tail makes the ESS less. Means and standard deviations are those of normal
    scores.

    A guide that puts all latents at a point (``AutoDelta``) has no bound and is "bad"; one that does so with some of
    them, as in an ``AutoGuideList``, is judged by its other latents, given those, and is "usable" at best.

    Importance weights do not see what the guide never visits. A "good" guide has a sentence on that in ``limits``,
    unless the exact evidence excludes it or ``probe`` says that it was looked for; and one on tails where pareto k is
    above 0.7 although the large weights carry little. Nor do they see a far tail that no draw reaches: under a
    ``Cauchy`` prior that the data hardly touch, a guide whose base is normal is "good" with too few draws beyond
    ten scales.

    Args:
        tree: a result of ``from_svi`` or ``evidence_bounds``, which draw more where this verdict hangs on noise; of
            ``compare_restarts``, judged by whether they agree and by the worst restart; of ``pointwise_bounds``, judged
            datum by datum: at most 5 % of the data may be worse than the verdict says; of ``latent_usage``, judged by
            posterior collapse: "good" where every direction of every site is active, "bad" where none is; or of
            ``simulation_based_calibration``, ``calibration_tests`` or ``iterate_convergence``, which carry their
            verdict.
        probe: the result of ``probe_modes`` for the same model and guide.
        show_diagnostics: whether to print the verdict.
        return_diagnostics: whether to return, as ``az.diagnose`` does, a pair: whether the verdict
            is "bad", and a dict of the checks.

    Returns:
        The verdict; ``str`` of it is one line, and it is true if it is "good". With
        ``return_diagnostics`` ``(has_errors, diagnostics)``, where ``diagnostics`` has the key ``verdict`` (``level``,
        ``reason``, ``advice``, ``limits``) and for one guide ``pareto_k`` (``value``, ``error``, ``threshold``),
        ``gap`` (``value``, ``error``, in nats, ``exact``), ``ess`` (``value``, ``total_samples``), and ``unseen``,
        ``spread``, ``shift`` and ``scale`` where they count (``value``, ``low``, ``high``; ``spread`` is the log of
        draws over ESS, ``scale`` a log-ratio).

    Raises:
        ValueError: if there is nothing to judge in ``tree``, an exact log evidence is not finite, or ``probe`` is
            given for anything but a guide.
        TypeError: if ``tree`` is no result, but the guide itself.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import diagnose, from_svi
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> verdict = diagnose(from_svi(model, guide, num_samples=1000, seed=0))
        >>> bool(verdict), str(verdict).split(":")[0]
        (True, 'good')
    """
    found = as_result(tree)
    checks: Checks = {}
    if isinstance(found, xr.DataTree) and "vi_restarts" in found.children:
        verdict, checks = _of_restarts(found, probe)
    elif _carries_verdict(found) or _is_usage(found):
        if probe is not None:
            raise ValueError(NO_GUIDE)
        if _is_usage(found):
            verdict = collapse_verdict(found)
        else:
            point = _is_point(found)
            verdict = verdict_of(found["vi_diagnostics"].to_dataset() if point else found)
    else:
        verdict, checks = _judged(_bounds(found), _probe(probe))
    if show_diagnostics:
        print(verdict)
    if not return_diagnostics:
        return verdict
    words = {name: getattr(verdict, name) for name in ("level", "reason", "advice", "limits")}
    return verdict.level == "bad", checks | {"verdict": words}


def _of_restarts(found: xr.DataTree, probe: xr.Dataset | None) -> tuple[Verdict, Checks]:
    """The worse of two verdicts: whether the restarts agree, and on the guide as the worst of them left it."""
    agreement = verdict_of(found["vi_restarts"].to_dataset())
    if "vi_diagnostics" not in found.children or "pareto_k" not in found["vi_diagnostics"]:
        if probe is not None:
            raise ValueError(NO_GUIDE)
        return agreement, {}
    own, checks = _judged(_bounds(found), _probe(probe))
    if agreement.level != own.level:
        return max(agreement, own, key=lambda verdict: LEVELS.index(verdict.level)), checks
    reason, advice = f"{agreement.reason}; {own.reason}", f"{agreement.advice} {own.advice}"
    return Verdict(own.level, reason, advice, own.limits), checks


def _carries_verdict(found: xr.DataTree | xr.Dataset) -> bool:
    if isinstance(found, xr.DataTree) and "vi_calibration" in found.children:
        return True
    return "verdict" in found.attrs or _is_point(found)


def _is_usage(found: xr.DataTree | xr.Dataset) -> bool:
    """Whether it is a result of ``latent_usage``."""
    return isinstance(found, xr.Dataset) and "active_directions" in found


def _is_point(found: xr.DataTree | xr.Dataset) -> bool:
    """Whether it is the tree of a guide that is a point, which has a verdict in the place of bounds."""
    return (
        isinstance(found, xr.DataTree)
        and "vi_diagnostics" in found.children
        and "verdict" in found["vi_diagnostics"].attrs
    )


def _bounds(found: xr.DataTree | xr.Dataset) -> xr.Dataset:
    if isinstance(found, xr.Dataset):
        bounds = found
    elif "vi_diagnostics" in found.children:
        bounds = found["vi_diagnostics"].to_dataset()
    else:
        raise ValueError(f"Expected a group vi_diagnostics, got {sorted(found.children)}")
    if "pareto_k" not in bounds or bounds["pareto_k"].dims not in ((), ("chain",), ("obs_id",)):
        raise ValueError(
            f"Expected one pareto_k for all data or each datum, got {sorted(map(str, bounds))}"
        )
    if "num_draws" in bounds:
        return bounds
    if isinstance(found, xr.Dataset):
        raise ValueError(
            "Expected the variables of evidence_bounds or pointwise_bounds, got "
            f"{sorted(map(str, bounds))}"
        )
    exact = bounds.get("exact_log_evidence")  # another program's tree: its draws have weights
    weights = guide_weights(found).flatten()
    return bounds_dataset(weights, [1], None if exact is None else float(exact))


def _probe(probe: xr.Dataset | None) -> Probe | None:
    if probe is None:
        return None
    if "missed" not in probe:
        raise ValueError(f"Expected the result of probe_modes, got {sorted(map(str, probe))}")
    worst = probe.isel(place=int(probe["missed"].argmax("place")))
    return Probe(int(probe.attrs["num_starts"]), float(worst["missed"]), str(worst["where"].item()))


def _judged(bounds: xr.Dataset, probe: Probe | None) -> tuple[Verdict, Checks]:
    dims = bounds["pareto_k"].dims
    if dims == ("obs_id",):
        if probe is not None:
            raise ValueError("Expected a probe together with one guide, got a guide for each datum")
        return _by_datum(bounds), {}
    if dims == ():
        numbers = numbers_of(bounds)
        verdict, points = judge(numbers, probe), bounds.attrs.get("point_estimates")
        return with_points(verdict, points) if points else verdict, _checks(numbers)
    restarts = [numbers_of(bounds.isel(chain=i)) for i in range(bounds.sizes["chain"])]
    verdicts = [judge(numbers, probe) for numbers in restarts]
    worst = max(
        range(len(verdicts)),
        key=lambda i: (LEVELS.index(verdicts[i].level), restarts[i].gap),
    )
    own = verdicts[worst]
    reason = f"of restart {worst} of {len(verdicts)}, the worst: {own.reason}"
    return Verdict(own.level, reason, own.advice, own.limits), _checks(restarts[worst])


def _checks(numbers: Numbers) -> Checks:
    others = {
        name: {"value": check.value, "low": check.low, "high": check.high}
        for name, check in numbers.checks.items()
        if name != "gap"
    }
    return {
        "pareto_k": {
            "value": numbers.pareto_k,
            "error": numbers.pareto_k_error,
            "threshold": pareto_k_threshold(numbers.num_draws),
        },
        "gap": {"value": numbers.gap, "error": numbers.gap_error, "exact": numbers.exact},
        "ess": {"value": numbers.ess, "total_samples": numbers.num_draws},
        **others,
    }


def _by_datum(bounds: xr.Dataset) -> Verdict:
    """All but a few of the data are at least as good as the verdict says."""
    data = [numbers_of(bounds.isel(obs_id=i)) for i in range(bounds.sizes["obs_id"])]
    verdicts = [judge(numbers) for numbers in data]
    counts = Counter(verdict.level for verdict in verdicts)
    allowed = _FEW * len(data)
    level = "good"
    if counts["bad"] > allowed:
        level = "bad"
    elif counts["bad"] + counts["usable"] > allowed:
        level = "usable"
    gaps = np.array([numbers.gap for numbers in data])
    heavy = sum(numbers.is_heavy for numbers in data)
    reason = (
        f"of {len(data)} data {counts['good']} have a good guide, {counts['usable']} a usable one and "
        f"{counts['bad']} a bad one; the gap is {gaps.mean():.2f} nats per datum in the mean, "
        f"{gaps.max():.2f} at most, and the weights of {heavy} have a heavy tail that counts"
    )
    advice = {
        "good": "The draws of each datum can be used as draws of its posterior.",
        "usable": "Take the bound of IWAE or the PSIS evidence where log p(x) is asked for, not the ELBO.",
        "bad": "inference_gaps says whether the family or the encoder costs that: use a flow as the posterior, or "
        "train the encoder longer, on more data or on samples of the model.",
    }
    limits = next((v.limits for v in verdicts if level == "good" and v.limits), "")
    return Verdict(level, reason, advice[level], limits)
