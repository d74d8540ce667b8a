"""The parts of a density of tables: columns, split, preparation, flow, and the rule that keeps it."""

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_flowkit.tables import FlowSettings, TableError, training
from pyro_flowkit.tables.columns import check_table, choose_columns
from pyro_flowkit.tables.flow import TableFlow
from pyro_flowkit.tables.order import order_columns
from pyro_flowkit.tables.preparation import Preparation
from pyro_flowkit.tables.split import split_rows
from tests.tables.small import small_table


def test_the_split_is_80_10_10_by_the_seed():
    split = split_rows(1003, 3, seed=5)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [802, 100, 101]
    order = np.random.default_rng(5).permutation(1003)
    assert np.concatenate([split.train, split.validation, split.test]).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([1.0, 1.2, 0.8], True),
        ([-1.0, 1.3, -0.2], False),
        ([1.0, 2.0, 0.0, -1.0, 1.0], False),
        ([1.0, float("nan")], False),
        ([5.0], False),
    ],
)
def test_a_gain_must_exceed_two_standard_errors(gains, kept):
    assert training.is_gain(torch.tensor(gains)) is kept


@pytest.mark.parametrize(("columns", "layers"), [(1, 1), (2, 1), (5, 3), (9, 9), (4, 11)])
def test_a_fresh_flow_is_standard_normal_and_a_trained_one_a_density(columns, layers):
    flow = TableFlow(columns, FlowSettings(layers=layers, width=8))
    w = torch.randn(50, columns)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(w).sum(-1)
    torch.testing.assert_close(flow.log_prob(w), normal, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: _base_of(flow, x)))(w[:3])
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(_base_of(flow, w[:3])).sum(-1)
    torch.testing.assert_close(
        flow.log_prob(w[:3]), expected + jacobian.slogdet()[1], rtol=1e-4, atol=1e-4
    )


def test_the_column_that_the_others_explain_is_transformed_next_to_the_data():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 1000))
    explained = np.sin(2.0 * a) * b + 0.1 * rng.normal(size=1000)
    order = order_columns(torch.from_numpy(np.column_stack([a, explained, b, c])))
    assert sorted(order) == [0, 1, 2, 3] and order[-1] == 1
    flow = TableFlow(4, FlowSettings(order=order, layers=6, width=8))
    with torch.no_grad():
        for parameter in flow.layers[
            -3
        ].parameters():  # before a permutation and the columns' splines
            parameter.add_(0.3 * torch.randn_like(parameter))
    w = torch.randn(20, 4)
    moved = (_base_of(flow, w) - w).abs().amax(0) > 1e-4
    assert moved.tolist() == [False, True, False, False]


def test_an_order_must_hold_every_column_once():
    with pytest.raises(ValueError, match="order of 3 columns"):
        TableFlow(3, FlowSettings(order=(0, 1, 1)))


def _base_of(flow, w):
    for layer in reversed(flow.layers):
        w = layer.inverse_and_ladj(w)[0]
    return w


def test_steps_follow_the_rows_within_limits():
    few, some, many = (training.default_steps(rows, 256) for rows in (100, 20_000, 10**6))
    assert training.LEAST_STEPS == few < some < many == training.MOST_STEPS


def test_networks_alone_decay_and_the_less_the_more_rows_there_are():
    decays = [training.weight_decay(rows) for rows in (100, 16_000, 32_000)]
    assert decays == pytest.approx([1.0, 0.25, 0.0625])
    flow = TableFlow(3, FlowSettings(width=8))
    decaying, other = training._optimizer(flow, 0.5, list(flow.parameters()), lr=0.1).param_groups
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.5, 0.0)
    assert len(decaying["params"]) == 3 and len(other["params"]) == 1


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
    with pytest.raises(TableError, match="the columns 3 in rows"):
        choose_columns(pd.DataFrame(np.eye(3)).rename(columns=str), ["3"], where="rows")
