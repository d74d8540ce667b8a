"""The comparison in words: one table, and what follows from its numbers.

Two things are never mixed. The gap IWAE-K - ELBO belongs to one VAE. The difference of two numbers belongs to two
models, is paired over images and seeds, and says something about their log p(x) only as far as both are exact, or the
bound is the larger one.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import xarray as xr

from models.compare.jobs import BOTH, FLOW_POSTERIOR, FLOW_PRIOR, GAUSSIAN, PLAIN, SPLINE_FLOW
from models.compare.statistics import by_seed, is_clear, mean_and_error

_COLUMNS = (
    ("model", "<38"),
    ("log p", "<12"),
    ("nats (s.e.)", ">15"),
    ("over plain", ">13"),
    ("ELBO (s.e.)", ">15"),
    ("over plain", ">13"),
    ("gap (s.e.)", ">12"),
    ("CPU s", ">6"),
)

Scores = Mapping[str, xr.Dataset]


def tightest(scores: xr.Dataset) -> xr.DataArray:
    """The exact log p, or the IWAE bound of the most draws; dimensions seed and obs_id."""
    return scores["log_prob"] if "log_prob" in scores else scores["iwae"].isel(n_particles=-1)


def difference(scores: Scores, one: str, other: str = PLAIN) -> xr.DataArray:
    """One model minus another, each with its exact value or its tightest bound; dimensions seed and obs_id."""
    return tightest(scores[one]) - tightest(scores[other])


def table(scores: Scores, seconds: Mapping[str, float]) -> pd.DataFrame:
    """One row a model, in nats per image.

    Args:
        scores: by the name of the model, with the dimensions seed and obs_id.
        seconds: CPU time of a training.

    Returns:
        With the index ``model``: ``quantity`` ("log p" or "IWAE-K"), ``kind`` ("exact" or "lower bound"), ``nats``,
        ``diff`` (to the plain VAE), and for VAEs ``elbo``, ``elbo_diff`` and ``gap`` (IWAE-K - ELBO), each with its
        error over seeds and images under ``NAME_se``; ``bits_per_dim`` and ``seconds``.
    """
    rows = []
    for name, own in scores.items():
        is_exact = "log_prob" in own
        columns = {"nats": tightest(own), "diff": difference(scores, name)}
        if not is_exact:
            columns["elbo"] = own["elbo"]
            columns["elbo_diff"] = own["elbo"] - scores[PLAIN]["elbo"]
            columns["gap"] = tightest(own) - own["elbo"]
        row = {
            "model": name,
            "quantity": "log p" if is_exact else f"IWAE-{int(own['n_particles'].max())}",
            "kind": "exact" if is_exact else "lower bound",
        }
        for column, values in columns.items():
            row[column], row[f"{column}_se"] = mean_and_error(values)
        row["bits_per_dim"] = -row["nats"] / (own.attrs["event_size"] * math.log(2))
        rows.append(row | {"seconds": seconds[name]})
    return pd.DataFrame(rows).set_index("model")


def table_text(rows: pd.DataFrame) -> str:
    """The table for a terminal."""
    lines = [_line([title for title, _ in _COLUMNS])]
    lines.append("-" * len(lines[0]))
    for name, row in rows.iterrows():
        is_plain = name == PLAIN
        lines.append(
            _line(
                [
                    str(name),
                    "exact" if row["kind"] == "exact" else row["quantity"],
                    _cell(row, "nats"),
                    "" if is_plain else _cell(row, "diff", "+"),
                    _cell(row, "elbo"),
                    "" if is_plain else _cell(row, "elbo_diff", "+"),
                    _cell(row, "gap"),
                    f"{row['seconds']:.0f}",
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return " ".join(
        f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    ).rstrip()


def _cell(row: pd.Series, column: str, sign: str = "") -> str:
    value = row.get(column, math.nan)
    return "" if math.isnan(value) else f"{value:{sign}.2f} ({row[f'{column}_se']:.2f})"


def sentences(scores: Scores, reasons: xr.Dataset) -> list[str]:
    """What flows buy, why, where they do not, and what the numbers do not say."""
    text = [
        _total_sentence(scores),
        _prior_sentence(scores, reasons),
        _posterior_sentence(scores, reasons),
    ]
    if SPLINE_FLOW in scores:
        text.append(_density_sentence(scores))
    return text


def amount(values: xr.DataArray) -> str:
    """A difference with its error and, of several seeds, their means."""
    mean, error = mean_and_error(values)
    seeds = by_seed(values)
    each = f"; by seed {', '.join(f'{one:+.2f}' for one in seeds)}" if len(seeds) > 1 else ""
    return f"{mean:+.2f} nats (s.e. {error:.2f}{each})"


def headline(scores: Scores) -> str:
    """What both flows are worth together, and each alone."""
    mean, error = mean_and_error(difference(scores, BOTH))
    prior, posterior = (
        float(difference(scores, one).mean()) for one in (FLOW_PRIOR, FLOW_POSTERIOR)
    )
    return (
        f"{mean:+.1f} ± {error:.1f} nats per test image; "
        f"by the prior alone {prior:+.1f}, by the posterior alone {posterior:+.1f}"
    )


def _total_sentence(scores: Scores) -> str:
    both = difference(scores, BOTH)
    bound = f"IWAE-{int(scores[BOTH]['n_particles'].max())}"
    verdict = "make no clear difference to"
    if is_clear(both):
        verdict = "raise" if float(both.mean()) > 0 else "lower"
    return f"A flow prior and a flow posterior together {verdict} the plain VAE's {bound}: {amount(both)} per image."


def _prior_sentence(scores: Scores, reasons: xr.Dataset) -> str:
    gain = reasons["prior_gain"]
    elbo = scores[FLOW_PRIOR]["elbo"] - scores[PLAIN]["elbo"]
    if is_clear(gain) and float(gain.mean()) > 0:
        why = "its codes are not distributed as the standard normal says, and a prior that can follow them mends that"
    else:
        why = "its codes are close to what the standard normal says, and leave such a flow nothing to mend"
    return (
        f"{_alone('prior', difference(scores, FLOW_PRIOR))}. Trained with all the rest it changes the ELBO by "
        f"{_size(elbo, '+')}, fitted afterwards to the codes of the plain VAE, all else frozen, by "
        f"{_size(gain, '+')}: {why}."
    )


def _posterior_sentence(scores: Scores, reasons: xr.Dataset) -> str:
    family, encoder = reasons["approximation_gap"], reasons["amortization_gap"]
    part = ""
    if is_clear(family - encoder):
        part = f" the {'larger' if float((family - encoder).mean()) > 0 else 'smaller'} part and"
    return (
        f"{_alone('posterior', difference(scores, FLOW_POSTERIOR))}, and beside a flow prior "
        f"{_size(difference(scores, BOTH, FLOW_PRIOR), '+')}. Of the plain VAE's gap between ELBO and log p, "
        f"{_size(family)} are the normal family's,{part} all that a flow as its posterior could close. By "
        f"{_size(encoder)} the encoder misses the best normal posterior of a test image, by "
        f"{_size(reasons['train_amortization_gap'])} that of a training image."
    )


def _alone(part: str, values: xr.DataArray) -> str:
    if not is_clear(values):
        return f"A flow {part} alone makes no clear difference: {amount(values)}"
    return f"A flow {part} alone {'buys' if float(values.mean()) > 0 else 'costs'} {amount(values)}"


def _size(values: xr.DataArray, sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2f} nats (s.e. {error:.2f})"


def _density_sentence(scores: Scores) -> str:
    flow = difference(scores, SPLINE_FLOW, GAUSSIAN)
    vaes = [name for name in scores if "log_prob" not in scores[name]]
    best = max(vaes, key=lambda name: float(tightest(scores[name]).mean()))
    lead = difference(scores, SPLINE_FLOW, best)
    if not is_clear(lead):
        verdict = "which leaves open which of the two has the higher log p"
    elif float(lead.mean()) > 0:
        verdict = "part of which may be what the bound is short of its own log p: a difference of two models is no gap"
    else:
        verdict = "so that VAE's unknown log p is higher, too: a lower bound can only be too small"
    return (
        f"As the density of the pixels themselves the {SPLINE_FLOW} is exact: {amount(flow)} over the {GAUSSIAN}, and "
        f"{amount(lead)} over the lower bound of the best VAE ({best.removeprefix('VAE, ')}), {verdict}."
    )
