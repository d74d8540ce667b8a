"""Reading tables: every kind of file that is accepted gives the same rows."""

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.command_line.preparation import Preparation
from pyro_flowkit.command_line.tables import check_table, choose_columns, read_table
from tests.command_line.small import small_table


def values_of(path, **options):
    return choose_columns(read_table(path, **options), None, where=path.name)


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", [True, False])
def test_csv_files_of_several_dialects(separator, header, tmp_path):
    table = small_table(rows=30)
    path = tmp_path / "rows.csv"
    table.to_csv(path, sep=separator, header=header, index=False)
    values, columns = values_of(path)
    np.testing.assert_array_equal(values, table.to_numpy())
    assert columns == (tuple(table.columns) if header else ("0", "1", "2"))


def test_npz_files_of_columns_or_of_one_table(tmp_path):
    table = small_table(rows=30)
    np.savez(tmp_path / "columns.npz", **{name: table[name].to_numpy() for name in table})
    np.savez(tmp_path / "table.npz", rows=table.to_numpy(), other=np.zeros(3))
    values, columns = values_of(tmp_path / "columns.npz")
    assert columns == tuple(table.columns)
    np.testing.assert_array_equal(values, table.to_numpy())
    np.testing.assert_array_equal(values_of(tmp_path / "table.npz")[0], table.to_numpy())


def test_a_fingerprint_ignores_the_order_of_columns_and_nothing_else():
    table = small_table()

    def fingerprint(frame, **options):
        values = frame.to_numpy(np.float64)
        return check_table(values, tuple(frame.columns), where="t", **options).fingerprint()

    own = fingerprint(table)
    assert fingerprint(table[["visits", "height", "bent"]]) == own
    assert fingerprint(table.iloc[::-1]) != own
    assert fingerprint(table.rename(columns={"bent": "other"})) != own
    assert fingerprint(table, discrete="keep") != own


def test_nearly_collinear_columns_keep_their_digits():
    rng = np.random.default_rng(0)
    a = rng.normal(size=1000)
    rows = np.column_stack([1e6 + a, 1e6 + a + 1e-5 * rng.normal(size=1000)])
    preparation = Preparation.of(rows, ("a", "b"), (False, False))
    w = preparation.to_flow(torch.from_numpy(rows))
    np.testing.assert_allclose(np.cov(w.numpy().T, bias=True), np.eye(2), atol=1e-2)
    back = preparation.from_flow(w).numpy()
    np.testing.assert_allclose(back, rows, rtol=1e-14)


def test_points_of_the_cells_are_spread_evenly():
    table = small_table()
    preparation = Preparation.of(table.to_numpy(), tuple(table.columns), (False, True, True))
    points = np.array([point.numpy() for point in preparation.cell_points()])
    assert (points[:, 0] == 0).all()
    for column in points[:, 1:].T:
        np.testing.assert_allclose(np.sort(column), (np.arange(16) + 0.5) / 16)
    assert len(np.unique(points.round(6), axis=0)) == len(points)


def test_an_index_out_of_range_is_no_column():
    with pytest.raises(CommandError, match="the columns 3 in rows"):
        choose_columns(pd.DataFrame(np.eye(3)).rename(columns=str), ["3"], where="rows")
