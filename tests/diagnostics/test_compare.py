"""The table of exact values and bounds: kinds, gaps, paired differences."""

import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pyro_flowkit.diagnostics import compare_densities

RNG = np.random.default_rng(0)
BASE = RNG.normal(-100.0, 10.0, size=200)  # how hard each datum is, for every model


def exact(shift, noise=0.5, event_size=64):
    values = BASE + shift + noise * RNG.normal(size=200)
    return xr.Dataset(
        {"log_prob": ("obs_id", values)}, {"obs_id": np.arange(200)}, {"event_size": event_size}
    )


def bounds(shift, gap=2.0):
    elbo = BASE + shift + 0.5 * RNG.normal(size=200)
    iwae = np.stack([elbo, elbo + gap / 2, elbo + gap], -1)
    return xr.Dataset(
        {
            "elbo": ("obs_id", elbo),
            "elbo_se": ("obs_id", np.full(200, 0.3)),
            "iwae": (("obs_id", "n_particles"), iwae),
            "iwae_se": (("obs_id", "n_particles"), np.full((200, 3), 0.3)),
        },
        {"obs_id": np.arange(200), "n_particles": [1, 10, 1000]},
        {"event_size": 64},
    )


def test_rows_say_what_kind_of_number_they_are_best_model_first():
    table = compare_densities({"vae": bounds(-3.0), "gauss": exact(-10.0), "flow": exact(0.0)})
    assert list(table.index) == [
        ("flow", "log p"),
        ("vae", "ELBO"),
        ("vae", "IWAE-10"),
        ("vae", "IWAE-1000"),
        ("gauss", "log p"),
    ]
    assert list(table["rank"]) == [0, 1, 1, 1, 2]
    assert list(table["kind"]) == ["exact", "lower bound", "lower bound", "lower bound", "exact"]


def test_a_gap_is_within_one_model_and_nothing_else():
    table = compare_densities({"vae": bounds(-3.0, gap=2.0), "flow": exact(0.0)})
    assert table.loc[("vae", "IWAE-10"), "gap"] == pytest.approx(1.0)
    assert table.loc[("vae", "IWAE-1000"), "gap"] == pytest.approx(2.0)
    assert table["gap"].isna()[[("vae", "ELBO"), ("flow", "log p")]].all()


def test_differences_are_paired_over_data():
    table = compare_densities({"a": exact(0.0), "b": exact(-2.0)})
    row = table.loc[("b", "log p")]
    assert abs(row["diff"] + 2.0) < 4 * row["diff_se"]
    assert row["diff_se"] == pytest.approx(math.sqrt(0.5 / 200), rel=0.2)
    assert row["se"] > 10 * row["diff_se"]  # the data differ more than the models
    assert table.loc[("a", "log p"), ["diff", "diff_se"]].tolist() == [0.0, 0.0]


def test_sums_over_data_have_the_names_of_arviz():
    table = compare_densities({"a": exact(0.0), "b": exact(-2.0), "vae": bounds(-3.0)})
    np.testing.assert_allclose(table["elpd"], 200 * table["nats"])
    np.testing.assert_allclose(table["elpd_diff"], 200 * table["diff"])
    np.testing.assert_allclose(table["dse"], 200 * table["diff_se"])
    assert table.loc[("b", "log p"), "elpd_diff"] == pytest.approx(-400, abs=40)


def test_a_difference_with_a_bound_is_a_bound():
    first = compare_densities({"flow": exact(0.0), "vae": bounds(-5.0), "gauss": exact(-9.0)})
    assert first.loc[("flow", "log p"), "diff_kind"] == "best"
    assert first.loc[("vae", "IWAE-1000"), "diff_kind"] == "at least"
    assert first.loc[("gauss", "log p"), "diff_kind"] == "exact"
    second = compare_densities({"vae": bounds(0.0), "other": bounds(-5.0), "flow": exact(-2.0)})
    assert second.loc[("flow", "log p"), "diff_kind"] == "at most"
    assert second.loc[("other", "ELBO"), "diff_kind"] == "between bounds"
    assert second.loc[("vae", "ELBO"), "diff_kind"] == "between bounds"


def test_errors_of_draws_and_of_data_are_apart():
    table = compare_densities({"vae": bounds(0.0), "flow": exact(0.0)})
    assert table.loc[("vae", "ELBO"), "mc_se"] == pytest.approx(0.3 / math.sqrt(200))
    assert table.loc[("flow", "log p"), "mc_se"] == 0.0
    assert table.loc[("flow", "log p"), "se"] == pytest.approx(10 / math.sqrt(200), rel=0.2)


def test_bits_per_dimension_only_where_the_dimension_is_known():
    unknown = exact(0.0)
    del unknown.attrs["event_size"]
    table = compare_densities({"known": exact(0.0), "unknown": unknown})
    known = table.loc[("known", "log p")]
    assert known["bits_per_dim"] == pytest.approx(-known["nats"] / (64 * math.log(2)))
    assert math.isnan(table.loc[("unknown", "log p"), "bits_per_dim"])


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({}, "got none"),
        ({"a": exact(0.0), "b": exact(0.0).isel(obs_id=slice(9))}, "200 in 'a' and 9 in 'b'"),
        ({"a": xr.Dataset({"x": 1.0})}, r"none in \['a'\]"),
        ({"a": bounds(0.0).drop_vars("elbo")}, "log_prob or elbo per obs_id in Dataset 'a'"),
    ],
)
def test_what_cannot_be_compared_is_refused(datasets, message):
    with pytest.raises(ValueError, match=message):
        compare_densities(datasets)


def test_a_printed_table_begins_with_nats_and_errors_within_80_columns():
    table = compare_densities({"VAE, flow prior, flow posterior": bounds(-3.0), "flow": exact(0.0)})
    header, _, *rows = lines = str(table).splitlines()
    assert header.split() == ["nats", "se", "kind", "gap"]
    assert max(map(len, lines)) <= 80
    assert f"{table.loc[('flow', 'log p'), 'nats']:.3f}" in rows[0]
    assert rows[-1].endswith("n") and "diff_kind" in str(
        table
    )  # the names of those that are not shown
    assert str(table[["elpd"]]) == str(pd.DataFrame(table)[["elpd"]])
    long = compare_densities(
        {"a model whose name is as long as the line of a terminal is" * 2: exact(0.0)}
    )
    assert str(long).splitlines()[0].split() == ["nats", "se"]
