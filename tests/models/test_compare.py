"""The main job in its fast mode: the table, the sentences, the picture, the file, the processes."""

import math
import pickle

import numpy as np
import pytest
import xarray as xr

from models._compare_jobs import GAUSSIAN, JOBS, SPLINE_FLOW, VAES, Settings, run, run_all, vae_name
from models._compare_report import difference, sentences
from models.compare import main

FLOW_WINS = "it wins"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return main(["--fast", "--output", str(tmp_path_factory.mktemp("output") / "new")])


def test_exact_values_and_bounds_are_told_apart(comparison):
    table = comparison.table
    assert list(dict.fromkeys(table.index.get_level_values(0))) == [job.name for job in JOBS]
    for name in (GAUSSIAN, SPLINE_FLOW):
        assert list(table.loc[name].index) == ["log p"]
        assert list(table.loc[name, "kind"]) == ["exact"]
    for job in VAES:
        own = table.loc[job.name]
        assert list(own.index) == ["ELBO", "IWAE-10"]
        assert set(own["kind"]) == {"lower bound"}
        assert own.loc["IWAE-10", "gap"] == pytest.approx(np.diff(own["nats"]).item())
        assert math.isnan(own.loc["ELBO", "gap"]) and own.loc["ELBO", "mc_se"] > 0
    np.testing.assert_allclose(table["bits_per_dim"], -table["nats"] / (64 * math.log(2)))


def test_even_a_rehearsal_of_the_flow_is_no_worse_than_the_gaussian(comparison):
    value, error = difference(comparison.scores, SPLINE_FLOW, GAUSSIAN)
    assert value > -2 * error


def test_there_are_three_sentences_with_the_numbers_of_the_table(comparison):
    assert len(comparison.text) == 3
    assert all(sentence.endswith(".") for sentence in comparison.text)
    assert not any(". " in sentence.replace("s.e. ", "") for sentence in comparison.text)
    value, _ = difference(comparison.scores, SPLINE_FLOW, GAUSSIAN)
    assert f"{abs(value):.1f} nats per image" in comparison.text[0]


def test_the_picture_and_the_file_are_there_and_open(comparison):
    import arviz
    from matplotlib.image import imread

    height, width, _ = imread(comparison.figure).shape
    assert height > 800 and width > 1200
    with xr.open_datatree(comparison.netcdf, engine="h5netcdf") as tree:
        for name, scores in comparison.scores.items():
            group = next(job.group for job in JOBS if job.name == name)
            key = "elbo" if "elbo" in scores else "log_prob"
            np.testing.assert_array_equal(tree[group][key], scores[key])
        assert tree["observed_data"]["x"].shape == (30, 64)
        assert tree["training_spline_flow"]["elbo"].sizes["step"] == 20
    opened = arviz.from_netcdf(str(comparison.netcdf))
    assert opened["spline_flow"]["log_prob"].sizes["obs_id"] == 30


def test_another_process_gives_the_same_numbers():
    [elsewhere] = run_all(Settings(fast=True), processes=2, jobs=JOBS[:1])
    here = pickle.loads(pickle.dumps(run(JOBS[0], Settings(fast=True))))
    np.testing.assert_allclose(elsewhere.scores["log_prob"], here.scores["log_prob"], rtol=1e-6)
    assert elsewhere.samples.shape == (20, 64)


def scores_of(flow_prior, standard_prior, spline_flow, spread=0.5):
    """Scores of 100 images around these means; differences vary by ``spread`` over images."""
    rng = np.random.default_rng(0)
    image = rng.normal(0.0, 5.0, 100)

    def exact(mean):
        return xr.Dataset({"log_prob": ("obs_id", mean + image + spread * rng.normal(size=100))})

    def bounds(mean):
        tightest = exact(mean)["log_prob"].to_numpy()
        ladder = np.stack([tightest - 2.0, tightest - 1.0, tightest], -1)
        coords = {"n_particles": [1, 10, 1000]}
        small = np.full_like(ladder, 0.1)
        return xr.Dataset(
            {
                "elbo": ("obs_id", ladder[:, 0]),
                "elbo_se": ("obs_id", small[:, 0]),
                "iwae": (("obs_id", "n_particles"), ladder),
                "iwae_se": (("obs_id", "n_particles"), small),
            },
            coords,
        )

    scores = {GAUSSIAN: exact(-130.0), SPLINE_FLOW: exact(spline_flow)}
    for job in VAES:
        scores[job.name] = bounds(flow_prior if job.prior == "flow" else standard_prior)
    return {
        k: v.assign_coords(obs_id=range(100)).assign_attrs(event_size=64) for k, v in scores.items()
    }


def test_the_flow_prior_wins_only_beyond_two_paired_standard_errors():
    assert FLOW_WINS in sentences(scores_of(-112.0, -114.0, -100.0))[1]
    for flow_prior in (-116.0, -114.0):
        text = sentences(scores_of(flow_prior, -114.0, -100.0, spread=3.0))[1]
        assert FLOW_WINS not in text and "does not exceed" in text


def test_a_difference_is_paired_and_has_a_sign():
    scores = scores_of(-112.0, -114.0, -100.0)
    flow, standard = vae_name("flow", "normal"), vae_name("standard", "normal")
    value, error = difference(scores, flow, standard)
    assert value == pytest.approx(2.0, abs=0.2) and error == pytest.approx(0.07, abs=0.02)
    assert difference(scores, standard, flow) == pytest.approx((-value, error))


def test_a_bound_settles_who_is_better_only_from_above():
    below = sentences(scores_of(-112.0, -114.0, -100.0))[2]
    assert "leaves open" in below and "no gap" in below
    above = sentences(scores_of(-90.0, -114.0, -100.0))[2]
    assert "is higher too" in above and "leaves open" not in above


def test_a_worse_flow_is_called_worse():
    text = sentences(scores_of(-112.0, -114.0, -140.0))[0]
    assert "worse" in text and "better" not in text
