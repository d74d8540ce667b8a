"""The pictures show the numbers, take the Axes they are given, and can be told apart in grey."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import xarray as xr

from pyro_flowkit.diagnostics import plot_bounds, plot_elbo, plot_gap, plot_pareto_k
from tests.diagnostics.images import bounds, exact, gaps

matplotlib.use("Agg")


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()
    plt.close(figure)


def test_ladders_and_exact_lines_are_apart(ax):
    assert plot_bounds({"a": bounds(-5.0), "b": bounds(-6.0), "flow": exact(-1.0)}, ax) is ax
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["a (lower bounds)", "b (lower bounds)"]
    assert [text.get_text() for text in ax.texts] == ["flow (exact)"]
    first, second = (container[0] for container in ax.containers)
    np.testing.assert_allclose(first.get_ydata(), [-5.0, -4.0, -2.0])
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["ELBO", "IWAE-10", "IWAE-1000"]


def test_exact_values_alone_can_be_drawn(ax):
    plot_bounds({"flow": exact(-1.0), "gauss": exact(-3.0)}, ax)
    assert sorted(text.get_text() for text in ax.texts) == ["flow (exact)", "gauss (exact)"]
    assert ax.get_legend() is None


def test_training_curve_takes_a_dict_a_result_or_a_tree(ax):
    history = {"step": np.arange(200), "elbo": -1000.0 / np.arange(1, 201)}

    class Result:
        pass

    result = Result()
    result.history = history
    trace = xr.Dataset({"elbo": (("chain", "step"), history["elbo"][None])}, {"step": range(200)})
    tree = xr.DataTree.from_dict({"vi_trace": trace})
    for source, label in ((history, "dict"), (result, "result"), (tree, "tree")):
        assert plot_elbo(source, ax, label=label) is ax
    smoothed = [line for line in ax.lines if line.get_gid() == "smoothed"]
    assert len(smoothed) == 3
    assert len({line.get_linestyle() for line in smoothed}) == 3
    for line in smoothed[1:]:
        np.testing.assert_allclose(line.get_ydata(), smoothed[0].get_ydata())
    assert ax.get_ylim()[0] > -100  # the first steps do not set the scale


def test_tree_without_history_is_refused(ax):
    with pytest.raises(ValueError, match=r"vi_trace, got \['posterior'\]"):
        plot_elbo(xr.DataTree.from_dict({"posterior": xr.Dataset({"x": 1.0})}), ax)


def test_pareto_k_counts_what_is_above_the_threshold(ax):
    assert plot_pareto_k(bounds(0.0), ax) is ax
    assert ax.get_title() == "2 of 4 above 0.67, the most for 1,000 draws"
    below, above, infinite = ax.collections
    assert [len(c.get_offsets()) for c in (below, above, infinite)] == [2, 1, 1]
    assert np.isfinite(infinite.get_offsets()).all()
    assert {0.5, 0.7, 1.0} <= {line.get_ydata()[0] for line in ax.lines}
    names = ["0.5: finite variance below", "0.7: smoothing helps below", "1: finite mean below"]
    assert [text.get_text() for text in ax.texts] == names
    with pytest.raises(ValueError, match=r"pareto_k, got \['log_prob'\]"):
        plot_pareto_k(exact(0.0), ax)


def test_both_parts_of_the_gap_are_counted_and_differ_in_grey(ax):
    dataset = gaps(np.linspace(0.0, 0.4, 30), np.linspace(0.3, 1.3, 30))
    assert plot_gap(dataset, ax) is ax
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["approximation (family): mean 0.2", "amortisation (encoder): mean 0.8"]
    filled, hatched = ax.patches
    assert filled.get_hatch() is None and hatched.get_hatch()
    assert filled.get_facecolor()[3] > 0 and hatched.get_facecolor()[3] == 0
    means = [line for line in ax.lines if line.get_xdata()[0] > 0]
    np.testing.assert_allclose([line.get_xdata()[0] for line in means], [0.2, 0.8])
    assert len({line.get_linestyle() for line in means}) == 2


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (([0.1], [0.2]), "mean 0.2"),
        (([0.0, 0.0], [0.0, 0.0]), "mean 0"),
        (([0.1, 0.2], [0.2, np.inf]), "mean inf, 1 not finite"),
        (([0.1, 0.2], [np.inf, np.inf]), "mean inf, 2 not finite"),
        (([1e-3] * 500, [*[1e-3] * 499, 1e4]), "mean 20"),
    ],
    ids=["one datum", "no gap", "one infinite", "all infinite", "one far away"],
)
def test_gaps_of_any_size_can_be_drawn(ax, parts, text):
    plot_gap(gaps(*parts), ax)
    assert ax.get_legend().get_texts()[1].get_text().endswith(text)
    assert sum(len(patch.get_path().vertices) for patch in ax.patches) < 1000


def test_gaps_that_are_not_split_are_refused(ax):
    with pytest.raises(
        ValueError, match=r"\['approximation_gap', 'amortization_gap'\], got \['elbo"
    ):
        plot_gap(bounds(0.0), ax)


def test_import_loads_neither_arviz_nor_matplotlib():
    code = "import sys, pyro_flowkit.diagnostics; print({'arviz', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
