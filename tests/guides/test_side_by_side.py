"""Searches side by side: each finds its own minimum, whatever the others do."""

import math

import pytest
import torch

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.guides.side_by_side import minimized_together

FOREVER = Deadline()
SCALES = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
CENTRES = torch.tensor([[3.0, -2.0, 5.0], [-1.0, 0.0, 40.0]], dtype=torch.float64)


def valleys(points):
    """Two quadratics, badly scaled, one for each row."""
    return 0.5 * (((points - CENTRES[: len(points)]) / SCALES).square()).sum(-1)


def test_each_start_finds_its_own_minimum():
    found = minimized_together(valleys, torch.zeros(2, 3, dtype=torch.float64), 200, FOREVER)
    assert valleys(found).max() < 1e-2


def test_a_curved_valley_is_followed():
    def banana(points):
        x, y = points.unbind(-1)
        return 100.0 * (y - x.square()).square() + (1.0 - x).square()

    starts = torch.tensor([[-1.2, 1.0], [2.0, -3.0]], dtype=torch.float64)
    assert banana(minimized_together(banana, starts, 150, FOREVER)).max() < 1e-2


def test_a_search_does_not_depend_on_the_others():
    def loss(points):
        return (points - 2.0).pow(4).sum(-1) + points.square().sum(-1)

    starts = torch.tensor([[0.0, 1.0], [1e3, -1e3], [math.nan, 0.0]], dtype=torch.float64)
    together = minimized_together(loss, starts, 30, FOREVER)
    alone = minimized_together(loss, starts[:1], 30, FOREVER)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-2)
    assert together[2].isnan().tolist() == [True, False], "no number: it stays where it was"


def test_it_steps_back_from_where_there_is_no_number():
    def loss(points):
        return torch.where(points < 0.5, math.nan, points - points.log()).sum(-1)

    found = minimized_together(loss, torch.tensor([[10.0]], dtype=torch.float64), 40, FOREVER)
    assert float(found) == pytest.approx(1.0, abs=0.05)


def test_after_the_deadline_it_stays():
    starts = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(minimized_together(valleys, starts, 50, Deadline(0.0)), starts)
