r"""Eight programs in the style of Pyro's own examples, for one guide to take the place of another.

They are what people have: models in the default dtype with their plates, masks and enumerated sites. A guide is put
into them by its class alone.

Where the model sums out its discrete sites (``TraceEnum_ELBO`` and ``infer={"enumerate": "parallel"}``), the guide is
over the rest of the model:

    guide = AutoSplineFlow(poutine.block(model, expose=["survival", "catch"]))           # or hide=[...], hide_fn=...
    svi = SVI(model, guide, optimizer, TraceEnum_ELBO())

Where the discrete sites have a guide, too, both are parts of a list:

    guide = AutoGuideList(model)
    guide.append(AutoSplineFlow(poutine.block(model, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    svi = SVI(model, guide, optimizer, TraceEnum_ELBO())

References:
    Bradley Efron, Carl Morris. Data Analysis Using Stein's Estimator and its Generalizations. JASA 1975 (the first 45
    times at bat of 18 players in 1970). All other data are simulated, from a fixed seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, init_to_value
from pyro.infer.reparam import DiscreteCosineReparam
from pyro.ops.indexing import Vindex
from torch import Tensor

AT_BATS = 45
HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)


@dataclass(frozen=True)
class Program:
    """A model with its data and what its user would choose for it.

    Attributes:
        model: a Pyro model.
        args: its arguments.
        latents: names of its continuous latents, where others are enumerated; None is all.
        discrete: name of the enumerated site that has a guide of its own beside the one to be changed.
        init_loc_fn: where the latents start; None is the guide's default.
    """

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    latents: tuple[str, ...] | None = None
    discrete: str | None = None
    init_loc_fn: Callable[..., Any] | None = None

    @property
    def is_enumerated(self) -> bool:
        """Whether the objective has to be ``TraceEnum_ELBO``."""
        return self.latents is not None or self.discrete is not None

    def guide(self, auto: Callable[..., Any]) -> Any:
        """The guide of the program with this class (or function of a model) for its continuous latents."""
        if self.init_loc_fn is not None:
            auto = partial(auto, init_loc_fn=self.init_loc_fn)
        if self.latents is not None:
            return auto(poutine.block(self.model, expose=list(self.latents)))
        if self.discrete is None:
            return auto(self.model)
        guide = AutoGuideList(self.model)
        guide.append(auto(poutine.block(self.model, hide=[self.discrete])))
        guide.append(AutoDiscreteParallel(poutine.block(self.model, expose=[self.discrete])))
        return guide

    def elbo(self, num_particles: int) -> ELBO:
        """The objective, vectorised over particles."""
        kind = TraceEnum_ELBO if self.is_enumerated else Trace_ELBO
        return kind(num_particles=num_particles, vectorize_particles=True)


def baseball(hits: Tensor) -> None:
    """Chances of 18 batters, partially pooled, with their log odds centred at the population's."""
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("players", len(hits)):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        pyro.sample("hits", dist.Binomial(AT_BATS, logits=alpha), obs=hits)


def capture_recapture(captures: Tensor) -> None:
    """Cormack-Jolly-Seber: who survives from year to year, enumerated; ``captures`` of shape ``(animals, years)``."""
    num_animals, num_years = captures.shape
    survival_loc = pyro.sample("survival_loc", dist.Normal(0.0, 1.5))
    survival_scale = pyro.sample("survival_scale", dist.HalfNormal(1.0))
    catch = pyro.sample("catch", dist.Uniform(0.0, 1.0))
    animals = pyro.plate("animals", num_animals, dim=-1)
    alive: Any = torch.ones(num_animals)
    caught = captures[:, 0].bool()  # an animal counts from its first capture on
    for t in pyro.markov(range(1, num_years)):
        survival = pyro.sample(f"survival_{t}", dist.Normal(survival_loc, survival_scale))
        with animals, poutine.mask(mask=caught):
            chance = torch.where(caught, survival.sigmoid() * alive, torch.ones(()))
            alive = pyro.sample(
                f"alive_{t}", dist.Bernoulli(chance), infer={"enumerate": "parallel"}
            )
            pyro.sample(f"captured_{t}", dist.Bernoulli(catch * alive), obs=captures[:, t])
        caught = caught | captures[:, t].bool()


def hidden_markov(sequences: Tensor) -> None:
    """Counts whose rate depends on a hidden state, enumerated; ``sequences`` of shape ``(sequences, times)``."""
    num_sequences, num_times = sequences.shape
    transition = pyro.sample("transition", dist.Dirichlet(2.0 * torch.eye(3) + 0.5).to_event(1))
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor([-1.0, 1.0, 2.5]), 0.7).to_event(1))
    rows = pyro.plate("sequences", num_sequences, dim=-1)
    state: Any = 0
    for t in pyro.markov(range(num_times)):
        with rows:
            state = pyro.sample(
                f"state_{t}",
                dist.Categorical(Vindex(transition)[..., state, :]),
                infer={"enumerate": "parallel"},
            )
            pyro.sample(f"count_{t}", dist.Poisson(Vindex(rate)[..., state]), obs=sequences[:, t])


def correlation(y: Tensor) -> None:
    """Covariance of the columns of ``y``: scales, and correlations under an LKJ prior."""
    size = y.shape[-1]
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(size)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(size, torch.tensor(1.0)))
    scale_tril = theta.sqrt().unsqueeze(-1) * factor
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(size), scale_tril=scale_tril), obs=y)


def sparse_regression(x: Tensor, y: Tensor) -> None:
    """Linear regression under the horseshoe prior, of which few of the columns of ``x`` matter."""
    size = x.shape[-1]
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(0.3))
    lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(size)).to_event(1))
    beta = pyro.sample("beta", dist.Normal(0.0, tau.unsqueeze(-1) * lam).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def mixture(y: Tensor) -> None:
    """Three Gaussians of one scale; which of them a row is from has a guide of its own, enumerated."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(Vindex(locs)[..., assignment.long()], scale), obs=y)


@poutine.reparam(config={"steps": DiscreteCosineReparam()})
def state_space(returns: Tensor) -> None:
    """Stochastic volatility: the log variance of returns is a random walk, with a latent for each of its steps.

    Frequencies in the place of the steps are almost independent of each other.
    """
    start = pyro.sample("start", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(-3.0, 1.0))
    steps = pyro.sample("steps", dist.Normal(0.0, 1.0).expand(returns.shape).to_event(1))
    log_variance = start.unsqueeze(-1) + scale.unsqueeze(-1) * steps.cumsum(-1)
    volatility = log_variance.mul(0.5).exp().clamp(1e-8, 1e8)
    pyro.sample("returns", dist.Normal(0.0, volatility).to_event(1), obs=returns)


def dirichlet_multinomial(counts: Tensor) -> None:
    """Shares of categories in groups, partially pooled; ``counts`` of shape ``(groups, categories)``."""
    num_groups, size = counts.shape
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 0.2))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(size)))
    with pyro.plate("groups", num_groups):
        shares = pyro.sample("shares", dist.Dirichlet(concentration.unsqueeze(-1) * share))
        total = int(counts[0].sum())
        pyro.sample("counts", dist.Multinomial(total, shares), obs=counts)


def programs() -> dict[str, Program]:
    """The programs by name, with their data."""
    draw = torch.Generator().manual_seed(0)
    years = range(1, 5)
    walk = torch.randn(1000, generator=draw).mul(0.1).cumsum(0)
    x = torch.randn(40, 10, generator=draw)
    noisy = x @ torch.tensor([3.0, -2.0, 1.0, *[0.0] * 7]) + torch.randn(40, generator=draw)
    factor = torch.tril(torch.randn(5, 5, generator=draw))
    return {
        "baseball": Program(baseball, (torch.tensor(HITS, dtype=torch.float),)),
        "capture-recapture": Program(
            capture_recapture,
            (simulate_captures(50, 5, draw),),
            latents=(
                "survival_loc",
                "survival_scale",
                "catch",
                *(f"survival_{t}" for t in years),
            ),
        ),
        "hidden Markov": Program(
            hidden_markov, (simulate_sequences(10, 6, draw),), latents=("transition", "rate")
        ),
        "correlation": Program(correlation, (torch.randn(12, 5, generator=draw) @ factor.mT,)),
        "sparse regression": Program(sparse_regression, (x, noisy)),
        "mixture": Program(
            mixture,
            (
                torch.cat(
                    [
                        loc + torch.randn(n, generator=draw)
                        for loc, n in ((-4.0, 4), (0.0, 8), (5.0, 6))
                    ]
                ),
            ),
            discrete="assignment",
            init_loc_fn=init_to_value(values={"locs": torch.tensor([-4.0, 0.0, 5.0])}),
        ),
        "state space": Program(
            state_space, (walk.mul(0.5).exp() * torch.randn(1000, generator=draw),)
        ),
        "Dirichlet-multinomial": Program(dirichlet_multinomial, (simulate_groups(8, draw),)),
    }


def simulate_captures(num_animals: int, num_years: int, draw: torch.Generator) -> Tensor:
    first = torch.randint(num_years - 1, (num_animals,), generator=draw)
    alive, rows = torch.ones(num_animals, dtype=torch.bool), []
    for t in range(num_years):
        chance = torch.rand(2, num_animals, generator=draw)
        alive = alive & ((t <= first) | (chance[0] < 0.6))
        rows.append((t == first) | ((t > first) & alive & (chance[1] < 0.7)))
    return torch.stack(rows, -1).float()


def simulate_sequences(num_sequences: int, num_times: int, draw: torch.Generator) -> Tensor:
    state, rows = torch.zeros(num_sequences, dtype=torch.long), []
    for _ in range(num_times):
        moves = torch.rand(num_sequences, generator=draw) < 0.3
        other = torch.randint(3, (num_sequences,), generator=draw)
        state = torch.where(moves, other, state)
        rows.append(torch.poisson(torch.tensor([0.5, 3.0, 10.0])[state], draw))
    return torch.stack(rows, -1)


def simulate_groups(num_groups: int, draw: torch.Generator) -> Tensor:
    logits = torch.tensor([1.0, 0.0, -1.0, -2.0]) + 0.7 * torch.randn(num_groups, 4, generator=draw)
    picks = torch.multinomial(logits.exp(), 20, replacement=True, generator=draw)
    return torch.nn.functional.one_hot(picks, 4).sum(1).float()
