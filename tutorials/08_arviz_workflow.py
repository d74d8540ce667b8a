# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A workflow with ArviZ: prior, fit, check, compare, keep
#
# **The question.** Twenty-one days of a plant that makes nitric acid; each day some ammonia is lost (Brownlee 1965). Which of the plant's settings drive the loss, and are some of the days unlike the others? You will go
# once around the Bayesian workflow, with a guide in the place of a sampler, and ArviZ for its tables and pictures. One minute of one core.
#
# It runs on ArviZ 0.23 and on ArviZ 1: `from_svi` returns an `xarray.DataTree`, which is what ArviZ 1 takes, and `to_arviz` turns it into an `InferenceData` where 0.23 is installed. Two pictures are asked for in other
# words in ArviZ 1; their cells say both.

# %%
import os
import tempfile
import warnings
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from pyro_flowkit import fit
from pyro_flowkit.diagnostics import (
    diagnose,
    from_svi,
    loo_approximate_posterior,
    plot_pareto_k,
    reweight,
    to_arviz,
)
from pyro_flowkit.guides import AutoSplineFlow

torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
torch.set_default_dtype(torch.float64)
FAST = os.environ.get("PYRO_FLOWKIT_FAST") == "1"  # a few steps only, to see that every cell runs
DRAWS = 200 if FAST else 4000
ARVIZ_1 = int(az.__version__.split(".")[0]) >= 1
warnings.filterwarnings("ignore", category=FutureWarning)  # of ArviZ, about its own future
if FAST:
    warnings.simplefilter("ignore")
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

# %% [markdown]
# ## The data
#
# Air flow, the temperature of the cooling water, the concentration of the acid, and the ammonia that was lost (tenths of a per cent). All standardised, so that a slope of one is one standard deviation of loss for one of the cause.

# %%
air = [80, 80, 75, 62, 62, 62, 62, 62, 58, 58, 58, 58, 58, 58, 50, 50, 50, 50, 50, 56, 70]
water = [27, 27, 25, 24, 22, 23, 24, 24, 23, 18, 18, 17, 18, 19, 18, 18, 19, 19, 20, 20, 20]
acid = [89, 88, 90, 87, 87, 87, 93, 93, 87, 80, 89, 88, 82, 93, 89, 86, 72, 79, 80, 82, 91]
loss = [42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15]
CAUSES = ["air", "water", "acid"]


def standardized(columns):
    table = torch.tensor(columns, dtype=torch.float64)
    return ((table - table.mean(-1, keepdim=True)) / table.std(-1, keepdim=True)).T


x, y = standardized([air, water, acid]), standardized([loss])[:, 0]
days = [f"day {i}" for i in range(1, 22)]

# %% [markdown]
# ## Two models
#
# They differ in what they think of a day that does not fit: a normal error has no room for it, Student's t with few degrees of freedom has.


# %%
def normal(x, y=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("day", len(x)):
        pyro.sample("loss", dist.Normal(x @ slope, sigma), obs=y)


def robust(x, y=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    freedom = pyro.sample("freedom", dist.Gamma(2.0, 0.1))
    with pyro.plate("day", len(x)):
        pyro.sample("loss", dist.StudentT(freedom, x @ slope, sigma), obs=y)


NAMES = {"coords": {"cause": CAUSES, "day": days}, "dims": {"slope": ["cause"]}}
trees = {}
for model in (normal, robust):
    pyro.clear_param_store()
    guide = AutoSplineFlow(model)
    result = fit(model, guide, args=(x, y), max_steps=10 if FAST else None, seed=0, progress=False)
    tree = from_svi(
        model,
        guide,
        args=(x, y),
        history=result,
        num_samples=DRAWS,
        max_samples=DRAWS if FAST else None,
        seed=0,
        **NAMES,
    )
    trees[model.__name__] = tree
    print(f"{model.__name__}: {diagnose(tree)}\n")

# %% [markdown]
# The tree has ArviZ's groups, and two of its own, `vi_trace` (the course of the training) and `vi_diagnostics`:

# %%
for name, group in trees["robust"].children.items():
    print(f"{name:21s} {', '.join(map(str, group.data_vars))}")

# %% [markdown]
# ## Before the data: what did the priors believe?
#
# A prior that has the plant lose ten standard deviations would be a mistake to find now. The tree has 500 draws of it.

# %%
prior = trees["robust"]["prior_predictive"]["loss"].to_numpy().ravel()
figure, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
ax.hist(prior.clip(-8, 8), bins=65, density=True, color="0.8", label="prior predictive")
ax.hist(y, bins=12, density=True, histtype="step", color="black", label="data")
ax.set(xlabel="loss (standard deviations; the ends: 8 and more)", ylabel="density")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The posterior: tables and intervals
#
# The draws are those of the guide. `reweight` turns them into draws of the posterior, where the verdict allows it. R-hat and ESS are left out (`kind="stats"`): draws of a guide are independent, and say nothing about it.

# %%
data = {name: to_arviz(tree) for name, tree in trees.items()}
corrected = {name: to_arviz(reweight(tree, seed=0)) for name, tree in trees.items()}
for name in data:
    print(name, "by the guide")
    print(az.summary(data[name], kind="stats").iloc[:, :4].to_string())
    print(name, "corrected by the weights")
    print(az.summary(corrected[name], kind="stats").iloc[:, :4].to_string(), "\n")

# %%
if ARVIZ_1:
    az.plot_forest(
        {"normal": corrected["normal"], "robust": corrected["robust"]}, var_names=["slope", "sigma"]
    )
else:
    az.plot_forest(
        [corrected["normal"], corrected["robust"]],
        model_names=["normal", "robust"],
        var_names=["slope", "sigma"],
        combined=True,
        figsize=(6, 3.4),
    )
    plt.xlim(-0.4, 1.4)  # room for the legend
plt.show()

# %% [markdown]
# ## Does it look like the data?

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ, about axes that it lays out itself
    if ARVIZ_1:
        az.plot_ppc_dist(corrected["robust"], num_samples=60)
    else:
        az.plot_ppc(corrected["robust"], num_pp_samples=60, figsize=(6, 3), random_seed=0)
plt.xlim(-4, 5)
plt.show()

# %% [markdown]
# ## Which model foretells a day that it has not seen?
#
# Leave-one-out cross-validation from the weights, corrected for the guide. The pareto k of each day says whether the posterior without that day can be had from the one with it.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # said of days that move the posterior: we look at them below
    elpds = {name: loo_approximate_posterior(tree) for name, tree in trees.items()}
    table = az.compare(elpds)
print(table.iloc[:, :6].to_string())

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for ax, (name, elpd) in zip(axes, elpds.items(), strict=True):
    k = xr.Dataset({"pareto_k": ("obs_id", elpd.pareto_k.to_numpy())}, attrs={"num_samples": DRAWS})
    plot_pareto_k(k.assign_coords(obs_id=range(1, 22)), ax=ax)
    ax.set(title=name, xlabel="day")
plt.show()
for name, elpd in elpds.items():
    worst = elpd.pareto_k.to_numpy().argsort()[::-1][:3]
    print(name, {days[i]: round(float(elpd.pareto_k[i]), 2) for i in worst})

# %% [markdown]
# The two models foretell equally well: their elpd differs by less than 0.2, with a standard error of 4 on each. But they hear the days differently. Under normal errors day 21 has a k above 0.7: it alone moves the posterior so far that
# the posterior without it cannot be had from these draws, and its share in the comparison is not to be relied on (fit again without that day, if it matters). Under Student's t no k is. (Statisticians have argued about
# the outliers of these twenty-one days for decades; day 21 is on most of their lists.)
#
# ## Keep it
#
# A netCDF file that both generations of ArviZ, and xarray alone, open:

# %%
path = Path(tempfile.mkdtemp()) / "robust.nc"
trees["robust"].to_netcdf(path)
with xr.open_datatree(path) as again:
    print(
        list(again.children),
        float(again["posterior"]["slope"].sel(cause="air").mean()).__round__(3),
    )

# %% [markdown]
# ## Exercise
#
# Fit the robust model with Pyro's `AutoNormal`. Its table of means and intervals looks as good as any. What tells that it is not?

# %%
pyro.clear_param_store()
guide = AutoNormal(robust)
fit(
    robust,
    guide,
    args=(x, y),
    num_particles=128,
    max_steps=10 if FAST else 1500,
    lr=0.02,
    seed=0,
    progress=False,
)
tree = from_svi(
    robust,
    guide,
    args=(x, y),
    num_samples=DRAWS,
    max_samples=DRAWS if FAST else None,
    seed=0,
    **NAMES,
)
print(az.summary(to_arviz(tree), kind="stats").iloc[:, :4].to_string())
print(diagnose(tree))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    elpd = loo_approximate_posterior(tree)
print(f"days whose pareto k is above 0.7: {int((elpd.pareto_k > 0.7).sum())} of 21")

# %% [markdown]
# **Answer.** Air and water rise together (the plant ran hot when it ran hard), so their slopes have a posterior that is narrow one way and wide the other. A guide without correlations has to be narrow both ways: its standard deviations of both slopes are
# little more than half of what they should be. Nothing in its table shows that. The verdict does, and so does leave-one-out, which is corrected for the guide: of the days whose k is above 0.7 under this guide, none is with the flow.
#
# ## References
#
# - K. A. Brownlee. Statistical theory and methodology in science and engineering. Wiley 1965 (the data).
# - Andrew Gelman et al. Bayesian workflow. 2020.
# - Aki Vehtari, Andrew Gelman, Jonah Gabry. Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC. Statistics and Computing 2017.
# - Mans Magnusson, Michael Andersen, Johan Jonasson, Aki Vehtari. Bayesian leave-one-out cross-validation for large data. ICML 2019 (the correction for the guide).
# - Ravin Kumar, Colin Carroll, Ari Hartikainen, Osvaldo Martin. ArviZ: a unified library for exploratory analysis of Bayesian models in Python. JOSS 2019.
