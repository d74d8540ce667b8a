"""Pictures by eye: each looks as it did when somebody looked at it, whole, with its legend inside."""

import matplotlib
import numpy as np
import pytest

from tests.diagnostics.images import COLUMNS, PICTURES, ROWS, committed, figure_of, thumbnail

matplotlib.use("Agg")

TOLERANCE = 1.8  # digits; Matplotlib 3.9 differs from 3.11 by up to 1.5, a picture without its legend by 2.3 and more
WITH_LARGE_LEGENDS = ["plot_bounds", "plot_gap", "plot_guides", "flow.plot"]


@pytest.fixture(autouse=True)
def close():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def blurred(cells):
    """Means over squares of three by three, so that a line may move by a part of a cell."""
    wide = np.pad(cells, 1)
    return sum(wide[i : i + ROWS, j : j + COLUMNS] for i in range(3) for j in range(3)) / 9


def difference(figure, name):
    return np.abs(blurred(thumbnail(figure)) - blurred(committed()[name])).max()


def test_every_picture_has_a_thumbnail():
    assert list(committed()) == list(PICTURES)
    assert {picture.shape for picture in committed().values()} == {(ROWS, COLUMNS)}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_looks_as_it_did(name):
    assert difference(figure_of(name), name) < TOLERANCE


@pytest.mark.parametrize("name", WITH_LARGE_LEGENDS)
def test_a_picture_without_its_legend_looks_otherwise(name):
    figure = figure_of(name)
    next(ax.get_legend() for ax in figure.axes if ax.get_legend()).remove()
    assert difference(figure, name) > TOLERANCE


@pytest.mark.parametrize("name", PICTURES)
def test_all_of_a_new_figure_is_inside_of_it(name):
    figure = figure_of(name)
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert min(drawn.x0, drawn.y0) > -0.01
    assert drawn.x1 < whole.x1 + 0.01 and drawn.y1 < whole.y1 + 0.01
