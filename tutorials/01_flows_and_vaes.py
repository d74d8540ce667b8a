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
# # Flows and variational autoencoders: what is exact, what is a bound, and what a flow buys
#
# A variational autoencoder (VAE) never sees $\log p(x)$. It sees a lower bound, the ELBO, and its usual parts, a standard normal
# prior and a diagonal normal posterior, keep that bound loose. A normalizing flow has an exact density. This tutorial puts the two
# next to each other on data that fit into a picture:
#
# 1. the change of variables, in one dimension and in two;
# 2. an exact log-likelihood against a bound;
# 3. a flow as the *posterior* of a VAE, and a flow as its *prior*: what each of them changes.
#
# Everything runs in a few minutes on one core. All densities are in nats.

# %%
import math
import os
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import nn

import pyro_flowkit.transforms as T
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.diagnostics import (
    compare_densities,
    heldout_log_prob,
    plot_bounds,
    pointwise_bounds,
)

torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
FAST = os.environ.get("PYRO_FLOWKIT_FAST") == "1"  # a few steps only, to see that every cell runs
STEPS = 20 if FAST else 1000
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

# %% [markdown]
# ## 1. The base is a Gaussian. Why does that not matter?
#
# The usual complaint about a VAE is that its prior is a Gaussian. A flow starts from a Gaussian too: $z \sim N(0, 1)$. But it does not
# stay there. With an invertible map $x = f(z)$,
#
# $$\log p(x) = \log N(f^{-1}(x); 0, 1) + \log \left| \frac{d f^{-1}}{dx} \right|,$$
#
# so all that is Gaussian is the *name* of a point, not its density. The derivative says how much $f$ has stretched or squeezed the line
# around that point; that factor can turn one bump into two. Here is a map with eight bins, a monotonic rational-quadratic spline, and
# what it makes of a standard normal. We set by hand how high each bin is and how steep the map is where two bins meet; nothing has been trained.

# %%
spline = T.spline(1, count_bins=8, bound=4.0)
with torch.no_grad():
    # eight logits of the widths, all equal; eight of the heights; seven slopes, as softplus sees them
    heights = torch.tensor([0.74, 0.76, 0.85, 1.63, 1.63, 0.85, 0.76, 0.74])
    slopes = torch.tensor([0.75, 0.79, 0.95, 3.9, 0.95, 0.79, 0.75])
    spline.params[8:16] = heights.log()
    spline.params[16:] = slopes.expm1().log() - torch.tensor(1.0).expm1().log()

density = dist.TransformedDistribution(dist.Normal(torch.zeros(1), torch.ones(1)), [spline])
grid = torch.linspace(-4.5, 4.5, 2001).unsqueeze(-1)
with torch.no_grad():
    mapped = spline(grid)
    p = density.log_prob(grid)[:, 0].exp()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(grid, mapped, color="black")
left.plot(grid, grid, color="0.6", linestyle=":")
left.set(xlabel="z (base)", ylabel="x = f(z)", title="the map: identity outside of [-4, 4]")
right.plot(
    grid, dist.Normal(0.0, 1.0).log_prob(grid).exp(), color="0.6", linestyle="--", label="base"
)
right.plot(grid, p, color="black", label="after the map")
right.set(xlabel="x", ylabel="density", title="the density it makes")
right.legend(frameon=False)
plt.show()

print(f"integral of the density: {torch.trapezoid(p, grid[:, 0]).item():.4f}")
assert abs(torch.trapezoid(p, grid[:, 0]).item() - 1.0) < 1e-3

# %% [markdown]
# A steep piece of the map spreads mass thin, a flat piece piles it up: two bumps from one, and the integral is still one, because the
# log-derivative pays for every stretch. The small kinks in the density, the one in the middle for instance, are no fault of the drawing: the map and its slope are
# continuous where two bins meet, the slope's own slope is not.
#
# ### In two dimensions: a coupling
#
# A coupling keeps one half of the vector as it is, apart from a spline of its own, and lets a network read the parameters of the other half's
# splines from it. The Jacobian is triangular, so its determinant is a product of derivatives, and the map is inverted as cheaply as it is
# applied. A few couplings with a linear layer in between are a `SplineFlow`. A fresh one is the identity: its density *is* the base.
#
# We train one on two moons. `fit` with a flow and data is maximum likelihood.


# %%
def two_moons(n, seed):
    """Two interleaved half circles, scaled, plus noise of standard deviation 0.05; shape (n, 2)."""
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    moons = torch.stack([(x - 0.5) / 0.9, (y - 0.25) / 0.5], dim=-1)
    return moons + 0.05 * torch.randn(n, 2, generator=generator)


train, test = two_moons(5000, seed=0), two_moons(500, seed=1)

torch.manual_seed(0)
flow = SplineFlow(2, num_transforms=4, hidden_dims=[32, 32], bound=3.0)
settings = {"batch_size": 256, "max_steps": STEPS, "scheduler": "cosine", "progress": False}
fit(flow, data=train, lr=3e-3, seed=0, **settings)

# %%
axis = torch.linspace(-2.2, 2.2, 221)
plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
cell = (axis[1] - axis[0]) ** 2
with torch.no_grad():
    log_p = flow.log_prob(plane)
    lines = torch.linspace(-2.5, 2.5, 21)
    fine = torch.linspace(-2.5, 2.5, 301)
    transform = T.Compose(list(flow.layers))
    horizontal = transform(torch.stack(torch.meshgrid(fine, lines, indexing="xy"), dim=-1))
    vertical = transform(torch.stack(torch.meshgrid(lines, fine, indexing="xy"), dim=-1))

figure, axes = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained", sharex=True, sharey=True)
axes[0].scatter(*train[:1000].T, s=2, color="black")
axes[0].set(title="data", xlabel="$x_1$", ylabel="$x_2$", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
for row in horizontal:
    axes[1].plot(*row.T, color="0.35", linewidth=0.6)
for column in vertical.transpose(0, 1):
    axes[1].plot(*column.T, color="0.7", linewidth=0.6)
axes[1].set(title="a square grid of z, mapped", xlabel="$x_1$")
axes[2].imshow(log_p.exp(), origin="lower", extent=(-2.2, 2.2) * 2, cmap="Greys")
axes[2].set(title="density of the flow", xlabel="$x_1$")
plt.show()
print(f"integral of the flow's density over the picture: {(log_p.exp().sum() * cell).item():.3f}")

# %% [markdown]
# The grid shows how a round Gaussian becomes two moons: the plane is stretched where there are no data (cells grow) and pressed together
# where they are (cells shrink). It is never torn and never folded, since the map is continuous and invertible: between the moons there is a thin bridge.
# How many times larger a small cell has become is the absolute determinant of the Jacobian of $f$. The formula has that of $f^{-1}$, which is one over it: the density is
# the Gaussian at the point where the cell came from, divided by how much the cell has grown.
#
# The log-likelihood of held-out data is exact. The only uncertainty is that there are finitely many data:

# %%
exact = heldout_log_prob(flow, test)
values = exact["log_prob"]
print(
    f"exact log p(x): {values.mean().item():.3f} +- {(values.std(ddof=1) / len(values) ** 0.5).item():.3f} nats per datum"
)

# %% [markdown]
# ## 2. A VAE: a bound instead
#
# Now suppose that we only see the moons through a linear, noisy instrument: four readings $x = A z + \text{noise}$ of a hidden point $z$ on the
# moons. This is what a VAE is made for: a code $z$, a decoder that places a Gaussian around $d(z)$, and an encoder that proposes $q(z \mid x)$. Its
# likelihood is an integral over all codes,
#
# $$\log p(x) = \log \int p(x \mid z)\, p(z)\, dz \;\ge\; E_q\left[\log \frac{p(x \mid z)\, p(z)}{q(z \mid x)}\right] = \mathrm{ELBO},$$
#
# and the difference is exactly $\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))$: what the posterior's family cannot express costs nats. Averaging K importance
# weights inside of the logarithm (IWAE-K) gives a tighter bound, at K times the price.
#
# Both the prior and the posterior are single lines of the program, and a flow fits into each of them. That is all there is to it. The posterior takes
# the *path gradient*: of the ELBO's gradient it leaves out the term whose mean is zero, so that near the true posterior hardly any noise is left.
# The decoder is linear here, as the instrument is, so that everything which is not Gaussian has to come from the prior.

# %%
NOISE = 0.3
instrument = torch.tensor([[1.0, 0.2], [-0.4, 0.9], [0.7, 0.7], [0.3, -1.0]])


def readings(n, seed):
    """Four noisy linear readings of points on the moons; shape (n, 4)."""
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed + 100))
    return two_moons(n, seed) @ instrument.T + NOISE * noise


train, test = readings(5000, seed=0), readings(500, seed=1)


# %%
def mlp(*sizes):
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class VAE(PyroModule):
    def __init__(self, name, data_size, flow_prior, flow_posterior):
        super().__init__(name)
        self.data_size = data_size
        self.decoder = nn.Linear(2, 4)
        self.encoder = mlp(4, 32, 32, 16 if flow_posterior else 4)
        self.log_scale = nn.Parameter(torch.tensor(-0.5))
        settings = {"num_transforms": 3, "hidden_dims": [24, 24]}
        self.prior = SplineFlow(2, **settings) if flow_prior else None
        self.posterior = (
            SplineFlow(2, 16, base="conditional_normal", **settings) if flow_posterior else None
        )

    @pyro_method
    def model(self, x):
        with pyro.plate("data", max(self.data_size, len(x)), subsample=x):
            prior = (
                self.prior()
                if self.prior is not None
                else dist.Normal(torch.zeros(2), 1.0).to_event(1)
            )
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_scale.exp()).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", max(self.data_size, len(x)), subsample=x):
            hidden = self.encoder(x)
            if self.posterior is not None:
                pyro.sample("z", self.posterior(hidden, path_gradient=True))
            else:
                loc, log_scale = hidden.chunk(2, dim=-1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


CONFIGURATIONS = {
    "VAE": (False, False),
    "VAE, flow posterior": (False, True),
    "VAE, flow prior": (True, False),
    "VAE, both": (True, True),
}
vaes = {}
for name, (flow_prior, flow_posterior) in CONFIGURATIONS.items():
    torch.manual_seed(0)
    vaes[name] = VAE(
        name.replace(" ", "_").replace(",", ""), len(train), flow_prior, flow_posterior
    )
    result = fit(
        vaes[name].model,
        vaes[name].guide,
        data=train,
        lr=5e-3,
        seed=0,
        **settings,
    )
    print(
        f"{name:20s} ELBO on the last tenth of the training: {result.history['elbo'][-STEPS // 10 :].mean():.3f}"
    )

# %% [markdown]
# An exact density of the same data for comparison: a `SplineFlow` on the four readings. And `pointwise_bounds` evaluates the ladder of bounds for every test datum by itself, with the Monte-Carlo error of each rung.

# %%
torch.manual_seed(0)
flow = SplineFlow(4, num_transforms=4, hidden_dims=[32, 32]).standardize(train, "full")
fit(flow, data=train, lr=3e-3, seed=0, **settings)
exact = heldout_log_prob(flow, test)

SAMPLES = 100 if FAST else 1000
bounds = {
    name: pointwise_bounds(vae.model, vae.guide, test, num_samples=SAMPLES, seed=0)
    for name, vae in vaes.items()
}
table = compare_densities({"flow (exact)": exact, **bounds})
print(table[["kind", "nats", "se", "mc_se", "gap"]].round(3).to_string())

# %% [markdown]
# The column `se` is the standard error over the test data. It is large, as some data are rarer than others, whichever the model; and it is the same data on every rung. So the steps of a ladder are known far better than its rungs. Datum by datum:


# %%
def mean_and_se(values):
    """Over data."""
    return f"{float(values.mean()):7.4f} +- {float(values.std(ddof=1)) / len(values) ** 0.5:.4f}"


steps = {
    name: {
        f"IWAE-{k} - ELBO": mean_and_se(own["iwae"].sel(n_particles=k) - own["elbo"])
        for k in own["n_particles"].values[1:]
    }
    for name, own in bounds.items()
}
print(pd.DataFrame(steps).T.to_string())

# %%
figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
plot_bounds({"flow": exact, **bounds}, ax=ax)
plt.show()

# %% [markdown]
# Read the picture with care. Its error bars, smaller than the markers, are those of the draws. Each ladder climbs towards the exact $\log p(x)$ of *its own* model. The line across is the exact value of
# *another* model, the flow on the readings. A rung below the line does not tell whether that VAE is worse or merely less known.
#
# ### Here we can look behind the bound
#
# The code has two dimensions only, so the integral over $z$ can be done on a fine grid. With real VAEs nobody can; here it shows what the bounds
# were bounds of.


# %%
@torch.no_grad()
def log_p_by_quadrature(vae, x, half_width=7.0, points=701):
    """log p(x) of a VAE with a two-dimensional code, by the sum over a grid of codes; shape (len(x),)."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    codes = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2).float()
    if vae.prior is not None:
        log_prior = vae.prior().log_prob(codes)
    else:
        log_prior = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(codes)
    means = vae.decoder(codes)
    log_weight = 2 * math.log(axis[1] - axis[0])
    parts = []
    for chunk in x.split(50):
        log_x = dist.Normal(means, vae.log_scale.exp()).to_event(1).log_prob(chunk.unsqueeze(1))
        parts.append(torch.logsumexp((log_x + log_prior).double(), dim=-1) + log_weight)
    return torch.cat(parts)


rows = {}
for name, vae in vaes.items():
    true = log_p_by_quadrature(vae, test, points=101 if FAST else 701)
    elbo = torch.as_tensor(bounds[name]["elbo"].values)
    iwae = torch.as_tensor(bounds[name]["iwae"].isel(n_particles=-1).values)
    rows[name] = {
        "ELBO": elbo.mean().item(),
        f"IWAE-{SAMPLES}": iwae.mean().item(),
        "log p(x), quadrature": true.mean().item(),
        "log p(x) - ELBO": (true - elbo).mean().item(),
        "s.e.": (true - elbo).std().item() / len(true) ** 0.5,
    }
comparison = pd.DataFrame(rows).T
print(comparison.round(3).to_string())

# %% [markdown]
# ## 3. What the flow posterior changes, and what the flow prior changes
#
# log p(x) - ELBO is the price of the posterior's family, $\mathrm{KL}(q \,\|\, p(z \mid x))$, with its standard error over data; log p(x) is the quality of the model itself. They answer
# different questions:
#
# - A **flow posterior** lets $q(z \mid x)$ take the shape of the true posterior. The model class has not changed: what it can win is the difference.
# - A **flow prior** changes the model. The encoder may put the codes where the decoder likes them, and the prior follows; without it, the codes of
#   all data together have to look like one round Gaussian.
#
# The pictures below show the second point: the codes of the test data (dots) over the density of the prior (grey).

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained", sharex=True, sharey=True)
axis = torch.linspace(-4.5, 4.5, 181)
codes = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
    with torch.no_grad():
        prior = (
            vae.prior() if vae.prior is not None else dist.Normal(torch.zeros(2), 1.0).to_event(1)
        )
        ax.imshow(prior.log_prob(codes).exp(), origin="lower", extent=(-4.5, 4.5) * 2, cmap="Greys")
        trace = pyro.poutine.trace(vae.guide).get_trace(test)
    z = trace.nodes["z"]["value"]
    ax.scatter(*z.T, s=3, color="tab:blue", alpha=0.5)
    ax.set(title=name, xlabel="$z_1$")
axes[0].set(ylabel="$z_2$")
plt.show()

# %%
best = comparison["log p(x), quadrature"].idxmax()
tightest = comparison["log p(x) - ELBO"].idxmin()
print(f"highest exact log p(x) among the VAEs: {best}")
print(f"smallest distance from ELBO to log p(x): {tightest}")
worst = float((comparison[f"IWAE-{SAMPLES}"] - comparison["log p(x), quadrature"]).max())
print(
    f"largest IWAE-{SAMPLES} minus log p(x): {worst:.4f} nats (a bound: at most its Monte-Carlo error)"
)
assert np.isfinite(comparison.to_numpy()).all()

# %% [markdown]
# ## What to take away
#
# - A flow's log-likelihood and a VAE's ELBO are two kinds of number. `compare_densities` keeps them in one table with a column that says which is
#   which; a *gap* is always IWAE-K minus ELBO of one model, never a difference between two.
# - A small gap says that the bound is tight, not that the model is good; a good model can hide behind a loose bound.
# - A flow posterior and a flow prior are one line each in a Pyro program, and they are worth different things. Look at both columns.
#
# The same comparison on real images is `python -m models.compare`.
