"""The comparison in words: one table, and three sentences that follow from its numbers.

Two things are never mixed. The gap IWAE-K - ELBO belongs to one VAE. The difference of two numbers
belongs to two models, has a standard error paired over the test data, and says something about
their log p(x) only as far as both are exact, or the bound is the larger one.
"""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import xarray as xr

from models import vae
from models._compare_jobs import GAUSSIAN, SPLINE_FLOW, vae_name
from pyro_flowkit.diagnostics import compare_densities

SHOWN_PARTICLES = (10, 1000)
_COLUMNS = (
    ("model", "<38"),
    ("quantity", "<10"),
    ("kind", "<12"),
    ("nats (s.e.)", ">16"),
    ("MC s.e.", ">8"),
    ("bits/dim", ">9"),
    ("gap (s.e.)", ">15"),
    ("train s", ">7"),
)


def table_rows(
    scores: Mapping[str, xr.Dataset], seconds: Mapping[str, float]
) -> list[dict[str, str | float]]:
    """The rows of the table: every exact value, and of each VAE the ELBO, IWAE-10 and IWAE-1000.

    Args:
        scores: test scores by the name of the model.
        seconds: training time by the name of the model.

    Returns:
        Dicts with name, quantity, kind, nats, se, mc_se, bits_per_dim, gap, gap_se and seconds;
        the gap stands in the row of the largest K.
    """
    table = compare_densities(scores)
    rows: list[dict[str, str | float]] = []
    for name in scores:
        own = table.loc[name]
        last = own.index[-1]
        for quantity, row in own.iterrows():
            shown = {"log p", "ELBO", last} | {f"IWAE-{k}" for k in SHOWN_PARTICLES}
            if quantity in shown:
                row = row if quantity == last else row.drop(["gap", "gap_se"])
                rows.append({"name": name, "quantity": quantity, **row, "seconds": seconds[name]})
    return rows


def table_text(rows: Sequence[Mapping[str, str | float]]) -> str:
    """The table for a terminal; model and time stand in the first of a model's rows only."""
    lines = [_line(title for title, _ in _COLUMNS)]
    lines.append("-" * len(lines[0]))
    previous = None
    for row in rows:
        first = row["name"] != previous
        previous = row["name"]
        gap = f"{row['gap']:.2f} ({row['gap_se']:.2f})" if "gap" in row else ""
        lines.append(
            _line(
                (
                    row["name"] if first else "",
                    row["quantity"],
                    row["kind"],
                    f"{row['nats']:.2f} ({row['se']:.2f})",
                    f"{row['mc_se']:.2f}" if row["kind"] != "exact" else "0",
                    f"{row['bits_per_dim']:.3f}",
                    gap if gap != "nan (nan)" else "",
                    f"{row['seconds']:.0f}" if first else "",
                )
            )
        )
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return " ".join(
        f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    ).rstrip()


def difference(scores: Mapping[str, xr.Dataset], one: str, other: str) -> tuple[float, float]:
    """Mean of one model minus another over the test data, in nats, and its paired standard error.

    Each model counts with its exact value or its tightest bound.
    """
    table = compare_densities({one: scores[one], other: scores[other]})
    tightest = {name: table.loc[name].iloc[-1] for name in (one, other)}
    lower = one if tightest[one]["rank"] else other
    sign = 1.0 if lower == one else -1.0
    return sign * tightest[lower]["diff"], tightest[lower]["diff_se"]


def sentences(scores: Mapping[str, xr.Dataset]) -> list[str]:
    """Three sentences: the exact values, the priors, and what the numbers do not show."""
    return [_exact_sentence(scores), _prior_sentence(scores), _limits_sentence(scores)]


def _exact_sentence(scores: Mapping[str, xr.Dataset]) -> str:
    value, error = difference(scores, SPLINE_FLOW, GAUSSIAN)
    amount = f"{abs(value):.1f} nats per image (paired s.e. {error:.1f})"
    if abs(value) <= 2 * error:
        verdict = f"differ by {amount}, which is within two standard errors of nothing"
    else:
        verdict = f"say that the flow is {amount} {'better' if value > 0 else 'worse'}"
    return (
        f"The log p of the {GAUSSIAN} and of the {SPLINE_FLOW} are exact values of the same "
        f"{scores[SPLINE_FLOW].sizes['obs_id']} test images, and they {verdict}."
    )


def _prior_sentence(scores: Mapping[str, xr.Dataset]) -> str:
    quantity = _tightest_name(scores)
    parts, wins = [], []
    for posterior in vae.POSTERIORS:
        pair = (vae_name("flow", posterior), vae_name("standard", posterior))
        value, error = difference(scores, *pair)
        side = "above" if value > 0 else "below"
        parts.append(
            f"{abs(value):.2f} nats {side} it (paired s.e. {error:.2f}) with a {posterior} posterior"
        )
        wins.append(value > 2 * error)
    if all(wins):
        verdict = (
            "more than two paired standard errors both times, so on these test images, and for one "
            "training run each, it wins"
        )
    elif any(wins):
        which = vae.POSTERIORS[wins.index(True)]
        verdict = f"more than two paired standard errors above only with the {which} posterior"
    else:
        verdict = "so it does not exceed it by more than two paired standard errors either time"
    return (
        f"Against the standard prior's {quantity}, the flow prior's is {parts[0]} and {parts[1]}: "
        f"{verdict}."
    )


def _limits_sentence(scores: Mapping[str, xr.Dataset]) -> str:
    table = compare_densities(scores)
    vaes = [name for name in scores if table.loc[name, "kind"].iloc[0] != "exact"]
    gaps = [float(table.loc[name].iloc[-1]["gap"]) for name in vaes]
    best = max(vaes, key=lambda name: table.loc[name].iloc[-1]["nats"])
    value, error = difference(scores, best, SPLINE_FLOW)
    if value > 2 * error:
        verdict = (
            "is above it, and since a lower bound can only be too small, that VAE's unknown log p "
            "is higher too"
        )
    elif value < -2 * error:
        verdict = (
            "is below it, which leaves open whether that VAE's unknown log p is: this distance is "
            "a difference between two models and no gap"
        )
    else:
        verdict = (
            "cannot be told from it, which leaves open by how much that VAE's unknown log p is "
            "higher: this distance is a difference between two models and no gap"
        )
    return (
        f"The VAEs' numbers are lower bounds, whose own gaps {_tightest_name(scores)} - ELBO "
        f"({min(gaps):.2f} to {max(gaps):.2f} nats) show at least how loose each ELBO is but not "
        f"how far the tighter bound still is from log p; the best of them ({best}) lies "
        f"{abs(value):.1f} nats (paired s.e. {error:.1f}) from the {SPLINE_FLOW}'s exact value and "
        f"{verdict}."
    )


def _tightest_name(scores: Mapping[str, xr.Dataset]) -> str:
    bounds = scores[vae_name("standard", "normal")]
    return f"IWAE-{int(bounds['n_particles'].max())}"


def table_frame(rows: Sequence[Mapping[str, str | float]]) -> pd.DataFrame:
    """The same rows as a DataFrame with the index (name, quantity)."""
    return pd.DataFrame(rows).set_index(["name", "quantity"])
