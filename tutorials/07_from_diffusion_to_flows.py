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
# # From diffusion to flows: one network, a bound and an exact density
#
# **The question.** A diffusion model is taught in two ways. It is a *hierarchical VAE*: many levels of latents, an inference model that only adds noise, and an ELBO. And it is a *continuous normalizing
# flow*: an ordinary differential equation that carries noise into data, with an exact log-likelihood. Both are said of the same network. What is each number worth, and must the bound lie below the
# exact value? Two minutes of one core. `models` is a folder of the repository, not of the installed package: start Jupyter with the repository's path in `PYTHONPATH`.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch

from models import data
from models.diffusion import AngleField, Diffusion
from models.diffusion.bounds import elbo_terms
from models.diffusion.model import StraightFlow
from pyro_flowkit import ContinuousFlow, SplineFlow, fit
from pyro_flowkit.diagnostics import compare_densities, heldout_log_prob, pointwise_bounds

torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
FAST = os.environ.get("PYRO_FLOWKIT_FAST") == "1"  # a few steps only, to see that every cell runs
STEPS, ROWS, DRAWS = (20, 100, 30) if FAST else (4000, 1000, 100)
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

moons = data.target("two-moons", sizes=(200_000, 2_000, ROWS), seed=0)
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. A flow without couplings: learn the velocity
#
# A spline flow is a chain of a few invertible maps. Let the chain have infinitely many, each a small step: then $x$ moves along a velocity field,
#
# $$\frac{dx}{dt} = v(x, t), \qquad x(0) \sim N(0, I), \qquad \log p(x(1)) = \log N(x(0); 0, I) - \int_0^1 \mathrm{tr}\,\frac{\partial v}{\partial x}\,dt .$$
#
# Any network can be the velocity; nothing about it has to be invertible. And it can be learned without solving the equation: draw noise $z$, a datum $x$ and a time $t$, and ask the network at the point
# $(1-t) z + t x$ for the direction $x - z$. It cannot know which pair it was given; the mean over all that pass there is what it learns, and that mean carries the one distribution into the other. This
# is *flow matching*, and what `fit` does with a `ContinuousFlow`.

# %%
velocity = StraightFlow(
    AngleField(2, [64, 64])
)  # two residual blocks of 64 units; any module (x, t, context) will do
matched = ContinuousFlow(2, velocity=velocity).standardize(moons.train)
options = {"batch_size": 256, "lr": 2e-3, "scheduler": "cosine", "seed": 0, "progress": False}
result = fit(matched, data=moons.train, max_steps=STEPS, average=0.99, **options)
print(f"{STEPS} steps in {result.history['seconds'][-1]:.0f} s, no equation solved")


# %%
def picture(flow, title):
    """Draws of the base on their way, and the field."""
    torch.manual_seed(0)
    places = [torch.randn(1000, 2)]
    with torch.no_grad():
        for i in range(20):
            places.append(flow.ode.move(places[-1], None, i / 20, (i + 1) / 20))
    places = torch.stack(places).numpy()
    axis = torch.linspace(-2.5, 2.5, 15)
    grid = torch.cartesian_prod(axis, axis)
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
    for ax, moment in zip(axes, (0, 8, 14, 20), strict=True):
        with torch.no_grad():
            arrows = flow.ode.velocity(grid, torch.full((len(grid), 1), moment / 20))
        ax.quiver(*grid.T.numpy(), *arrows.T.numpy(), color="0.6", angles="xy", width=0.005)
        ax.scatter(*places[moment].T, s=2, color="tab:blue", alpha=0.5, linewidths=0)
        ax.plot(*places[: moment + 1, :10].transpose(2, 0, 1), color="tab:orange", linewidth=0.9)
        ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=(), yticks=())
        ax.set_title(f"t = {moment / 20:g}")
    figure.suptitle(title)
    plt.show()


picture(matched, "flow matching: straight lines, bent where they would cross")

# %% [markdown]
# The log-density of a test row is exact, up to the solver: 32 fixed steps, and `solver_error` says how far another 32 would move it.

# %%
scores = {"flow matching": heldout_log_prob(matched, moons.test)}
print(compare_densities(scores))

# %% [markdown]
# ## 2. Another path between noise and data: diffusion
#
# A diffusion mixes the two along a quarter of a circle instead of a straight line,
#
# $$z_\varphi = \cos\varphi \; x + \sin\varphi \; \varepsilon, \qquad 0 \le \varphi \le \pi/2,$$
#
# so that standardised data keep their variance at every angle (it is *variance preserving*). The derivative with respect to the angle is $v = \cos\varphi\,\varepsilon - \sin\varphi\,x$. A network
# $\hat v(z, \varphi)$ that is trained to predict it is a denoiser, too: the datum is $\hat x = \cos\varphi\,z - \sin\varphi\,\hat v$ and the noise $\hat\varepsilon = \sin\varphi\,z + \cos\varphi\,\hat v$,
# from which one gets the score, $-\hat\varepsilon / \sin\varphi$. Predicting the noise, the datum, the score or the velocity is one and the same, up to weights.
#
# Flow matching along this path *is* the training of a diffusion. So `Diffusion` is a `ContinuousFlow` with another `matching_loss`, and its equation, $dz/d\varphi = \hat v$, is what the literature
# calls the **probability-flow equation**.

# %%
diffusion = Diffusion(2, AngleField(2, [64, 64])).standardize(moons.train)
result = fit(diffusion, data=moons.train, max_steps=STEPS, average=0.99, **options)
print(f"{STEPS} steps in {result.history['seconds'][-1]:.0f} s")
picture(diffusion.eval(), "diffusion: the same end by another way")

# %% [markdown]
# ## 3. The same network as a hierarchical VAE
#
# Now cut the quarter circle into levels, $z_1$ (almost the datum) to $z_T$ (almost noise). The inference model adds noise and has no parameters. The generative model starts from $z_T \sim N(0, I)$ and goes
# down, $p(z_{t-1} \mid z_t) = q(z_{t-1} \mid z_t, x = \hat x(z_t))$: it uses what the network thinks the datum is. That is a Markovian hierarchical VAE with
#
# $$\log p(x) \ge \mathrm{E} \log p(x \mid z_1) - \sum_{t=2}^{T} \mathrm{E}\, \mathrm{KL}\big(q(z_{t-1} \mid z_t, x) \,\|\, p(z_{t-1} \mid z_t)\big) - \mathrm{KL}\big(q(z_T \mid x) \,\|\, N(0, I)\big),$$
#
# and every KL is a weighted squared error of $\hat x$. `diffusion.model` and `diffusion.guide` are ordinary Pyro programs with the sites `z1` to `zT`; every tool for VAEs works on them. Drawing the chains is slow,
# though. Each term depends on one level only, so `elbo_terms` draws that alone.
#
# With few levels a step is long, and the datum is not known as well as that formula pretends. `fit_scales` gives each step the variance that suits what the network misses.

# %%
diffusion.fit_scales(moons.val)
few = 5
drawn = pointwise_bounds(
    diffusion.model, diffusion.guide, moons.test, args=(few,), num_samples=DRAWS, seed=0
)
terms = elbo_terms(diffusion, moons.test, few, draws=100)
print(f"ELBO of {few} levels, chains drawn: {float(drawn['elbo'].mean()):.3f} nats")
print(f"ELBO of {few} levels, term by term: {float(terms.elbo.mean()):.3f} nats")
error = float(terms.mc_error.square().sum().sqrt() / ROWS)
other = float((drawn["elbo_se"] ** 2).sum() ** 0.5 / ROWS)
assert abs(float(terms.elbo.mean() - drawn["elbo"].mean())) < 5 * (error + other)

# %% [markdown]
# ## 4. The ladder
#
# The ELBO for more and more levels, its limit (the integral $\int \cot\varphi \, \lVert v - \hat v \rVert^2 d\varphi$ instead of the sum), and the exact log-density of the flow.

# %%
scores["diffusion as a flow"] = heldout_log_prob(diffusion, moons.test)
exact = torch.from_numpy(scores["diffusion as a flow"]["log_prob"].to_numpy())
limit = elbo_terms(diffusion, moons.test, None, draws=20)
ladder = []
for scales in ("fixed", "fitted"):
    for levels in (10, 30, 100, 300, None):
        found = limit
        if levels is not None:
            found = elbo_terms(
                diffusion,
                moons.test,
                levels,
                fitted_scales=scales == "fitted",
                draws=max(4, 4000 // levels),
            )
        apart = found.elbo - exact
        row = {"scales": scales, "levels": levels or "limit", "ELBO": float(found.elbo.mean())}
        error = float(apart.std() / len(apart) ** 0.5)
        ladder.append({**row, "less the flow": float(apart.mean()), "s.e.": error})
ladder = pd.DataFrame(ladder).set_index(["scales", "levels"])
print(ladder.round(3))

# %%
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
places = [10, 30, 100, 300, 1000]
for scales, marker, line in (("fixed", "s", "--"), ("fitted", "o", "-")):
    own = ladder.loc[scales]
    ax.errorbar(
        places,
        own["ELBO"],
        2 * own["s.e."],
        marker=marker,
        linestyle=line,
        label=f"ELBO, {scales} scales",
    )
ax.axhline(float(exact.mean()), color="black", linewidth=1, label="flow, log p")
ax.set_xscale("log")
ax.set_xticks(places, ["10", "30", "100", "300", "limit"])
ax.minorticks_off()
low = float(ladder.loc["fitted", "ELBO"].min())
ax.set_ylim(low - 0.5, float(exact.mean()) + 0.2)
ax.set(xlabel="levels", ylabel="nats per datum")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# What is lost with few levels is a matter of the steps, not of the network: the same network, asked at more places, gains nats without any training. What remains in the limit is what the network misses.
#
# ## 5. Is it a bound of the flow's density?
#
# No. The ELBO is a bound of $\log p(x)$ of *its own* model, the chain that draws noise anew at every level. The flow starts from the same noise and draws nothing on the way. If the score were exact, both would be the
# density of the data, and the limit of the ELBO would be exact, too. It never is. Then they are two models, and no theorem orders them.
#
# Here is a network with a bias: right for standard normal data, but its noise $\hat\varepsilon$ is off by $0.3 \sin\varphi$. The flow adds up what it is told, over the whole way; the chain forgets, as it draws new noise.


# %%
class Biased(torch.nn.Module):
    def forward(self, z, angle):
        return 0.3 * angle.tan().clamp(0.0, 100.0).expand_as(z)


biased = Diffusion(1, Biased(), num_steps=256)
x = torch.randn(ROWS, 1)
limit = elbo_terms(biased, x, None, draws=4).elbo
of_flow = biased.log_prob(x).detach()
apart = limit - of_flow
print(f"flow: {float(of_flow.mean()):.3f} nats; limit of the ELBO: {float(limit.mean()):.3f} nats")
print(
    f"the bound less the flow: {float(apart.mean()):+.3f} (s.e. {float(apart.std() / len(x) ** 0.5):.3f})"
)

# %% [markdown]
# ## 6. All on the same rows

# %%
spline = SplineFlow(2, num_transforms=6, hidden_dims=[64, 64]).standardize(moons.train, "full")
fit(
    spline,
    data=moons.train,
    max_steps=STEPS // 4,
    batch_size=256,
    lr=3e-3,
    scheduler="cosine",
    seed=0,
    progress=False,
)
scores["spline flow"] = heldout_log_prob(spline, moons.test)
scores["diffusion, 1000 levels"] = elbo_terms(diffusion, moons.test, 1000, draws=4).dataset(2)
table = compare_densities(scores)
print(table)

# %% [markdown]
# `python -m models.diffusion` does this with the digits, and the page on diffusion in the documentation has its table.
#
# ## Exercise
#
# The bound of 10 levels with fixed scales is some twenty nats too low. Which of its steps lose them: those near the data, where the network knows the datum almost, or those near the noise, where it knows
# nothing? Guess, then run the cell.

# %%
terms = elbo_terms(diffusion, moons.test, 10, fitted_scales=False, draws=100)
for signal, kl in zip(terms.log_snr[1:].tolist(), terms.steps.mean(0).tolist(), strict=True):
    print(f"step from log signal to noise {signal:6.2f}: {kl:8.3f} nats")

# %% [markdown]
# **Answer.** Those near the data. Half of $\mathrm{SNR}_{t-1} - \mathrm{SNR}_t$ weighs the squared error of $\hat x$, and where the noise is small, the error is that of the noise, in both dimensions, whatever the network knows: each step costs
# about $(e^{2.2} - 1)/2 = 4$ nats per dimension, where an integral along the way would cost 1.1. With fitted scales a step may be as wide as its error, which pays most of it back.
#
# ## References
#
# - Jascha Sohl-Dickstein, Eric Weiss, Niru Maheswaranathan, Surya Ganguli. Deep Unsupervised Learning using Nonequilibrium Thermodynamics. ICML 2015.
# - Yang Song, Jascha Sohl-Dickstein, Diederik P. Kingma, Abhishek Kumar, Stefano Ermon, Ben Poole. Score-Based Generative Modeling through Stochastic Differential Equations. ICLR 2021 (the probability-flow equation).
# - Diederik P. Kingma, Tim Salimans, Ben Poole, Jonathan Ho. Variational Diffusion Models. NeurIPS 2021 (the ELBO and its limit).
# - Yang Song, Conor Durkan, Iain Murray, Stefano Ermon. Maximum Likelihood Training of Score-Based Diffusion Models. NeurIPS 2021 (what the limit bounds).
# - Yaron Lipman, Ricky T. Q. Chen, Heli Ben-Hamu, Maximilian Nickel, Matt Le. Flow Matching for Generative Modeling. ICLR 2023.
# - Fan Bao, Chongxuan Li, Jun Zhu, Bo Zhang. Analytic-DPM. ICLR 2022 (the fitted scales).
