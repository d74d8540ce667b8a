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
# # Can I trust it? Weights, pareto k, missed modes, restarts, calibration
#
# **The question.** A guide always gives an answer, and its ELBO always a number. When is the answer the posterior? R-hat and effective sample sizes do not tell: a guide's draws are
# independent, whatever they are worth. This tutorial breaks four guides on purpose and looks at what notices. Two minutes of one core.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_flowkit import fit
from pyro_flowkit.diagnostics import (
    diagnose,
    evidence_bounds,
    from_svi,
    loo_approximate_posterior,
    pareto_k_threshold,
    probe_modes,
    psis,
    reweight,
    simulation_based_calibration,
)
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow

torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
FAST = os.environ.get("PYRO_FLOWKIT_FAST") == "1"  # a few steps only, to see that every cell runs
STEPS = 10 if FAST else 500
if FAST:
    warnings.simplefilter("ignore")  # guides that have learned nothing are warned of
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

# %% [markdown]
# ## 1. Weights
#
# For a draw z of the guide q, the weight is w = p(x, z) / q(z). If the guide is the posterior, all weights are equal. Their mean estimates p(x); so the mean of the log weights, the ELBO, falls
# short of log p(x) by as much as they differ. Here is a posterior that we know, a standard normal in five dimensions, and three normal guides that are too narrow.


# %%
def known():
    pyro.sample(
        "z", dist.Normal(torch.zeros(5), 1.0).to_event(1)
    )  # no data: the posterior is this, and log p(x) = 0


def normal_guide(width):
    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(5), width).to_event(1))

    return guide


figure, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained", sharey=True)
rows = {}
for ax, width in zip(axes, (0.98, 0.8, 0.5), strict=True):
    bounds = evidence_bounds(
        known,
        normal_guide(width),
        num_samples=4000,
        max_samples=4000,
        exact_log_evidence=0.0,
        seed=0,
    )
    torch.manual_seed(0)
    z = width * torch.randn(4000, 5)
    log_weights = (dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, width).log_prob(z)).sum(-1)
    _, k = psis(log_weights)
    ax.hist(log_weights.exp().clamp(max=8.0), bins=40, color="0.6")
    ax.set(
        title=f"width {width}: pareto k {float(k):.2f}",
        xlabel="weight (the last bin: 8 and more)",
        yscale="log",
    )
    rows[width] = {
        name: float(bounds[name]) for name in ("elbo", "log_evidence", "pareto_k", "ess")
    }
axes[0].set_ylabel("draws")
plt.show()
print(pd.DataFrame(rows).T.rename_axis("width").round(3).to_string())
print(f"the most that k may be at 4,000 draws: {pareto_k_threshold(4000):.2f}")

# %% [markdown]
# At 0.98 all is well. At 0.8 the weights have a tail, and smoothing them still gives the evidence. At 0.5 the largest weights have not been drawn yet: the *estimate* of the log evidence, which should be 0, falls
# short, and only k says so. The ELBO itself is right all the same: it is a mean of logarithms.
#
# `diagnose` reads these numbers, and says what to do:

# %%
for width in rows:
    print(
        f"width {width}: {diagnose(evidence_bounds(known, normal_guide(width), num_samples=4000, max_samples=4000, seed=0))}\n"
    )

# %% [markdown]
# ## 2. Repair by weights
#
# Where k allows it, `reweight` turns the guide's draws into posterior draws. Where it may not, it warns, and where it surely does not, it refuses.

# %%
for width in (0.8, 0.5):
    tree = from_svi(known, normal_guide(width), num_samples=4000, max_samples=4000, seed=0)
    before = float(tree["posterior"]["z"].std())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        after = float(reweight(tree, seed=0)["posterior"]["z"].std())
    print(f"width {width}: standard deviation {before:.2f} before, {after:.2f} after; exact 1")
    for warning in said:
        print(f"    {warning.message}")

# %% [markdown]
# ## 3. A mode that nobody visits
#
# The weights see only what is drawn. Let x be observed as x^2 = 4 with a small error: the posterior has two modes, at 2 and at -2.


# %%
def square():
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(x**2, 0.5), obs=torch.tensor(4.0))


pyro.set_rng_seed(0)
one = AutoSplineFlow(square, init_loc_fn=lambda site: torch.tensor(2.0))
with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # the fit warns that there is another mode: we act as if we had not read it
    fit(square, one, max_steps=STEPS, seed=0, progress=False)
tree = from_svi(
    square, one, num_samples=200 if FAST else 2000, max_samples=200 if FAST else None, seed=0
)
print("without a probe:", diagnose(tree))
print(
    "\nwith one:",
    diagnose(tree, probe=probe_modes(square, one, num_starts=2 if FAST else 24, seed=0)),
)

# %% [markdown]
# A mixture of two flows starts at both:

# %%
grid = torch.linspace(-3.0, 3.0, 601)
with torch.no_grad():
    density_of_one = one.log_prob({"x": grid}).exp()
pyro.clear_param_store()
two = AutoSplineFlow(square, num_components=2)
fit(square, two, max_steps=STEPS, seed=0, progress=False)
tree_two = from_svi(
    square, two, num_samples=200 if FAST else 2000, max_samples=200 if FAST else None, seed=0
)
print(diagnose(tree_two, probe=probe_modes(square, two, num_starts=2 if FAST else 24, seed=0)))
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
exact = dist.Normal(0.0, 3.0).log_prob(grid) + dist.Normal(grid**2, 0.5).log_prob(torch.tensor(4.0))
log_evidence = float(exact.logsumexp(0) + (grid[1] - grid[0]).log())
exact = (exact - log_evidence).exp()
ax.fill_between(grid, exact, color="0.85", label="exact")
with torch.no_grad():
    ax.plot(grid, density_of_one, "--", color="black", label="one flow")
    ax.plot(grid, two.log_prob({"x": grid}).exp(), "-", color="black", label="a mixture of two")
ax.set(xlabel="x", ylabel="density")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Restarts
#
# Did training end where it should? `restarts=3` begins at draws of the prior, too, and keeps the best. The evidences of the others say how much of the posterior is where they ended.

# %%
pyro.clear_param_store()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    result = fit(
        square, AutoSplineFlow(square), restarts=3, max_steps=STEPS, seed=0, progress=False
    )
for restart in result.restarts:
    print(
        f"start {restart.number}: ELBO {restart.elbo:.3f}, log evidence {restart.log_evidence:.3f}"
    )
print(f"all of the posterior: log evidence {log_evidence:.3f}")

# %% [markdown]
# Each mode has half of the mass, so each start's evidence is half of the whole: log 2 = 0.69 nats are missing, and no single start can know.
#
# ## 5. Which datum moves the posterior?
#
# Leave-one-out cross-validation, corrected for the guide: a k for every datum says whether the posterior without it can be had from the posterior with it. The last of these ten readings is an outlier.

# %%
readings = torch.tensor([0.1, -0.4, 0.3, 0.9, -0.2, 0.5, 0.0, -0.6, 0.4, 6.0])


def location(readings):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("readings", len(readings)):
        pyro.sample("y", dist.Normal(mu, 0.8), obs=readings)


pyro.clear_param_store()
guide = AutoNormal(location)  # exact here: the posterior is normal
fit(
    location,
    guide,
    args=(readings,),
    num_particles=128,
    max_steps=STEPS,
    lr=0.05,
    seed=0,
    progress=False,
)
tree = from_svi(
    location,
    guide,
    args=(readings,),
    num_samples=200 if FAST else 4000,
    max_samples=200 if FAST else None,
    seed=0,
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # said for the outlier, which is our point
    loo = loo_approximate_posterior(tree)
k = np.asarray(loo.pareto_k)
print("pareto k of each reading:", k.round(2).tolist())
print("the largest is that of reading", int(k.argmax()))

# %% [markdown]
# ## 6. Are the intervals as wide as they claim?
#
# An amortised guide answers for data it has not seen. Simulation-based calibration draws parameters from the prior, simulates data, and asks where the truth falls among the guide's draws: uniformly, if the
# intervals are honest.


# %%
def counts_model(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1).expand(-1, 5)).to_event(1), obs=x)


torch.manual_seed(0)
counts = dist.Poisson(dist.Gamma(2.0, 1.0).sample((500, 1)).expand(-1, 5)).sample()
encoder = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 8))
pyro.clear_param_store()
amortised = AmortizedSplineFlow(counts_model, encoder, context_dim=8)
fit(counts_model, amortised, args=(counts,), max_steps=2 * STEPS, lr=3e-3, seed=0, progress=False)
sbc = simulation_based_calibration(
    counts_model,
    amortised,
    args=(counts[:20],),
    num_simulations=4 if FAST else 40,
    num_samples=20 if FAST else 200,
    seed=0,
)
print(diagnose(sbc))

# %%
pit = sbc["prior_sbc"]["rate"].to_numpy().ravel()
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.hist(pit, bins=10, range=(0, 1), color="0.7")
ax.axhline(len(pit) / 10, color="black", linestyle=":", label="uniform")
ax.set(xlabel="rank of the truth among the draws", ylabel="simulated rows")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Exercise
#
# A guide of width 1.3 for the posterior of section 1 is too wide, not too narrow. What will k be: higher or lower than at 0.8? Guess, then run the cell.

# %%
bounds = evidence_bounds(known, normal_guide(1.3), num_samples=4000, max_samples=4000, seed=0)
print(f"pareto k {float(bounds['pareto_k']):.2f}, ESS {float(bounds['ess']):.0f} of 4,000")
print(diagnose(bounds))

# %% [markdown]
# **Answer.** Lower: a wide guide's weights are bounded, as it puts draws wherever the posterior has mass. It wastes some of them, so that the ESS falls, but nothing is hidden: too wide is the safe side to be wrong on.
#
# ## References
#
# - Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. Pareto smoothed importance sampling. JMLR 2024.
# - Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Yes, but did it work? Evaluating variational inference. ICML 2018.
# - Mans Magnusson, Michael Andersen, Johan Jonasson, Aki Vehtari. Bayesian leave-one-out cross-validation for large data. ICML 2019 (the correction for the guide).
# - Sean Talts, Michael Betancourt, Daniel Simpson, Aki Vehtari, Andrew Gelman. Validating Bayesian inference algorithms with simulation-based calibration. 2018.
