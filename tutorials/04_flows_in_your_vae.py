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
# # Flows in your VAE: prior, posterior, collapse, levels
#
# **The question.** You have a VAE of images in Pyro. Where in it is a flow worth its price: as the prior, as the posterior, or nowhere? And what goes wrong when one is put in
# carelessly? The answers are numbers on held-out images. Two to three minutes of one core.
#
# Tutorial 01 says what a flow and what a bound is.

# %%
import os
import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, pyro_method
from sklearn.datasets import load_digits
from torch import nn

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.diagnostics import (
    compare_densities,
    inference_gaps,
    latent_usage,
    plot_bounds,
    pointwise_bounds,
)

torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
FAST = os.environ.get("PYRO_FLOWKIT_FAST") == "1"  # a few steps only, to see that every cell runs
STEPS = 20 if FAST else 1000
SEED = 0  # of every training
SAMPLES = 20 if FAST else 300  # draws per image for the bounds
if FAST:
    warnings.simplefilter("ignore")  # VAEs that have learned nothing are warned of
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

# %% [markdown]
# ## The images, and their likelihood
#
# 1,797 handwritten digits come with scikit-learn. They were scanned as 32x32 points, black or white, and each pixel counts the black ones of a block of 4x4: an integer from 0 to 16. So the
# likelihood of a pixel is a binomial of 16 trials. It is discrete: log p(x) is at most 0, and nobody has to add noise to the pixels.

# %%
images = torch.as_tensor(load_digits().data).float()
images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
train, validation, test = images.split([1347, 150, 300])
if FAST:
    test = test[:20]

figure, axes = plt.subplots(1, 12, figsize=(9, 0.9), layout="constrained")
for ax, image in zip(axes, test, strict=False):
    ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
    ax.axis("off")
plt.show()


# %% [markdown]
# ## The VAE
#
# Two lines differ: the one that makes the prior, and the one that makes the posterior. The plain posterior is a normal whose location and scale are linear in features of the image; the flow posterior has those features for its context.


# %%
def mlp(*sizes):
    """Linear layers, each followed by SiLU and dropout."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers)


FLOW = {"num_transforms": 2, "hidden_dims": [32, 32]}


class Gaussian(nn.Module):
    """A diagonal normal whose location and scale are linear in features."""

    def __init__(self, features, size):
        super().__init__()
        self.heads = nn.Linear(features, 2 * size)

    def forward(self, features):
        loc, raw_scale = self.heads(features).chunk(2, dim=-1)
        return dist.Normal(loc, F.softplus(raw_scale) + 1e-3).to_event(1)


class Flow(nn.Module):
    """A flow whose context is linear in features."""

    def __init__(self, features, size, context=24):
        super().__init__()
        self.context = nn.Linear(features, context)
        self.flow = SplineFlow(size, context, **FLOW)

    def forward(self, features):
        return self.flow(self.context(features), path_gradient=True)


class VAE(PyroModule):
    def __init__(self, name, size, flow_prior=False, flow_posterior=False):
        super().__init__(name)
        self.size = size
        self.encoder = mlp(64, 192, 192)
        self.decoder = nn.Sequential(mlp(size, 192, 192), nn.Linear(192, 64))
        self.prior = SplineFlow(size, **FLOW) if flow_prior else None
        self.posterior = (Flow if flow_posterior else Gaussian)(192, size)

    def p_z(self):
        if self.prior is not None:
            return self.prior()
        return dist.Normal(torch.zeros(self.size), 1.0).to_event(1)

    def q_z(self, x):
        return self.posterior(self.encoder(x / 8 - 1))

    @pyro_method
    def model(self, x):
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.p_z())
            pyro.sample("x", dist.Binomial(16, logits=self.decoder(z)).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.q_z(x))


def train_vae(vae, **options):
    """The KL counts a tenth at first, and in full after 30 % of the steps; the best state on the validation images is kept."""
    return fit(
        vae.model,
        vae.guide,
        data=train,
        val_data=validation,
        batch_size=128,
        max_steps=STEPS,
        lr=3e-3,
        scheduler="cosine",
        clip_norm=10.0,
        seed=SEED,
        progress=False,
        **{"kl_schedule": (0.1, 0.3), **options},
    )


def difference(a, b, quantity):
    """Mean and standard error, over images, of the difference of two VAEs (nats per image)."""
    values = (a[quantity] - b[quantity]).to_numpy()
    values = values if values.ndim == 1 else values[:, -1]
    return f"{values.mean():+.2f} +- {values.std(ddof=1) / len(values) ** 0.5:.2f}"


# %% [markdown]
# ## A code of two numbers
#
# With two latents a code is a place on a map, and there is hardly room for ten digits. Four VAEs:

# %%
CONFIGURATIONS = {
    "plain": (False, False),
    "flow posterior": (False, True),
    "flow prior": (True, False),
    "both": (True, True),
}
vaes, bounds = {}, {}
for name, (flow_prior, flow_posterior) in CONFIGURATIONS.items():
    torch.manual_seed(SEED)
    vae = vaes[name] = VAE(f"small_{name.replace(' ', '_')}", 2, flow_prior, flow_posterior)
    train_vae(vae)
    bounds[name] = pointwise_bounds(vae.model, vae.guide, test, num_samples=SAMPLES, seed=0)

RUNG = int(bounds["plain"]["n_particles"][-1])  # the tightest of the bounds
table = compare_densities(bounds)
print(table[["kind", "nats", "se", "mc_se", "gap"]].round(2).to_string())
print("\nover the plain VAE, image by image (nats):")
for name in list(vaes)[1:]:
    print(
        f"  {name:15s} ELBO {difference(bounds[name], bounds['plain'], 'elbo')}, "
        f"IWAE-{RUNG} {difference(bounds[name], bounds['plain'], 'iwae')}"
    )
print(
    f"both over the flow prior: ELBO {difference(bounds['both'], bounds['flow prior'], 'elbo')}, "
    f"IWAE-{RUNG} {difference(bounds['both'], bounds['flow prior'], 'iwae')}"
)

# %%
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
plot_bounds(bounds, ax=ax)
plt.show()

# %% [markdown]
# The standard errors in the table are those of the images, which are alike for all four: some images are harder than others. In the differences, image by image, that cancels.
#
# A look at the map: the codes of the test images over the logarithm of the prior's density. Below, what the decoder makes of codes that are drawn from the prior.


# %%
def show_images(ax, rows, columns, images):
    """Images of 64 numbers from 0 to 16, row by row."""
    grid = F.pad(images.reshape(rows, columns, 8, 8), (1, 1, 1, 1))
    ax.imshow(
        grid.permute(0, 2, 1, 3).reshape(10 * rows, 10 * columns), cmap="gray_r", vmin=0, vmax=16
    )
    ax.axis("off")


figure, axes = plt.subplots(
    2, 4, figsize=(11, 4.6), layout="constrained", gridspec_kw={"height_ratios": [2, 1]}
)
for (above, below), (name, vae) in zip(axes.T, vaes.items(), strict=True):
    torch.manual_seed(1)
    with torch.no_grad():
        codes = vae.q_z(test).sample()
        low, high = codes.quantile(torch.tensor([0.01, 0.99]), 0) + torch.tensor([[-1.0], [1.0]])
        x, y = (torch.linspace(low[i], high[i], 161) for i in range(2))
        log_p = vae.p_z().log_prob(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1))
        drawn = 16 * vae.decoder(vae.p_z().sample((24,))).sigmoid()
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    above.imshow(log_p, origin="lower", extent=extent, aspect="auto", cmap="Greys", vmin=-9, vmax=0)
    above.scatter(*codes.T, s=3, color="tab:blue", alpha=0.7)
    above.set(title=name, xlabel="$z_1$", xlim=extent[:2], ylim=extent[2:])
    show_images(below, 3, 8, drawn)
axes[0, 0].set_ylabel("$z_2$")
plt.show()

# %% [markdown]
# The plain codes crowd the round prior and overflow it: whoever lies at its rim pays for the place. The flow prior goes where the codes are, and lets them spread out (mind the axes).
#
# One training each says little: another seed moves these differences by nats, more than the images do. With `SEED = 1` and `SEED = 2` in the place of 0 (ELBO over the plain VAE) the flow posterior buys +0.1 and +5.8, the flow prior +6.7 and +10.1, both +9.4 and
# +9.9. So the prior first; a flow posterior alone is nothing to count on, under a prior that bends it can be worth its price. `make demo` does this at length, with a code of sixteen numbers and another likelihood: there the prior buys 3.3 nats, the posterior 0.7.
#
# ## How much is there to win? Ask before you build
#
# `inference_gaps` takes the plain VAE apart: it optimises a normal posterior for each image by itself. What even that one misses is the *family's* part, which a flow could close. What the encoder's posterior is behind the best
# one is the *encoder's*.

# %%
gaps = inference_gaps(
    vaes["plain"].model,
    vaes["plain"].guide,
    test[: 3 if FAST else 40],
    num_samples=SAMPLES,
    num_steps=6 if FAST else 300,
    seed=0,
)
for part in ("approximation_gap", "amortization_gap"):
    values = gaps[part].to_numpy()
    print(f"{part:18s} {values.mean():.2f} +- {values.std(ddof=1) / len(values) ** 0.5:.2f} nats")

# %% [markdown]
# So hardly any of the plain VAE's gap is its family's: for this model, as it is, normal posteriors would do, and indeed the flow posterior alone bought nothing here. But beside the flow prior it bought some nats. That is no contradiction: a gap says what is lost between
# *a* model and its bound. The prior's training ends at another model, whose posteriors are less round; what is to be had there only training shows.
#
# ## Collapse
#
# Now twelve latents, and three posteriors: the normal one, the flow, and a flow that starts as one would write it without a thought: N(0, I), whatever the image.
#
# A `SplineFlow` is that as long as it is fresh. The first time that it is drawn with for training, and its context is the end of an encoder, it gives its location slopes: random directions of the context, by which half of the variance of the codes
# follows the image. Here the third one is told not to.


# %%
class FreshFlow(Flow):
    def __init__(self, features, size):
        super().__init__(features, size)
        self.flow.affine.starts_by_draws = False


large, large_bounds, usage = {}, {}, {}
for name, posterior in {
    "normal": Gaussian,
    "flow": Flow,
    "flow from N(0, I)": FreshFlow,
}.items():
    torch.manual_seed(SEED)
    vae = large[name] = VAE(f"large_{posterior.__name__}", 12)
    vae.posterior = posterior(192, 12)
    train_vae(vae)
    large_bounds[name] = pointwise_bounds(vae.model, vae.guide, test, num_samples=SAMPLES, seed=0)
    usage[name] = latent_usage(vae.model, vae.guide, test, num_samples=50, seed=0)
    print(
        f"{name:22s} ELBO {float(large_bounds[name]['elbo'].mean()):.2f}, KL {float(usage[name]['kl_total'].mean()):.1f}, "
        f"{int(usage[name]['active_directions'].sum())} of 12 directions in use"
    )
print(usage["flow from N(0, I)"].attrs["message"])

# %%
figure, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for (name, own), marker in zip(usage.items(), "os^", strict=True):
    ax.plot(range(1, 13), own["direction_explained"], marker=marker, linestyle=":", label=name)
ax.set(
    xlabel="direction of the code, in falling order",
    ylabel="share of its variance\nthat follows the image",
    ylim=(0, 1),
)
ax.legend(frameon=False, title="posterior", fontsize="small")
plt.show()

# %% [markdown]
# The third is more than 20 nats behind, and half of its directions are idle. Not for want of expression: it is the same flow. But in its first steps the codes are noise that says nothing of the image, so the decoder learns to do without them; what the encoder's end then has to say gets next to no
# gradient through slopes that are zero, and most directions never come back. The heads of the normal posterior are linear layers with random weights, which from the first step on depend on the image; so does the location of the second flow.
#
# A hundredth of the variance is enough, and more is not better: where a code of two numbers has its images is then fixed before the decoder has a say. Whatever your posterior is, look at `latent_usage` before you look at samples.
#
# ## Levels
#
# A flow given the level above is a prior, too: z2 for what is coarse, z1 given z2 for the rest. The posterior is drawn in the same order, q(z2 | x) q(z1 | z2, x).


# %%
class TwoLevels(VAE):
    def __init__(self, name):
        super().__init__(name, 12)
        self.top_prior = SplineFlow(2, **FLOW)
        self.down = nn.Sequential(nn.Linear(2, 32), nn.SiLU())
        self.low_prior = Flow(32, 12)
        self.top_posterior = Gaussian(192, 2)
        self.posterior = Gaussian(192 + 32, 12)

    @pyro_method
    def model(self, x):
        with pyro.plate("images", len(x)):
            z2 = pyro.sample("z2", self.top_prior())
            z1 = pyro.sample("z1", self.low_prior(self.down(z2)))
            pyro.sample("x", dist.Binomial(16, logits=self.decoder(z1)).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("images", len(x)):
            features = self.encoder(x / 8 - 1)
            z2 = pyro.sample("z2", self.top_posterior(features))
            down = self.down(z2)
            features = torch.cat([features.expand(*down.shape[:-1], -1), down], -1)
            pyro.sample("z1", self.posterior(features))


class FreeBits(Trace_ELBO):
    """The ELBO in which a KL of a level below 3 nats per image costs no less than 3 (Kingma et al. 2016)."""

    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss = -model_trace.nodes["x"]["log_prob_sum"]
        for level in ("z1", "z2"):
            q, p = guide_trace.nodes[level], model_trace.nodes[level]
            kl = q["log_prob_sum"] - p["log_prob_sum"]
            loss = loss + kl.clamp(min=3.0 * q["log_prob"].numel() * q["scale"])
        return float(loss.detach()), loss


levels = {}
for name, options in {
    "ELBO": {},
    "free bits": {"objective": FreeBits(), "kl_schedule": None},
}.items():
    torch.manual_seed(SEED)
    vae = levels[name] = TwoLevels(f"levels_{name.replace(' ', '_')}")
    train_vae(vae, **options)
    own = pointwise_bounds(vae.model, vae.guide, test, num_samples=SAMPLES, seed=0)
    used = latent_usage(vae.model, vae.guide, test, num_samples=50, seed=0)
    kl = {level: round(float(used["site_kl"].sel(site=level)), 2) for level in ("z1", "z2")}
    print(
        f"{name:10s} ELBO {float(own['elbo'].mean()):.2f} +- {float(own['elbo'].std()) / len(test) ** 0.5:.2f}, KL {kl}, less the flat normal one: {difference(own, large_bounds['normal'], 'elbo')}"
    )

# %%
vae = levels["free bits"]
torch.manual_seed(2)
with torch.no_grad():
    z2 = vae.top_prior().sample((6,))
    z1 = vae.low_prior(vae.down(z2)[:, None].expand(-1, 10, -1)).sample()
    drawn = 16 * vae.decoder(z1).sigmoid()
figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
show_images(ax, 6, 10, drawn)
plt.show()

# %% [markdown]
# Each row has one z2, and ten z1 drawn given it: the rows differ in what kind of digit there is, and within a row it varies. Trained by the ELBO alone z2 says next to nothing (a KL of 0.5 nats); free bits keep it in use, at a price of two nats. But *better* than the flat VAE the two
# levels are not: both bounds are below its own. On 1,347 images of 64 pixels there is no hierarchy to be had that twelve numbers do not hold already. `python -m models.hierarchical_vae --help` is a program for more data.
#
# ## Exercise
#
# Take the plain VAE with two latents as it is, draw the codes of the training images, and fit a flow to *them*. In the place of the standard normal, how much of what the flow prior bought does it buy? Guess, then run the cell.

# %%
plain = vaes["plain"]
torch.manual_seed(SEED)
with torch.no_grad():
    codes, held_out = plain.q_z(train).sample(), plain.q_z(validation).sample()
afterwards = SplineFlow(2, **FLOW)
fit(
    afterwards,
    data=codes,
    val_data=held_out,
    batch_size=128,
    max_steps=STEPS,
    lr=3e-3,
    scheduler="cosine",
    seed=SEED,
    progress=False,
)
plain.prior = afterwards
own = pointwise_bounds(plain.model, plain.guide, test, num_samples=SAMPLES, seed=0)
print(f"ELBO over the plain VAE: {difference(own, bounds['plain'], 'elbo')} nats")
print(
    f"that of the flow prior trained with the rest: {difference(bounds['flow prior'], bounds['plain'], 'elbo')}"
)

# %% [markdown]
# **Answer.** A fifth of it. The codes of the plain VAE were made for a round prior, by an encoder that was paid for keeping them near it; a flow over them afterwards recovers what it failed to do. The rest is what encoder and decoder do with the freedom, when the prior learns with
# them. (Twelve latents instead of two: try it. There is room in a code of twelve numbers, and the flows buy little.)
#
# ## References
#
# - Diederik P. Kingma, Max Welling. Auto-encoding variational Bayes. ICLR 2014.
# - Danilo Rezende, Shakir Mohamed. Variational inference with normalizing flows. ICML 2015 (flow posteriors).
# - Xi Chen et al. Variational lossy autoencoder. ICLR 2017 (flow priors; decoders that do without the code).
# - Samuel Bowman et al. Generating sentences from a continuous space. CoNLL 2016 (collapse, and raising the weight of the KL).
# - Diederik P. Kingma et al. Improved variational inference with inverse autoregressive flow. NeurIPS 2016 (free bits).
# - Chris Cremer, Xuechen Li, David Duvenaud. Inference suboptimality in variational autoencoders. ICML 2018 (the two gaps).
