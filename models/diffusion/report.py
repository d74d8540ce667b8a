"""The table that ``python -m models.diffusion`` prints."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from pyro_flowkit.diagnostics import compare_densities

ITS_FLOW = "diffusion as a flow"
MATCHED = "flow matching"
SPLINE = "spline flow"
GAUSSIAN = "Gaussian"


def name_of(levels: int | None, fitted_scales: bool) -> str:
    """How the hierarchical VAE of so many levels is called."""
    if levels is None:
        return "diffusion, limit of levels"
    return f"diffusion, {levels} levels" + ("" if fitted_scales else ", fixed scales")


def chain_name(levels: int) -> str:
    """How the hierarchical VAE is called whose chain was drawn."""
    return f"diffusion, {levels} levels drawn"


def table(scores: Mapping[str, xr.Dataset], event_size: int | None) -> pd.DataFrame:
    """Means over the test rows, a row per model and quantity, in the order of ``scores``.

    Args:
        scores: of each model, of the same test rows.
        event_size: D where bits per dimension mean something.

    Returns:
        Index ``(name, quantity)``; columns ``kind``, ``nats``, ``se`` over the rows, ``mc_se`` of the draws,
        ``less_flow`` and ``less_flow_se``: the difference from the diffusion as a flow, paired over rows, and
        ``bits_per_dim``.
    """
    of_flow = scores[ITS_FLOW]["log_prob"].to_numpy()
    rows = []
    for name, found in scores.items():
        own = compare_densities({name: found})
        for (_, quantity), row in own.iterrows():
            values = _values(found, quantity)
            difference = values - of_flow
            rows.append(
                {
                    "name": name,
                    "quantity": quantity,
                    "kind": row["kind"],
                    "nats": row["nats"],
                    "se": row["se"],
                    "mc_se": row["mc_se"],
                    "less_flow": difference.mean(),
                    "less_flow_se": difference.std(ddof=1) / math.sqrt(len(values)),
                    "bits_per_dim": -row["nats"] / (event_size * math.log(2))
                    if event_size
                    else math.nan,
                }
            )
    return pd.DataFrame(rows).set_index(["name", "quantity"])


def _values(found: xr.Dataset, quantity: str) -> np.ndarray:
    if quantity == "log p":
        return found["log_prob"].to_numpy()
    if quantity == "ELBO":
        return found["elbo"].to_numpy()
    particles = int(quantity.removeprefix("IWAE-"))
    return found["iwae"].sel(n_particles=particles).to_numpy()


def show(table: pd.DataFrame) -> None:
    """Prints it."""
    has_bits = bool(table["bits_per_dim"].notna().any())
    title = f"{'model':<36} {'quantity':<9} {'kind':<15} {'nats (s.e.)':>17} {'less its flow':>16}"
    print(title + (" bits/dim" if has_bits else ""))
    for (name, quantity), row in table.iterrows():
        value = f"{row['nats']:.3f} ({row['se']:.3f})"
        apart = (
            f"{row['less_flow']:+.3f} ({row['less_flow_se']:.3f})" if row["less_flow_se"] else ""
        )
        bits = f" {row['bits_per_dim']:8.3f}" if has_bits else ""
        print(f"{name:<36} {quantity:<9} {row['kind']:<15} {value:>17} {apart:>16}{bits}")
    print(
        "In brackets the standard error over the rows, which for bounds includes that of their draws."
    )
