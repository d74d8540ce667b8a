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
# # The density of a table: missing values, categories, anomalies, conditionals
#
# **The question.** Which rows of this table are odd? Not which values: every value may be ordinary, and the row impossible. A density of whole rows answers that, and with it what
# one column may be given the others. Here is a table with all that makes real ones awkward, text, gaps, a column that is zero most of the time, drawn from a law that we know, so that every answer can be checked. One to two
# minutes of one core.

# %%
import math
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.tables import TableDensity, TableError

torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
FAST = os.environ.get("PYRO_FLOWKIT_FAST") == "1"  # a few steps only, to see that every cell runs
STEPS = 20 if FAST else 1500
if FAST:
    warnings.simplefilter("ignore")
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

# %% [markdown]
# ## The table
#
# Days of three solar roofs: the site, the temperature (°C), the rain (mm), and the energy that the roof gave (kWh). Temperatures have a winter and a summer; most days are dry; rain takes a part of the energy, and the eastern roof loses when it is hot.

# %%
SITES = ["east", "south", "west"]
SHARE = torch.tensor([0.5, 0.3, 0.2])


def law(site, temperature, rain):
    """Of the day's parts in their order, each given those before it; the site is a number."""
    season = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([4.0, 19.0]), 3.5)
    )
    dry = dist.Bernoulli(logits=0.4 + 0.05 * temperature)
    amount = dist.LogNormal(1.8 - 0.04 * temperature, 0.7)
    size = torch.tensor([20.0, 30.0, 25.0])[site] * (1 + 0.5 * torch.sin((temperature - 4) / 6))
    size = size * torch.where(site == 0, torch.sigmoid((22 - temperature) / 2), 1.0)
    energy = dist.LogNormal((size / (1 + rain / 4)).clamp(min=1.0).log(), 0.12)
    return season, dry, amount, energy


def draw(count, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        site = dist.Categorical(SHARE).sample((count,))
        nothing = torch.zeros(count)
        temperature = law(site, nothing, nothing)[0].sample((count,))
        _, dry, amount, _ = law(site, temperature, nothing)
        rain = torch.where(dry.sample() == 1, 0.0, amount.sample())
        energy = law(site, temperature, rain)[3].sample()
    columns = {"temperature": temperature, "rain": rain, "energy": energy}
    frame = pd.DataFrame({name: value.double().numpy() for name, value in columns.items()})
    frame.insert(0, "site", np.array(SITES)[site.numpy()])
    return frame


def true_log_prob(frame):
    """Of every row: nats; a probability for the site and for a dry day, a density for the rest."""
    site = torch.tensor([SITES.index(name) for name in frame["site"]])
    t, rain, y = (torch.tensor(frame[c].to_numpy()) for c in ("temperature", "rain", "energy"))
    season, dry, amount, energy = law(site, t, rain)
    wet = dry.log_prob(torch.zeros_like(t)) + amount.log_prob(rain.clamp(min=1e-9))
    of_rain = torch.where(rain == 0, dry.log_prob(torch.ones_like(t)), wet)
    return (SHARE[site].log() + season.log_prob(t) + of_rain + energy.log_prob(y)).numpy()


table, new = draw(4000, seed=0), draw(2000, seed=1)
lost = np.random.default_rng(0).random(len(table)) < 0.15
table.loc[lost, "temperature"] = np.nan  # the thermometer fails now and then
print(table.head(6).round(2).to_string())

# %% [markdown]
# ## What it will not take
#
# A density needs numbers. The messages say what to do:

# %%
try:
    TableDensity(table)
except TableError as error:
    print(error)

numbers = table.assign(site=pd.Categorical(table["site"], SITES).codes)
new_numbers = new.assign(site=pd.Categorical(new["site"], SITES).codes)
try:
    TableDensity(numbers)
except TableError as error:
    print(error)

# %% [markdown]
# A category is a number from now on. It is an integer of few values, so it counts by its *probability*; so do dry days; all else has a density. (Numbers have an order, which sites have not. With three
# values that does no harm; with thirty, condition on them: see below.) The rows with gaps may be left out, or be filled in from rows like them.

# %%
densities, scores = {}, {"the law itself": true_log_prob(new)}
for missing in ("drop", "impute"):
    density = densities[missing] = TableDensity(numbers, missing=missing).fit(steps=STEPS)
    scores[f"flow, {missing}"] = density.log_prob(new_numbers)
    print(f"{missing}: {density.verdict()}\n")

rows = {}
for name, own in scores.items():
    short = scores["the law itself"] - own
    rows[name] = {
        "log p per new row (nats)": own.mean(),
        "below the law": short.mean(),
        "s.e.": short.std(ddof=1) / len(short) ** 0.5,
    }
print(pd.DataFrame(rows).T.round(3).to_string())

# %% [markdown]
# No density can be above the law on average. The flows are 0.19 and 0.20 nats below it, which is what 4,000 rows did not teach them, and 1.8 nats above the Gaussian that they started from. Filling in made no difference
# that its standard error would show: the rows with gaps lack nothing but a thermometer that fails at random. Where values are missing *because* of what they are, neither way is right.
#
# ## Anomalies
#
# Somebody mixed up the labels of forty days: their energies went to each other's rows. Every value is one of a real day, so no column by itself can tell. Which score finds the rows?

# %%
mixed = new_numbers.copy()
places = np.random.default_rng(2).choice(len(new), 40, replace=False)
mixed.loc[places, "energy"] = np.roll(mixed.loc[places, "energy"].to_numpy(), 1)
is_mixed = np.isin(np.arange(len(new)), places)

columns = ["site", "temperature", "rain", "energy"]
values = mixed[columns].to_numpy(float)
complete = numbers.dropna()[columns].to_numpy(float)
away = values - complete.mean(0)
named = mixed.assign(site=np.array(SITES)[mixed["site"]])
odd = {
    "farthest column, in standard deviations": np.abs(away / complete.std(0)).max(1),
    "a Gaussian of all columns (Mahalanobis)": (
        away @ np.linalg.inv(np.cov(complete.T)) * away
    ).sum(1),
    "the flow": -densities["drop"].log_prob(mixed),
    "the law itself": -true_log_prob(named),
}
for name, score in odd.items():
    ranks = score.argsort().argsort()
    area = (ranks[is_mixed].mean() - (is_mixed.sum() - 1) / 2) / (~is_mixed).sum()
    found = is_mixed[score.argsort()[::-1][:40]].sum()
    print(f"{name:40s} area under the ROC curve {area:.3f}; {found} of the 40 among its first 40")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
dry = (mixed["rain"] == 0).to_numpy()
for ax, chosen, title in zip(axes, (dry, ~dry), ("dry days", "days with rain"), strict=True):
    own = chosen & ~is_mixed
    points = ax.scatter(
        mixed["temperature"][own],
        mixed["energy"][own],
        c=-odd["the flow"][own],
        s=6,
        cmap="viridis",
        vmin=-14,
        vmax=-4,
    )
    bad = chosen & is_mixed
    ax.scatter(
        mixed["temperature"][bad],
        mixed["energy"][bad],
        c=-odd["the flow"][bad],
        s=50,
        marker="D",
        edgecolor="red",
        cmap="viridis",
        vmin=-14,
        vmax=-4,
        label="mixed up",
    )
    ax.set(title=title, xlabel="temperature (°C)")
axes[0].set_ylabel("energy (kWh)")
axes[0].legend(frameon=False)
figure.colorbar(points, ax=axes, label="log p of the row (nats)", extend="both")
plt.show()

# %% [markdown]
# By themselves the columns know nothing, and a Gaussian little more than nothing, as the energy rises with the temperature, then falls. The flow comes near to what can be had: even with the law in hand only half of
# the mixed-up days stand out, since a day's energy often suits another day as well. Those that the flow scores lowest are where no ordinary day is: a dry, mild day with next to nothing, a wet one in frost with plenty.
#
# ## One column given the others
#
# *How much energy should this day have given?* There are two ways. A joint density knows all conditionals: along a line on which only the energy changes, it is proportional to p(energy | rest). Or one trains
# a flow for that conditional alone, with the rest as its context; then the rest needs no density, and a category is one column of 0 and 1 for each of its values.


# %%
def context_of(frame):
    """Site as three columns of 0 and 1, temperature, whether it is dry, and how much rain; shape (N, 6)."""
    parts = [
        *(frame["site"] == k for k in range(3)),
        frame["temperature"] / 10,
        frame["rain"] == 0,
        np.log1p(frame["rain"]),
    ]
    return torch.tensor(np.stack(parts, -1).astype(np.float32))


known = numbers.dropna()
energy = torch.tensor(known["energy"].to_numpy(np.float32))[:, None]
torch.manual_seed(0)
conditional = SplineFlow(1, 6, hidden_dims=[32, 32]).standardize(energy)
fit(
    conditional,
    data=(energy, context_of(known)),
    batch_size=256,
    max_steps=STEPS,
    val_fraction=0.1,
    scheduler="cosine",
    seed=0,
    progress=False,
)

GRID = np.linspace(0.25, 65.0, 20 if FAST else 260)


def along_the_energy(frame):
    """log p(energy | rest) of the joint density on GRID, for every row; shape (N, len(GRID))."""
    lines = frame.loc[frame.index.repeat(len(GRID))].assign(energy=np.tile(GRID, len(frame)))
    joint = densities["drop"].log_prob(lines).reshape(len(frame), -1)
    return joint - np.log(np.exp(joint).sum(1) * (GRID[1] - GRID[0]))[:, None]


few, few_named = new_numbers[:300], new[:300]
with torch.no_grad():
    own = torch.tensor(few["energy"].to_numpy(np.float32))[:, None]
    by_flow = conditional.log_prob(own, context_of(few)).numpy()
on_grid = along_the_energy(few)
by_joint = np.array(
    [np.interp(y, GRID, row) for y, row in zip(few["energy"], on_grid, strict=True)]
)
site, t, rain = (torch.tensor(few[c].to_numpy()).clone() for c in columns[:3])
by_law = law(site.long(), t, rain)[3].log_prob(torch.tensor(few["energy"].to_numpy())).numpy()
for name, found in {"joint": by_joint, "conditional": by_flow}.items():
    short = by_law - found
    print(
        f"{name:12s} log p(energy | rest) {found.mean():.3f} nats per row, {short.mean():.3f} +- "
        f"{short.std(ddof=1) / len(short) ** 0.5:.3f} below the law's {by_law.mean():.3f}"
    )

# %%
warm = np.linspace(-3, 28, 63)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for ax, mm in zip(axes, (0.0, 4.0), strict=True):
    days = pd.DataFrame({"site": 0, "temperature": warm, "rain": mm, "energy": 1.0})
    weight = np.exp(along_the_energy(days)) * (GRID[1] - GRID[0])
    share = weight.cumsum(1)
    low, high = (np.array([np.interp(q, row, GRID) for row in share]) for q in (0.05, 0.95))
    ax.fill_between(warm, low, high, color="0.8", label="joint density, 90 %")
    with torch.no_grad():
        torch.manual_seed(0)
        drawn = conditional.sample(2000, context_of(days))[..., 0]
        band = drawn.quantile(torch.tensor([0.05, 0.95]), 0)
    ax.plot(warm, band[0], "--", color="tab:blue", label="conditional flow, 90 %")
    ax.plot(warm, band[1], "--", color="tab:blue")
    t = torch.tensor(warm)
    exact = law(torch.zeros(len(t)).long(), t, torch.full_like(t, mm))[3]
    for sign in (-1.645, 1.645):
        ax.plot(
            warm,
            (exact.loc + sign * exact.scale).exp(),
            ":",
            color="black",
            label="the law, 90 %" if sign > 0 else None,
        )
    ax.set(
        title=f"eastern roof, {'dry' if mm == 0 else f'{mm:.0f} mm of rain'}",
        xlabel="temperature (°C)",
    )
axes[0].set_ylabel("energy (kWh)")
axes[1].legend(frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# Both know the hump, and that 4 mm of rain take half. The joint density's band is a little too wide; it has learned four columns from the same rows. The
# conditional flow spends all it has on one, and hugs the law. It cannot say whether the *other* columns are odd; that is what the joint density is for.
#
# ## Exercise
#
# The same table with temperatures in degrees Fahrenheit: does every row keep its log density, and do the odd rows stay the same? Guess, then run the cell.


# %%
def fahrenheit(frame):
    return frame.assign(temperature=1.8 * frame["temperature"] + 32)


american = TableDensity(fahrenheit(numbers), missing="drop").fit(steps=STEPS)
change = american.log_prob(fahrenheit(mixed)) + odd["the flow"]
print(
    f"log p changes by {change.mean():.3f} (its standard deviation over rows is {change.std():.3f})"
)
print(f"-log(1.8) is {-math.log(1.8):.3f}")
first = set((-american.log_prob(fahrenheit(mixed))).argsort()[::-1][:40])
print(
    f"{len(first & set(odd['the flow'].argsort()[::-1][:40]))} of the 40 oddest rows are the same"
)

# %% [markdown]
# **Answer.** Every row loses log 1.8 = 0.588 nats, and the order stays. A density is per unit: where a degree is smaller, there is less mass in each. So log densities of two tables are comparable only in the same units, and a log density has
# no natural zero; differences between rows, and between models of one table, have.
#
# The same from the command line: `pyro-flowkit fit table.csv -o run/`, `pyro-flowkit score run/ new.csv -o scores.csv`.
#
# ## References
#
# - George Papamakarios, Theo Pavlakou, Iain Murray. Masked autoregressive flow for density estimation. NeurIPS 2017 (flows for tables).
# - Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural spline flows. NeurIPS 2019.
# - Lucas Theis, Aäron van den Oord, Matthias Bethge. A note on the evaluation of generative models. ICLR 2016 (noise for integers).
# - Rebecca Andridge, Roderick Little. A review of hot deck imputation for survey non-response. International Statistical Review 2010.
