"""Rows with missing values: refused, left out, or filled in for training alone."""

import numpy as np
import pandas as pd
import pytest

from pyro_flowkit.tables import FlowSettings, TableDensity, TableError
from pyro_flowkit.tables.missing import fill_in
from tests.tables.small import table_with_holes

SMALL = FlowSettings(layers=2, width=8)


@pytest.fixture
def holes():
    return table_with_holes()


def test_rows_with_missing_values_are_left_out_on_demand(holes):
    with pytest.raises(TableError, match=r"80 of 400 rows .* \(missing: drop or impute\)"):
        TableDensity(holes)
    density = TableDensity(holes, missing="drop", settings=SMALL).fit(steps=2)
    assert len(density.table.values) == 320 and density.table.noisy == ["visits"]
    complete = holes.dropna()
    pd.testing.assert_frame_equal(
        pd.DataFrame(density.table.values, complete.index, list(complete)), complete
    )
    found = density.log_prob(holes)
    assert np.isnan(found[::5]).all() and np.isfinite(np.delete(found, np.s_[::5])).all()


def test_rows_are_filled_in_to_train_and_for_nothing_else(holes):
    density = TableDensity(holes, missing="impute", settings=SMALL)
    table, split = density.table, density.split
    assert len(table.values) == 400 and table.filled == 80
    assert [len(part) for part in (split.train, split.validation, split.test)] == [336, 32, 32]
    for part in (split.validation, split.test):
        assert not holes.iloc[table.rows[part]].isna().any(axis=None)
    own = holes.iloc[table.rows].to_numpy()
    known = ~np.isnan(own)
    np.testing.assert_array_equal(table.values[known], own[known])
    assert np.isfinite(density.fit(steps=2).metrics["test"]["log_prob"][0])


def test_what_a_row_lacks_comes_from_rows_like_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    donors = np.column_stack([x, 10.0 * x, np.sign(x)])
    rows = np.array([[1.0, np.nan, np.nan], [np.nan, -20.0, -1.0]])
    filled = fill_in(rows, donors, seed=0)
    np.testing.assert_allclose(filled, [[1.0, 10.0, 1.0], [-2.0, -20.0, -1.0]], atol=0.8)
    assert filled[0, 2] == 1.0 and np.isnan(rows[0, 1])
    nothing = fill_in(np.full((1, 3), np.nan), donors, seed=0)
    assert (nothing == donors).all(1).any()


def test_infinite_values_and_fractions_among_integers_are_not_filled_in(holes):
    bad = holes.copy()
    bad.iloc[3, 0] = np.inf
    with pytest.raises(TableError, match=r"infinite values in 1 of 400 rows .* make them missing"):
        TableDensity(bad, missing="impute")
    bad = holes.copy()
    bad.iloc[5 * 3, :] = [np.nan, 0.0, 2.5]
    with pytest.raises(TableError, match="integers in the table, as in training, .* visits"):
        TableDensity(bad, missing="impute")
    with pytest.raises(TableError, match="at least 20 rows in the table without missing"):
        TableDensity(holes.iloc[:22], missing="impute")
    with pytest.raises(TableError, match="'mean'"):
        TableDensity(holes, missing="mean")
