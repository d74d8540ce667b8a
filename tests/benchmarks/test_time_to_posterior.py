"""The posteriors of the benchmark are what they are said to be, and its clock reads right."""

import math

import pytest
import torch

from benchmarks._posteriors import for_budgets, populations, posteriors
from benchmarks.time_to_posterior import Course
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import LatentDensity


def test_populations_keep_what_lotka_and_volterra_keep():
    a, b, c, d = 0.55, 0.028, 0.8, 0.024
    kept = [
        d * u - c * math.log(u) + b * v - a * math.log(v)
        for u, v in populations((a, b, c, d), (33.0, 6.0))
    ]
    assert max(kept) - min(kept) < 1e-2
    assert max(kept) - min(kept) > 0


@pytest.mark.parametrize(
    "name",
    [
        "Gaussian process",
        "Lotka-Volterra",
        "Poisson, 6 predictors",
        "Poisson hierarchy",
        "horseshoe",
    ],
)
def test_posteriors_have_a_density_at_the_medians(name):
    posterior = (posteriors() | for_budgets())[name]
    guide = AutoSplineFlow(posterior.model).setup(*posterior.args)
    density = LatentDensity(posterior.model, guide, posterior.args, ways=("plate",))
    assert density(guide.affine.loc[None]).isfinite().all()
    assert density.obstacle is None


def test_time_is_that_of_the_first_elbo_that_is_large_enough():
    course = Course(seconds=[1.0, 2.0, 3.0], elbos=[-3.0, -1.0, -2.0])
    assert course.first(-1.5) == 2.0
    assert course.first(-0.5) is None
    assert Course(seconds=[1.0, 2.0], elbos=[1e8, -1.0]).first(-1.5) == 2.0, (
        "an overflow is no ELBO"
    )
    assert torch.tensor(course.end).isnan()
