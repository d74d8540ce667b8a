"""The density program: exact numbers on the scale that it says, and better than a Gaussian."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from models import density
from models._prepare import binary, dequantized, load
from models.density import Density, main
from pyro_flowkit import SplineFlow
from pyro_flowkit.training import fit


def test_a_short_run_beats_the_gaussian(capsys):
    result = main(
        ["two-moons", "--couplings", "2", "--steps", "60", "--standardize", "full", "--lr", "1e-2"]
    )
    assert result.nll < result.gaussian_nll - 0.3
    assert f"NLL {result.nll:.4f} nats" in capsys.readouterr().out
    assert result.bits_per_dim is None  # of points that are no images


def test_no_flow_beats_the_entropy_of_the_target():
    result = main(["checkerboard", "--fast", "--couplings", "2"])
    assert result.nll > math.log(8.0)


def test_images_are_scored_on_the_scale_of_their_levels(capsys):
    result = main(["--table", "digits", "--fast", "--couplings", "2"])
    assert result.bits_per_dim == pytest.approx(result.nll / (64 * math.log(2)))
    assert 2.0 < result.bits_per_dim < math.log2(17)  # better than uniform over 17 levels
    assert "bits per dimension" in capsys.readouterr().out


def test_a_table_from_a_file_with_a_picture(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 3)) * [1.0, 10.0, 0.1]
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    picture = tmp_path / "rows.png"
    result = main(
        [
            "--table",
            str(tmp_path / "rows.csv"),
            "--fast",
            "--couplings",
            "2",
            "--figure",
            str(picture),
        ]
    )
    # columns of standard deviation 1: a normal has 1.42 nats each
    assert result.nll == pytest.approx(3 * 1.419, abs=0.8)
    assert picture.stat().st_size > 10_000


def test_the_pyro_model_is_the_flow_scaled_up_to_the_data():
    flow, x = SplineFlow(2), torch.randn(5, 2)
    trace = poutine.trace(Density(flow, 50)).get_trace(x)
    assert trace.log_prob_sum().item() == pytest.approx(10 * flow.log_prob(x).sum().item())


def test_maximum_likelihood_of_the_flow_is_svi_of_the_model():
    x = torch.randn(64, 2)
    courses = []
    for wrap in (lambda flow: flow, lambda flow: Density(flow, 64)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program = wrap(SplineFlow(2, num_transforms=2))
        options = {"batch_size": 16, "seed": 0, "progress": False}
        courses.append(fit(program, data=x, max_steps=5, **options).history["elbo"])
    np.testing.assert_allclose(courses[0], courses[1], rtol=1e-4)


def test_target_and_table_exclude_each_other(capsys):
    for argv in ([], ["two-moons", "--table", "digits"]):
        with pytest.raises(SystemExit):
            main(argv)
        assert "expected a 2-D target or --table" in capsys.readouterr().err


def test_constant_columns_are_named():
    wine = load("wine")
    wine.train[:, 3] = 1.0
    with pytest.raises(ValueError, match=r"every column to vary, got constant columns \[3\]"):
        density.table_rows(wine, copies=1, seed=0)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(FileNotFoundError, match="digits, wine.*got 'nothing'"):
        load("nothing")


def test_noise_stays_in_its_cell_and_that_of_test_rows_is_drawn_once():
    digits = load("digits", rows=40)
    one, three = (dequantized(digits, copies=n, seed=1) for n in (1, 3))
    assert torch.equal(one.test, three.test) and torch.equal(one.val, three.val)
    assert torch.equal(three.train.floor(), digits.train.repeat(3, 1))
    assert not torch.equal(three.train[:40], three.train[40:80])
    with pytest.raises(ValueError, match="integer levels"):
        dequantized(replace(digits, levels=None))


def test_binary_pixels_are_the_upper_half_of_the_levels():
    digits = load("digits", rows=40)
    assert torch.equal(binary(digits).train, (digits.train >= 9).float())
