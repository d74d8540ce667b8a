r"""Tables that put exact values and bounds side by side without mixing them up.

A flow gives the exact ``log p(x)`` of a datum, a VAE a lower bound of its own ``log p(x)``. Both
are nats per datum, so they share a table, but two differences in it mean different things:

- the **gap** IWAE-K - ELBO belongs to *one* model: how much of its bound more particles recover. It
  is itself a lower bound of ``log p(x) - ELBO``;
- the **difference** belongs to *two* models on the same data, with the standard error of the paired
  differences per datum. If one side is a bound, the difference is one too, and ``diff_kind`` says
  which.

Bits per dimension are ``-nats / (D ln 2)``, of the data as they were scored: whoever scored pixels
divided by 256 adds 8.
"""

import math
from collections.abc import Mapping
from textwrap import wrap
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from pyro_flowkit.diagnostics.diagnosis import diagnose
from pyro_flowkit.diagnostics.schema import ESTIMATE, EXACT, LOWER_BOUND, as_result

_PRINTED_WIDTH = 80
_DIFF_KINDS = {
    (EXACT, EXACT): "exact",
    (LOWER_BOUND, EXACT): "at least",
    (EXACT, LOWER_BOUND): "at most",
    (LOWER_BOUND, LOWER_BOUND): "between bounds",
}

_COLUMNS = (
    *("elbo", "elbo_se", "iwae", "iwae_se", "iwae_particles", "log_evidence", "log_evidence_se"),
    *("gap", "gap_se", "pareto_k", "ess", "seconds", "verdict"),
)


class Table(pd.DataFrame):
    """Whole like any DataFrame, but printed within 80 columns: the first of ``printed``, and the others' names."""

    printed: ClassVar[tuple[str, ...]]

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame  # a part of the table, or a change of it, prints as usual

    def __repr__(self) -> str:
        for count in range(len(self.printed), 1, -1):
            columns = list(self.printed[:count])
            text = self[columns].to_string(float_format="{:.3f}".format, na_rep="")
            if max(map(len, text.splitlines())) <= _PRINTED_WIDTH:
                break
        others = [name for name in map(str, self) if name not in columns]
        return "\n".join([text, *wrap(f"and {', '.join(others)}", _PRINTED_WIDTH)])


class DensityTable(Table):
    """The table of ``compare_densities``."""

    printed = ("nats", "se", "kind", "gap", "diff", "diff_se", "diff_kind")


class GuideTable(Table):
    """The table of ``compare_guides``."""

    printed = ("elbo", "elbo_se", "gap", "pareto_k", "ess", "verdict")


def compare_densities(datasets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Exact log densities and lower bounds of several models on the same data, in one table.

    Args:
        datasets: results of ``heldout_log_prob`` (exact) and ``pointwise_bounds`` (lower bounds) by
            the name of the model, all for the same ``obs_id``.

    Returns:
        A table, which prints its first columns, with the index ``(name, quantity)``, best model first
        (by its exact value or its tightest bound): one row ``log p`` for an exact density, the rows
        ``ELBO`` and ``IWAE-K`` for a VAE, with the columns

        - ``nats``: the mean per datum, ``se``: its standard error over data;
        - ``kind``: "exact", "exact to 1e-05" where a solver of differential equations has that mean
          error in nats, "estimate" (Hutchinson's trace), or "lower bound";
        - ``gap``, ``gap_se``: IWAE-K - ELBO of the same model (NaN in other rows);
        - ``diff``, ``diff_se``: the value minus that of the best model, paired over data, and
          ``diff_kind``: "exact", or what it says about the difference of the exact values, "at
          least", "at most", "between bounds" (neither) or "estimate";
        - ``mc_se``: the part of ``se`` that comes from the draws of the guide (0 for exact values);
        - ``bits_per_dim``, where the attribute ``event_size`` is known (an upper bound for a
          lower bound in nats);
        - ``rank`` of the model;
        - ``elpd``, ``elpd_diff``, ``dse``: as in ``az.compare`` sums over the data: the value, its
          difference from the best model's, and the standard error of the difference;
        - ``n``: the number of data.

    Raises:
        ValueError: if there is no Dataset, one has neither ``log_prob`` nor ``elbo`` per
            ``obs_id``, or the ``obs_id`` differ.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> from pyro_flowkit.diagnostics import compare_densities, heldout_log_prob
        >>> flows = {"fresh": SplineFlow(2), "standardized": SplineFlow(2).standardize(x + 3)}
        >>> table = compare_densities({name: heldout_log_prob(flow, x + 3) for name, flow in flows.items()})
        >>> list(table.index.get_level_values("name")), set(table["kind"])
        (['standardized', 'fresh'], {'exact'})
    """
    if not datasets:
        raise ValueError("Expected at least one Dataset, got none")
    _check_obs_ids(datasets)
    tables = {name: _quantities(name, dataset) for name, dataset in datasets.items()}
    order = sorted(tables, key=lambda name: -float(tables[name][-1]["values"].mean()))
    best = tables[order[0]][-1]
    rows = []
    for rank, name in enumerate(order):
        event_size = datasets[name].attrs.get("event_size")
        elbo = tables[name][0]["values"]
        for quantity in tables[name]:
            values = quantity["values"]
            is_best = quantity is best
            is_iwae = quantity["quantity"].startswith("IWAE")
            gap, gap_se = _mean_and_error(values - elbo) if is_iwae else (math.nan, math.nan)
            diff, diff_se = (0.0, 0.0) if is_best else _mean_and_error(values - best["values"])
            nats, error = _mean_and_error(values)
            count = len(values)
            rows.append(
                {
                    "name": name,
                    "quantity": quantity["quantity"],
                    "nats": nats,
                    "se": error,
                    "kind": quantity.get("label", quantity["kind"]),
                    "gap": gap,
                    "gap_se": gap_se,
                    "diff": diff,
                    "diff_se": diff_se,
                    "diff_kind": "best" if is_best else _diff_kind(quantity, best),
                    "mc_se": quantity["mc_se"],
                    "bits_per_dim": -nats / (event_size * math.log(2)) if event_size else math.nan,
                    "rank": rank,
                    "elpd": count * nats,
                    "elpd_diff": count * diff,
                    "dse": count * diff_se,
                    "n": count,
                }
            )
    return DensityTable(pd.DataFrame(rows).set_index(["name", "quantity"]))


def compare_guides(trees: Mapping[str, xr.DataTree]) -> pd.DataFrame:
    """Several guides of the same model and data, best evidence lower bound first.

    Args:
        trees: results of ``from_svi`` by the name of the guide.

    Returns:
        A table, which prints some of its columns, with the index ``name`` and the columns
        ``elbo``, ``elbo_se``, ``iwae`` (of the largest K, which is ``iwae_particles``), ``iwae_se``, ``log_evidence``,
        ``log_evidence_se``, ``gap`` (the exact log evidence where it is known, else the PSIS
        estimate of this guide, minus its ELBO), ``gap_se`` (as in ``diagnose``), ``pareto_k``,
        ``ess`` of the weights in draws, ``seconds`` of training (NaN without history) and
        ``verdict``: "good", "usable" or "bad". In nats up to ``gap_se``. A guide with latents at a point
        (``AutoDelta``) has no bound on the evidence, and NaN in all columns but the verdict's.

    Raises:
        ValueError: if there is no tree, one has no ``vi_diagnostics``, or their observed data
            differ: a difference of ELBOs is then one of the data, not of the guides.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import compare_guides, from_svi
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> tree = from_svi(model, guide, num_samples=1000, seed=0)
        >>> compare_guides({"exact": tree})["verdict"].to_list()
        ['good']
    """
    if not trees:
        raise ValueError("Expected at least one tree, got none")
    trees = {name: as_result(tree) for name, tree in trees.items()}
    _check_same_data(trees)
    rows = []
    for name, tree in trees.items():
        _, checks = diagnose(tree, return_diagnostics=True)
        bounds = tree["vi_diagnostics"].to_dataset()
        if "point_estimates" in bounds.attrs:  # its numbers are none of the evidence
            rows.append({"name": name, "verdict": checks["verdict"]["level"]})
            continue
        if "chain" in bounds.dims:
            raise ValueError(
                f"Expected one training per tree, got the {bounds.sizes['chain']} joined restarts of '{name}': "
                "compare them one by one, or by compare_restarts"
            )
        tightest = bounds.isel(n_particles=-1)
        trace = tree["vi_trace"].to_dataset() if "vi_trace" in tree.children else xr.Dataset()
        rows.append(
            {
                "name": name,
                "elbo": float(bounds["elbo"]),
                "elbo_se": float(bounds["elbo_se"]),
                "iwae": float(tightest["iwae"]),
                "iwae_se": float(tightest["iwae_se"]),
                "iwae_particles": int(tightest["n_particles"]),
                "log_evidence": float(bounds["log_evidence"]),
                "log_evidence_se": float(bounds["log_evidence_se"]),
                "gap": checks["gap"]["value"],
                "gap_se": checks["gap"]["error"],
                "pareto_k": checks["pareto_k"]["value"],
                "ess": checks["ess"]["value"],
                "seconds": float(trace["seconds"].max()) if "seconds" in trace else math.nan,
                "verdict": checks["verdict"]["level"],
            }
        )
    table = pd.DataFrame(rows, columns=["name", *_COLUMNS]).set_index("name")
    return GuideTable(table.sort_values("elbo", ascending=False))


def _check_same_data(trees: Mapping[str, xr.DataTree]) -> None:
    observed = {
        name: {str(n): v.to_numpy() for n, v in tree["observed_data"].data_vars.items()}
        for name, tree in trees.items()
        if "observed_data" in tree.children
    }
    if not observed:
        return
    first, *rest = observed
    for name in rest:
        same = observed[name].keys() == observed[first].keys() and all(
            np.array_equal(values, observed[first][site], equal_nan=True)
            for site, values in observed[name].items()
        )
        if not same:
            raise ValueError(
                "Expected guides of one model and the same data, got different observed_data in "
                f"'{first}' and '{name}'"
            )


def _quantities(name: str, dataset: xr.Dataset) -> list[dict[str, Any]]:
    """The rows of one model, the tightest one last."""
    if "log_prob" in dataset and dataset["log_prob"].dims == ("obs_id",):
        values, kind = dataset["log_prob"].to_numpy(), dataset["log_prob"].attrs.get("kind", EXACT)
        error = dataset.attrs.get("solver_error", 0.0)
        label = f"{kind} to {_rounded_up(error)}" if error else kind
        row = {"quantity": "log p", "kind": kind, "label": label, "values": values, "mc_se": 0.0}
        return [row]
    if "elbo" not in dataset or dataset["elbo"].dims != ("obs_id",):
        raise ValueError(
            f"Expected log_prob or elbo per obs_id in Dataset '{name}', got "
            f"{ {str(key): value.dims for key, value in dataset.data_vars.items()} }"
        )
    rows = [_bound_row("ELBO", dataset["elbo"], dataset["elbo_se"])]
    for count in dataset["n_particles"].to_numpy():
        if count > 1:
            one = dataset.sel(n_particles=count)
            rows.append(_bound_row(f"IWAE-{count}", one["iwae"], one["iwae_se"]))
    return rows


def _diff_kind(quantity: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    kinds = quantity["kind"], best["kind"]
    return ESTIMATE if ESTIMATE in kinds else _DIFF_KINDS[kinds]


def _rounded_up(error: float) -> str:
    """The error to one digit, no smaller than it is."""
    exponent = math.floor(math.log10(error))
    return f"{math.ceil(error / 10**exponent) * 10**exponent:.0e}"


def _bound_row(quantity: str, values: xr.DataArray, errors: xr.DataArray) -> dict[str, Any]:
    return {
        "quantity": quantity,
        "kind": LOWER_BOUND,
        "values": values.to_numpy(),
        "mc_se": float(np.sqrt(np.square(errors.to_numpy()).sum()) / errors.size),
    }


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _check_obs_ids(datasets: Mapping[str, xr.Dataset]) -> None:
    missing = [name for name, dataset in datasets.items() if "obs_id" not in dataset.coords]
    if missing:
        raise ValueError(f"Expected an obs_id in every Dataset, got none in {missing}")
    ids = {name: dataset["obs_id"].to_numpy() for name, dataset in datasets.items()}
    first, *rest = ids
    for name in rest:
        if not np.array_equal(ids[first], ids[name]):
            raise ValueError(
                f"Expected the same obs_id in all Datasets, got {ids[first].size} in '{first}' and "
                f"{ids[name].size} in '{name}' that do not match: a difference is paired over data"
            )
