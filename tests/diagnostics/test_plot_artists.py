"""What stands in the pictures is what the data say: positions, heights, counts, limits, labels."""

import matplotlib
import numpy as np
import pytest
import xarray as xr

from pyro_flowkit.diagnostics import (
    pareto_k_threshold,
    plot_bounds,
    plot_elbo,
    plot_gap,
    plot_guides,
    plot_pareto_k,
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def place_of(text):
    """The height of a label in the units of the data."""
    return text.xy[1]


def test_the_curve_of_the_elbo_is_the_history_and_its_running_mean():
    step = np.arange(50, 150)
    elbo = np.random.default_rng(0).normal(-10.0, 1.0, size=100) - 500.0 * (step == 50)
    ax = plot_elbo({"step": step, "elbo": elbo}, label="run", smooth=0.1)
    raw, smoothed = ax.lines
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([step, elbo], -1))
    means = [elbo[i - 9 : i + 1].mean() for i in range(9, 100)]  # of the last ten steps
    np.testing.assert_allclose(smoothed.get_xydata(), np.stack([step[9:], means], -1))
    low, high = ax.get_ylim()
    late = elbo[10:]
    assert elbo[0] < low < np.quantile(late, 0.01) and late.max() < high < late.max() + 1.0
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "ELBO (nats)")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["run"]


def test_a_second_run_widens_the_limits_and_never_narrows_them():
    step = np.arange(100)
    ax = plot_elbo({"step": step, "elbo": -10.0 - 0.01 * step})
    first = ax.get_ylim()
    plot_elbo({"step": step, "elbo": -10.5 + 0.001 * step}, ax)
    plot_elbo({"step": step, "elbo": -8.0 + 0.001 * step}, ax)
    low, high = ax.get_ylim()
    assert low == first[0] and -8.0 < high < -7.5


def test_the_curve_of_a_point_estimate_says_what_it_is():
    class Point:
        history = {"step": np.arange(20), "elbo": np.linspace(-9.0, -1.0, 20)}
        is_point = True

    assert plot_elbo(Point()).get_ylabel() == "log p(x, z) at the point (nats)"


def ladder(elbo, counts, seed):
    """A data set of bounds of 30 data that differ; returns it with the bounds by datum."""
    rng = np.random.default_rng(seed)
    iwae = elbo + 0.3 * np.log(counts) + rng.normal(size=(30, 1)) + 0.0 * np.array(counts)
    errors = rng.uniform(0.1, 0.3, size=(30, len(counts)))
    return xr.Dataset(
        {
            "elbo": ("obs_id", iwae[:, 0]),
            "elbo_se": ("obs_id", errors[:, 0]),
            "iwae": (("obs_id", "n_particles"), iwae),
            "iwae_se": (("obs_id", "n_particles"), errors),
        },
        {"obs_id": np.arange(30), "n_particles": counts},
        {"num_samples": 1000},
    )


def test_rungs_stand_at_their_number_of_particles_with_the_error_of_the_draws():
    datasets = {"a": ladder(-50.0, [1, 10, 100], 0), "b": ladder(-52.0, [1, 10], 1)}
    exact = np.linspace(-47.0, -45.0, 30)
    flow = xr.Dataset({"log_prob": ("obs_id", exact)}, {"obs_id": np.arange(30)})
    ax = plot_bounds({**datasets, "flow": flow})
    for container, dataset in zip(ax.containers, datasets.values(), strict=True):
        line, _, (bars,) = container
        means = dataset["iwae"].mean("obs_id").to_numpy()
        counts = dataset["n_particles"].to_numpy()
        np.testing.assert_allclose(line.get_xydata(), np.stack([counts, means], -1))
        errors = np.sqrt((dataset["iwae_se"] ** 2).sum("obs_id")).to_numpy() / 30
        ends = np.stack(bars.get_segments())  # (rungs, low and high, x and y)
        np.testing.assert_allclose(ends[:, :, 0], np.stack([counts, counts], -1))
        np.testing.assert_allclose(ends[:, :, 1], np.stack([means - errors, means + errors], -1))
    assert ax.lines[-1].get_ydata() == pytest.approx([exact.mean()] * 2)
    (label,) = ax.texts
    assert label.get_text() == "flow (exact)"
    assert place_of(label) == pytest.approx(exact.mean())
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "nats per datum"
    np.testing.assert_array_equal(ax.get_xticks(), [1, 10, 100])
    low, high = ax.get_ylim()
    assert low < -52.0 and high > exact.mean()


def test_every_k_stands_over_its_datum_on_its_side_of_the_threshold():
    rng = np.random.default_rng(0)
    k = np.concatenate([rng.uniform(-0.2, 1.3, size=40), [np.inf, np.nan]])
    ids = np.arange(100, 142)
    dataset = xr.Dataset({"pareto_k": ("obs_id", k)}, {"obs_id": ids}, {"num_samples": 100})
    threshold = pareto_k_threshold(100)
    assert threshold == pytest.approx(0.5)
    ax = plot_pareto_k(dataset)
    below, above, infinite = (np.asarray(c.get_offsets()) for c in ax.collections)
    good, bad = k <= threshold, np.isfinite(k) & (k > threshold)
    np.testing.assert_allclose(below, np.stack([ids[good], k[good]], -1))
    np.testing.assert_allclose(above, np.stack([ids[bad], k[bad]], -1))
    np.testing.assert_array_equal(infinite[:, 0], [140, 141])
    assert (infinite[:, 1] > k[bad].max()).all() and (infinite[:, 1] <= ax.get_ylim()[1]).all()
    heights = sorted(line.get_ydata()[0] for line in ax.lines)
    np.testing.assert_allclose(heights, sorted([0.5, 0.7, 1.0, threshold]))
    for text in ax.texts:
        assert place_of(text) == float(text.get_text().split(":")[0])
    assert ax.get_title().startswith(f"{bad.sum() + 2} of 42 above 0.50")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("obs_id", "pareto k")


def test_the_bins_of_the_gap_hold_the_data_that_lie_in_them():
    rng = np.random.default_rng(0)
    parts = {
        "approximation_gap": rng.gamma(2.0, 0.1, size=200),
        "amortization_gap": np.append(rng.gamma(4.0, 0.2, size=199), np.inf),
    }
    ax = plot_gap(xr.Dataset({name: ("obs_id", value) for name, value in parts.items()}))
    for patch, value in zip(ax.patches, parts.values(), strict=True):
        xy = patch.get_xy()
        edges = np.unique(xy[:, 0])
        counts = xy[1 : 2 * len(edges) - 1 : 2, 1]  # up, across, up or down, across, ...
        finite = value[np.isfinite(value)]
        np.testing.assert_array_equal(counts, np.histogram(finite, edges)[0])
        assert counts.sum() == len(finite)
    lines = [line.get_xdata()[0] for line in ax.lines]
    assert lines == [pytest.approx(parts["approximation_gap"].mean()), 0.0]
    assert ax.get_legend().get_texts()[1].get_text().endswith("mean inf, 1 not finite")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("gap (nats per datum)", "data")


def draws(shift, seed):
    """2,000 draws of two latents, correlated by 0.8."""
    rng = np.random.default_rng(seed)
    a, noise = rng.normal(size=(2, 2000))
    return {"a": shift + a, "b": 2.0 * (0.8 * a + 0.6 * noise)}


def share_within(path, x, y):
    """Of the draws, inside of a contour that may have several parts."""
    inside = np.zeros(len(x), bool)
    for polygon in path.to_polygons():
        inside ^= matplotlib.path.Path(polygon).contains_points(np.stack([x, y], -1))
    return inside.mean()


def test_contours_of_a_guide_hold_their_share_of_its_own_draws():
    guides = {"near": draws(0.0, 0), "far": draws(5.0, 1)}
    panel = plot_guides(guides)[1, 0]
    for contours, own in zip(panel.collections, guides.values(), strict=True):
        outer, inner = contours.get_paths()
        # a kernel estimate is wider than the draws: regions hold no less, and a few hundredths more
        assert 0.88 < share_within(outer, own["a"], own["b"]) < 0.96
        assert 0.46 < share_within(inner, own["a"], own["b"]) < 0.60
        others = guides["far"] if own is guides["near"] else guides["near"]
        assert share_within(outer, others["a"], others["b"]) < 0.1
    marks = [line.get_xydata()[0] for line in panel.lines]
    means = [[own["a"].mean(), own["b"].mean()] for own in guides.values()]
    np.testing.assert_allclose(marks, means)


def test_panels_end_where_the_draws_end_that_reach_farthest():
    guides = {"near": draws(0.0, 0), "far": draws(5.0, 1)}
    panels = plot_guides(guides, draws(1.0, 2))
    low, high = panels[0, 0].get_xlim()
    assert low == pytest.approx(np.quantile(guides["near"]["a"], 0.005), abs=0.6) and low < -2.3
    assert high == pytest.approx(np.quantile(guides["far"]["a"], 0.995), abs=0.6) and high > 7.3
    assert panels[1, 0].get_xlim() == (low, high)
    assert panels[1, 0].get_ylim() == panels[1, 1].get_xlim()


def test_marginals_are_densities_with_their_mode_where_the_draws_are():
    guides = {"near": draws(0.0, 0), "far": draws(5.0, 1)}
    panel = plot_guides(guides)[0, 0]
    curves, marks = panel.lines[::2], panel.lines[1::2]
    for curve, mark, own in zip(curves, marks, guides.values(), strict=True):
        x, y = curve.get_xydata().T
        area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
        assert area == pytest.approx(1.0, abs=0.02)
        assert abs(x[y.argmax()] - own["a"].mean()) < 0.4
        assert mark.get_xdata()[0] == pytest.approx(own["a"].mean())
        assert mark.get_ydata()[0] == pytest.approx(y.max(), rel=0.1)
    assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > max(
        c.get_ydata().max() for c in curves
    )
