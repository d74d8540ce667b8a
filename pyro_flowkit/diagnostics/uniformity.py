r"""Tests on the PIT values of simulated truths: is the guide shifted, too narrow, or of wrong shape?

``u`` is uniform for a calibrated guide, so ``s = Phi^-1(u)`` is standard normal: the truth in units
of the guide, as it were. A guide shifted by ``d`` of its standard deviations gives ``s ~ N(-d, 1)``,
one of ``c`` times the right scale ``s ~ N(0, 1 / c^2)``. Three tests for every latent look at

- location: ``sqrt(n) mean(s) ~ N(0, 1)``, the most powerful one against a shift;
- spread: ``(n - 1) var(s) ~ chi2(n - 1)``, the same against a scale;
- shape: Kolmogorov-Smirnov's distance of ``u`` from uniform, for everything else.

Kolmogorov-Smirnov alone, like a band around the ECDF, hardly sees a scale. At 200 simulations of one
latent and a false alarm rate of 1 % it finds a shift of 0.3 with probability 0.86 and a scale of 0.8
with 0.15; the three together find them with 0.93 and 0.95, where no test at all could find the shift
with more than 0.95 (the tests of this module measure the others). Their p-values are combined by
Bonferroni with weights 0.45, 0.45 and 0.1.

References:
    Sean Talts et al. Validating Bayesian Inference Algorithms with Simulation-Based Calibration.
    arXiv:1804.06788, 2018.

    Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Yes, but Did It Work?: Evaluating
    Variational Inference. ICML 2018.
"""

import math
from typing import Literal

import numpy as np
import xarray as xr

from pyro_flowkit.diagnostics.schema import schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict, with_verdict

DEFAULT_LEVEL = 0.01
_WEIGHTS = {"location": 0.45, "spread": 0.45, "shape": 0.1}
_POWER_SCORE = 1.2816  # Phi^-1(0.9): what is called detectable is found in 9 cases of 10


def calibration_tests(
    sbc: xr.DataTree | xr.Dataset,
    *,
    kind: Literal["uniformity", "symmetry"] = "uniformity",
    level: float = DEFAULT_LEVEL,
) -> xr.Dataset:
    """Tests the PIT values of every latent, and says what is wrong with the guide.

    ==========================================  ==========  ========
    verdict on a guide with                     uniformity  symmetry
    ==========================================  ==========  ========
    a latent that is shifted                    bad         bad
    a latent that is too narrow, or misshapen   bad
    nothing but latents that are too wide       usable
    no departure found                          good        good
    ==========================================  ==========  ========

    A guide of the wrong family cannot have the right spread, and fails tests of uniformity. Those of symmetry (VSBC)
    ask less of it, as Yao et al. (2018) do: that ``u`` and ``1 - u`` have one distribution, so that its location is
    right on average over data sets. They compare the two by the distance of Kolmogorov and Smirnov; the p-value here is
    that of Wilcoxon's signed ranks of ``u - 1/2``, valid for any symmetric distribution, which finds a shift of 0.3 at
    200 simulations of one latent with probability 0.94.

    Args:
        sbc: the result of ``simulation_based_calibration``, or its group ``prior_sbc``: PIT values in
            (0, 1) with the dims chain and draw.
        kind: "uniformity", or "symmetry": whether the guide is unbiased.
        level: the probability of an alarm at a calibrated guide, over all latents together
            (Bonferroni); it is met from below.

    Returns:
        Variables along ``latent``, one for every element: ``shift`` (of the guide against the
        truth, in standard deviations of the guide) and ``p_value``, corrected for the number of latents. Of uniformity
        also ``scale_ratio`` (of the guide's scale to the right one), ``p_location``, ``p_spread`` and ``p_shape``,
        which ``p_value`` combines; of symmetry ``asymmetry``, the Kolmogorov-Smirnov distance of ``u`` and ``1 - u``.
        ``shift`` and ``scale_ratio`` are normal approximations.
        ``diagnose`` reads the verdict from the attributes.

    Raises:
        ValueError: if there are no PIT values in [0, 1], fewer than two, ``level`` is no
            probability, or ``kind`` is another one.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import calibration_tests, diagnose, simulation_based_calibration
        >>> def model(y=torch.tensor(0.0)):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y=torch.tensor(0.0)):  # the exact posterior
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> sbc = simulation_based_calibration(model, guide, args=(torch.tensor(0.0),), num_simulations=40, seed=0)
        >>> bool(diagnose(calibration_tests(sbc))), bool(diagnose(calibration_tests(sbc, kind="symmetry")))
        (True, True)
    """
    labels, pit = _flat(sbc, level)
    if kind == "uniformity":
        return _uniformity(labels, pit, level)
    if kind == "symmetry":
        return _symmetry(labels, pit, level)
    raise ValueError(f'Expected kind to be "uniformity" or "symmetry", got {kind!r}')


def _uniformity(labels: list[str], pit: np.ndarray, level: float) -> xr.Dataset:
    import scipy.special
    import scipy.stats  # changes the filters of warnings

    n = pit.shape[1]
    scores = _scores(pit)
    mean, variance = scores.mean(1), scores.var(1, ddof=1)
    p_location = 2 * scipy.special.ndtr(-math.sqrt(n) * np.abs(mean))
    squares = (n - 1) * variance
    p_spread = 2 * np.minimum(
        scipy.special.chdtr(n - 1, squares), scipy.special.chdtrc(n - 1, squares)
    )
    ordered, grid = np.sort(pit, axis=1), np.arange(n + 1) / n
    distance = np.maximum((grid[1:] - ordered).max(1), (ordered - grid[:-1]).max(1))
    p_shape = scipy.stats.kstwo.sf(distance, n)
    p_values = {"location": p_location, "spread": p_spread, "shape": p_shape}
    combined = np.min([p_values[test] / weight for test, weight in _WEIGHTS.items()], axis=0)
    variables = {
        "shift": -mean,
        "scale_ratio": 1 / np.sqrt(variance),
        **{f"p_{test}": value for test, value in p_values.items()},
        "p_value": np.minimum(1.0, combined * len(labels)),
    }
    critical = -scipy.special.ndtri(level * _WEIGHTS["location"] / (2 * len(labels)))
    verdict = _calibration_verdict(labels, variables, n, level, critical)
    return _tests(labels, variables, verdict, num_simulations=n, level=level)


def _symmetry(labels: list[str], pit: np.ndarray, level: float) -> xr.Dataset:
    import scipy.stats  # changes the filters of warnings

    n = pit.shape[1]
    both = np.sort(np.concatenate([pit, 1 - pit], axis=1), axis=1)
    asymmetry = [
        np.abs(_ecdf(own, grid) - _ecdf(1 - own, grid)).max()
        for own, grid in zip(pit, both, strict=True)
    ]
    p_value = [scipy.stats.wilcoxon(own - 0.5).pvalue for own in pit]
    variables = {
        "shift": -_scores(pit).mean(1),
        "asymmetry": np.array(asymmetry),
        "p_value": np.minimum(1.0, len(labels) * np.array(p_value)),
    }
    biased = [int(i) for i in np.argsort(variables["p_value"]) if variables["p_value"][i] < level]
    if biased:
        verdict = Verdict(
            "bad",
            f"{len(biased)} of {len(labels)} latents are biased over {n} simulations: "
            + _listed([_shifted(labels[i], variables["shift"][i]) for i in biased]),
            "Point estimates of these latents are off on average: train longer, use a more "
            "flexible guide, or reparametrise the model.",
        )
    else:
        verdict = Verdict(
            "good",
            f"no bias in {len(labels)} latents over {n} simulations (smallest corrected p-value "
            f"{variables['p_value'].min():.2g}, level {level:g})",
            "Point estimates of these latents are right on average.",
            "This says nothing of spreads: see the tests of uniformity.",
        )
    return _tests(labels, variables, verdict, num_simulations=n, level=level)


def _flat(sbc: xr.DataTree | xr.Dataset, level: float) -> tuple[list[str], np.ndarray]:
    """Labels of all elements, and their PIT values with shape ``(elements, simulations)``."""
    if not 0 < level < 1:
        raise ValueError(f"Expected 0 < level < 1, got {level}")
    if isinstance(sbc, xr.DataTree):
        if "prior_sbc" not in sbc.children:
            raise ValueError(f"Expected a group prior_sbc, got {sorted(sbc.children)}")
        sbc = sbc["prior_sbc"].to_dataset()
    if not sbc.data_vars or not {"chain", "draw"} <= set(sbc.sizes):
        raise ValueError(f"Expected PIT values along chain and draw, got dims {dict(sbc.sizes)}")
    labels, rows = [], []
    for name, variable in sbc.data_vars.items():
        own = variable.transpose("chain", "draw", ...)
        for index in np.ndindex(own.shape[2:]):
            labels.append(f"{name}[{', '.join(map(str, index))}]" if index else str(name))
            rows.append(own.to_numpy()[(slice(None), slice(None), *index)].reshape(-1))
    pit = np.stack(rows).astype(np.float64)
    if pit.shape[1] < 2 or not ((pit >= 0) & (pit <= 1)).all():
        raise ValueError(
            f"Expected at least 2 PIT values in [0, 1], got {pit.shape[1]} from {pit.min():.3g} "
            f"to {pit.max():.3g}"
        )
    return labels, pit


def _scores(pit: np.ndarray) -> np.ndarray:
    import scipy.special

    tiny = np.finfo(np.float64).eps
    return scipy.special.ndtri(np.clip(pit, tiny, 1 - tiny))


def _ecdf(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), grid, side="right") / len(values)


def _tests(
    labels: list[str], variables: dict[str, np.ndarray], verdict: Verdict, **attrs: float
) -> xr.Dataset:
    dataset = xr.Dataset(
        {name: ("latent", value) for name, value in variables.items()},
        {"latent": labels},
        schema_attrs() | attrs,
    )
    return with_verdict(dataset, verdict)


def _calibration_verdict(
    labels: list[str], tests: dict[str, np.ndarray], n: int, level: float, critical: float
) -> Verdict:
    p_value = tests["p_value"]
    found = [int(i) for i in np.argsort(p_value) if p_value[i] < level]
    if not found:
        least = (critical + _POWER_SCORE) / math.sqrt(n)
        return Verdict(
            "good",
            f"no departure from calibration in {len(labels)} latents over {n} simulations "
            f"(smallest corrected p-value {p_value.min():.2g}, level {level:g})",
            "Intervals of this guide cover the truth as often as they say.",
            f"A shift below {least:.2f} standard deviations or a scale within "
            f"{least / math.sqrt(2):.0%} of the right one may hide behind this number of "
            "simulations; a guide that ignores the data may, too.",
        )
    words, too_wide = [], True
    for i in found:
        alarms = {
            test: tests[f"p_{test}"][i] * len(labels) / weight
            for test, weight in _WEIGHTS.items()
            if tests[f"p_{test}"][i] * len(labels) < level * weight
        }
        ratio = tests["scale_ratio"][i]
        too_wide &= "location" not in alarms and "spread" in alarms and ratio > 1
        # A shift or a wrong scale is a wrong shape, too; the plainer word is said.
        named = {test: p for test, p in alarms.items() if test != "shape"} or alarms
        test = min(named, key=lambda test: named[test])
        if test == "location":
            words.append(_shifted(labels[i], tests["shift"][i]))
        elif test == "spread":
            narrow = "narrow" if ratio < 1 else "wide"
            words.append(f"{labels[i]} is too {narrow} (scale {ratio:.2f} times the right one)")
        else:
            words.append(f"{labels[i]} has a wrong shape (p = {tests['p_shape'][i]:.2g})")
    reason = f"{len(found)} of {len(labels)} latents are not calibrated over {n} simulations: "
    if too_wide:
        return Verdict(
            "usable",
            reason + _listed(words),
            "Intervals cover the truth more often than they say: safe, but wider than need be.",
        )
    return Verdict(
        "bad",
        reason + _listed(words),
        "Intervals of this guide cannot be trusted on data like these: train longer, use a more "
        "flexible guide, or reparametrise the model.",
    )


def _shifted(label: str, shift: float) -> str:
    return f"{label} is too {'high' if shift > 0 else 'low'} by {abs(shift):.2f} of its sd"


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more
