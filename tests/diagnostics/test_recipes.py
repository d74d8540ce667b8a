"""The one-line recipes of the module's docstring, each run on the ArviZ that it names."""

import importlib.metadata
import re
import warnings

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import Predictive

import pyro_flowkit.diagnostics as diagnostics
from pyro_flowkit.diagnostics import (
    from_svi,
    loo_approximate_posterior,
    reweight,
    simulation_based_calibration,
    to_arviz,
)

matplotlib.use("Agg")
ARVIZ = "1" if int(importlib.metadata.version("arviz").split(".")[0]) >= 1 else "0.23"
RECIPE = re.compile(r"^    (az\..+?)  # (0\.23 and 1|0\.23|1): \w", re.MULTILINE)
RECIPES = RECIPE.findall(diagnostics.__doc__)
X = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)
Y = 0.5 + 0.8 * X + torch.sin(30 * X)


def model(y=Y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
    with pyro.plate("row", len(X)):
        mean = beta[..., 0:1] + beta[..., 1:2] * X
        pyro.sample("y", dist.Normal(mean.reshape(*beta.shape[:-2], -1), 1.0), obs=y)


def guide(y=Y):
    design = torch.stack([torch.ones_like(X), X], -1)
    precision = design.T @ design + torch.eye(2, dtype=torch.float64) / 4
    loc = torch.linalg.solve(precision, design.T @ y)
    pyro.sample("beta", dist.MultivariateNormal(loc, precision_matrix=0.8 * precision))


def with_predictions(tree):
    draws = torch.as_tensor(tree["posterior"]["beta"].to_numpy()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = Predictive(model, {"beta": draws}, return_sites=["y"])(y=None)["y"]
    predictions = xr.Dataset(
        {"y": (("chain", "draw", "row"), y[None].numpy())}, tree["log_likelihood"].coords
    )
    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    return xr.DataTree.from_dict(groups | {"posterior_predictive": predictions})


@pytest.fixture(scope="module")
def names():
    import arviz

    tree = with_predictions(from_svi(model, guide, args=(Y,), num_samples=400, seed=0))
    sbc = simulation_based_calibration(model, guide, args=(Y,), num_simulations=30, seed=0)
    other = from_svi(model, guide, args=(Y,), num_samples=500, seed=1)
    return {
        **vars(diagnostics),
        **{"az": arviz, "tree": tree, "sbc": sbc},
        "elpds": {n: loo_approximate_posterior(t) for n, t in (("a", tree), ("b", other))},
        **{"data": to_arviz(tree), "corrected": to_arviz(reweight(tree, seed=0))},
    }


def test_every_line_of_the_docstring_is_a_recipe():
    lines = [line for line in diagnostics.__doc__.splitlines() if line.startswith("    az.")]
    assert len(lines) == len(RECIPES) > 10
    assert len(diagnostics.__doc__.split("::\n")) == 3


@pytest.mark.parametrize(
    "recipe", [recipe for recipe, versions in RECIPES if ARVIZ in versions.split(" and ")]
)
def test_recipes_run_as_they_stand(names, recipe):
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ArviZ and its dependencies about each other
        result = eval(recipe, names)
        assert result is not None
        if plt.get_fignums():
            plt.gcf().canvas.draw()
    plt.close("all")
