"""Guides over a reference: the panels, the styles, the regions, and every form that draws come in."""

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr

from pyro_flowkit.diagnostics import plot_guides
from pyro_flowkit.pictures import _density, _levels

matplotlib.use("Agg")
RNG = np.random.default_rng(0)
DRAWS = ("chain", "draw")


@pytest.fixture(autouse=True)
def close():
    import matplotlib.pyplot as plt

    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def as_dict(shift=0.0, draws=500):
    return {
        "mu": shift + RNG.normal(size=draws),
        "theta": shift + RNG.normal(size=(draws, 2)),
    }


def as_dataset(shift=0.0, schools=("A", "B")):
    values = as_dict(shift)
    theta = values["theta"].reshape(2, 250, 2).transpose(2, 0, 1)
    return xr.Dataset(
        {"mu": (DRAWS, values["mu"].reshape(2, 250)), "theta": (("school", *DRAWS), theta)},
        {"school": list(schools)},
    )


def as_tree(shift=0.0):
    return xr.DataTree.from_dict({"posterior": as_dataset(shift)})


def visible(panels):
    return np.array([[ax.axison for ax in row] for row in panels])


def test_panels_are_a_lower_triangle_of_named_variables():
    panels = plot_guides({"a": as_tree(), "b": as_tree(1.0)}, as_dataset())
    assert panels.shape == (3, 3)
    np.testing.assert_array_equal(visible(panels), np.tril(np.ones((3, 3), bool)))
    assert [ax.get_xlabel() for ax in panels[-1]] == ["mu", "theta[A]", "theta[B]"]
    assert [ax.get_ylabel() for ax in panels[:, 0]] == ["", "theta[A]", "theta[B]"]
    legend = [text.get_text() for text in panels[0, -1].get_legend().get_texts()]
    assert legend == ["reference", "a", "b"]


def test_guides_differ_in_colour_style_and_marker():
    panels = plot_guides({"a": as_dict(), "b": as_dict(1.0), "c": as_dict(2.0)})
    curves, means = panels[0, 0].lines[::2], panels[0, 0].lines[1::2]
    assert len({line.get_color() for line in curves}) == 3
    assert len({line.get_linestyle() for line in curves}) == 3
    assert len({line.get_marker() for line in means}) == 3
    np.testing.assert_allclose([m.get_xdata()[0] for m in means], [0, 1, 2], atol=0.25)
    handles = panels[0, -1].get_legend().legend_handles
    assert [h.get_linestyle() for h in handles] == [c.get_linestyle() for c in curves]


def test_the_reference_is_an_area_below_the_lines():
    from matplotlib.collections import PolyCollection

    panels = plot_guides({"a": as_dict()}, {"mu": torch.randn(400)}, reference_label="NUTS")
    assert panels.shape == (1, 1)  # what both of them have
    area = [c for c in panels[0, 0].collections if isinstance(c, PolyCollection)]
    assert len(area) == 1
    texts = [text.get_text() for text in panels[0, 0].get_legend().get_texts()]
    assert texts == ["NUTS", "a"]


def test_variables_can_be_chosen_by_site_and_by_element():
    panels = plot_guides({"a": as_tree()}, var_names=["theta[B]", "mu"])
    assert [ax.get_xlabel() for ax in panels[-1]] == ["theta[B]", "mu"]
    assert plot_guides({"a": as_tree()}, var_names=["theta"]).shape == (2, 2)


def test_axes_of_the_caller_are_drawn_on():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3)
    assert plot_guides({"a": as_tree()}, axes=axes)[1, 0] is axes[1, 0]
    single = plt.subplots()[1]
    assert plot_guides({"a": as_tree()}, var_names=["mu"], axes=single)[0, 0] is single
    with pytest.raises(ValueError, match=r"shape \(3, 3\), got \(1, 1\)"):
        plot_guides({"a": as_tree()}, axes=single)


def test_regions_hold_their_share_of_the_draws():
    x = RNG.normal(size=2000)
    y = 0.9 * x + 0.4 * RNG.normal(size=2000)
    grid = np.linspace(-4.5, 4.5, 60)
    points = np.stack(np.meshgrid(grid, grid)).reshape(2, -1)
    density = _density([x, y], points).reshape(60, 60)
    cell = (grid[1] - grid[0]) ** 2
    assert density.sum() * cell == pytest.approx(1.0, abs=0.01)
    outer, inner = _levels(density)
    assert density[density >= outer].sum() * cell == pytest.approx(0.9, abs=0.02)
    assert density[density >= inner].sum() * cell == pytest.approx(0.5, abs=0.02)


def test_densities_do_not_leak_over_a_bound():
    scale = RNG.exponential(size=2000)
    grid = np.linspace(-1.0, 10.0, 500)
    density = _density([scale], grid[None])
    assert (density[grid < 0] == 0).all()
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1.0, abs=0.02)
    assert density[grid > 0][0] == pytest.approx(1.0, abs=0.15)


def test_a_point_estimate_is_a_line_and_a_marker():
    point = {"mu": np.full(10, 0.3), "theta": np.full((10, 2), 0.1)}
    panels = plot_guides({"delta": point, "a": as_dict()})
    np.testing.assert_allclose(panels[0, 0].lines[0].get_xdata(), 0.3)
    assert len(panels[1, 0].lines) == 2


def infinite():
    draws = as_dict()
    draws["mu"][3] = np.inf
    return draws


@pytest.mark.parametrize(
    ("guides", "options", "message"),
    [
        ({}, {}, "got none"),
        ({"a": {"x": np.zeros(3)}}, {"reference": {"y": np.zeros(3)}}, r"got 0 \(none\)"),
        (
            {"a": {"x": np.zeros((3, 9))}},
            {"var_names": "x"},
            r"1 to 8 variables .* got 9 .*choose with var_names",
        ),
        ({"a": {"x": np.zeros(3)}}, {"var_names": ["y"]}, r"among \['x'\], got 'y'"),
        ({"a": {"x": np.float64(3)}}, {}, "draws of 'x' in 'a', got a single number"),
        ({"a": infinite()}, {}, "finite draws of 'mu' in 'a'"),
        ({"a": xr.DataTree()}, {}, r"posterior in 'a', got \[\]"),
        ({"reference": as_dict()}, {"reference": as_dict()}, "no guide, got 'reference'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(guides, options, message):
    with pytest.raises(ValueError, match=message):
        plot_guides(guides, **options)


def test_a_guide_much_narrower_than_the_reference_is_drawn():
    narrow = {name: 1e-6 * values for name, values in as_dict().items()}
    panels = plot_guides({"narrow": narrow}, as_dict())
    density = panels[0, 0].lines[1].get_ydata()
    assert density.max() > 1e5  # the reference's grid alone has no point in it
    assert len(panels[1, 0].collections) == 2
    reference = panels[0, 0].lines[0].get_ydata()
    assert reference.max() > 0.2 * panels[0, 0].get_ylim()[1]  # and it stays in sight


def test_a_single_name_and_tensors_with_gradients_are_taken():
    draws = {"theta": torch.randn(50, 2, requires_grad=True), "mu": torch.randn(50)}
    assert plot_guides({"a": draws}, var_names="theta").shape == (2, 2)


def test_a_tree_without_a_name_is_refused():
    with pytest.raises(ValueError, match="guides by name, .* got a DataTree"):
        plot_guides(as_tree())


def test_of_many_variables_the_first_are_drawn_and_the_legend_says_so():
    import matplotlib.pyplot as plt

    draws = np.random.default_rng(0).normal(size=(50, 10))
    panels = plot_guides({"a": {"x": draws}})
    assert panels.shape == (8, 8)
    assert panels[-1, -1].get_xlabel() == "x[7]"
    assert "first 8 of 10 variables" in panels[0, -1].get_legend().get_title().get_text()
    plt.close(panels[0, 0].figure)
