"""Reading tables: every kind of file that is accepted gives the same rows."""

import numpy as np
import pytest

from pyro_flowkit.command_line.reading import read_table
from pyro_flowkit.tables.columns import choose_columns
from tests.tables.small import small_table


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
