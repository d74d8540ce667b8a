"""``TableDensity``: the same density as that of the command line, from a frame."""

import numpy as np
import pandas as pd
import pytest

from pyro_flowkit.tables import FlowSettings, TableDensity, TableError
from tests.tables.small import small_table

SETTINGS = FlowSettings(layers=2, width=8)


@pytest.fixture(scope="module")
def fitted():
    return TableDensity(small_table(), settings=SETTINGS, seed=3).fit(steps=40)


def test_it_scores_and_draws_frames_in_the_units_of_the_table(fitted):
    table = small_table()
    log_prob = fitted.log_prob(table[["visits", "bent", "height"]].assign(other="text"))
    assert log_prob.shape == (400,)
    test = log_prob[fitted.split.test]
    assert fitted.metrics["test"]["log_prob"][0] == pytest.approx(test.mean(), abs=1e-5)
    draws = fitted.sample(2000, seed=1)
    assert list(draws) == list(table) and draws["visits"].dtype == np.int64
    assert draws["height"].mean() == pytest.approx(table["height"].mean(), abs=2.0)
    assert fitted.verdict().level in str(fitted.verdict())


def test_an_array_is_a_frame_with_numbers_for_names():
    rows = np.random.default_rng(0).normal(size=(60, 2))
    density = TableDensity(rows, columns=["1"], settings=SETTINGS)
    assert repr(density) == f"TableDensity({len(rows)} rows of 1; fresh)"
    assert density.table.columns == ("1",)
    assert density.fit(steps=2).log_prob(rows).shape == (60,)


def test_what_is_no_table_is_refused_in_words():
    with pytest.raises(TableError, match=r"an array of shape \(N, D\), got ndarray\(5,\)"):
        TableDensity(np.zeros(5))
    with pytest.raises(TableError, match=r"got twice: \['1'\]"):
        TableDensity(pd.DataFrame(np.eye(2), columns=[1, "1"]))
    with pytest.raises(RuntimeError, match=r"Expected TableDensity\(frame\).fit\(\)"):
        TableDensity(small_table()).sample(3)
