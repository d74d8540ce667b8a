r"""Ten more programs in the style of Pyro's examples and tutorials, and all eighteen with data for quick steps.

Each has what its original has, in our words: the priors, the plates, what is enumerated, and where it starts. With the
eight of ``_drop_in.py``, whose data are cut down here, a training step takes a few milliseconds.

References:
    Donald B. Rubin. Estimation in Parallel Randomized Experiments. JES 1981 (the eight schools).
    Raj Agrawal, Jonathan H. Huggins, Brian Trippe, Tamara Broderick. The Kernel Interaction Trick: Fast Bayesian
    Discovery of Pairwise Interactions in High Dimensions. ICML 2019 (``kernel_regression``).
    Rajesh Ranganath, Linpeng Tang, Laurent Charlin, David M. Blei. Deep Exponential Families. AISTATS 2015
    (``gamma_def``).
    All data but those of the schools, the batters and the mixture are simulated, from a fixed seed.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import init_to_feasible, init_to_value
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from models import _drop_in as first
from models._drop_in import AT_BATS, HITS, Program
from models.eight_schools import EFFECTS, ERRORS

GRAVITY, LENGTH, SLOPE, TIMER_ERROR = (
    9.8,
    2.0,
    math.pi / 6,
    0.02,
)  # of the inclined plane, in SI units


class Bend(torch.distributions.transforms.Transform):
    """Bends an ellipse into a banana: ``(a u, v / a + b (u^2 + a^2))``, of volume one."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = a, b

    def _call(self, x: Tensor) -> Tensor:
        u, v = x.unbind(-1)
        return torch.stack([self.a * u, v / self.a + self.b * (u**2 + self.a**2)], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        u, v = y[..., 0] / self.a, y[..., 1]
        return torch.stack([u, self.a * (v - self.b * (u**2 + self.a**2))], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])


def banana() -> None:
    """A density to be learnt, without data: its log evidence is zero."""
    base = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    pyro.sample("x", dist.TransformedDistribution(base, [Bend(1.15, 1.0)]))


def inclined_plane(seconds: Tensor) -> None:
    """Friction of a box from the times of its slides."""
    friction = pyro.sample("friction", dist.Uniform(0.0, 1.0))
    pull = GRAVITY * (math.sin(SLOPE) - friction * math.cos(SLOPE))
    duration = (2 * LENGTH / pull.clamp(min=1e-6)).sqrt()  # a box that sticks takes for ever
    with pyro.plate("slides", len(seconds)):
        pyro.sample("seconds", dist.Normal(duration, TIMER_ERROR), obs=seconds)


class RuggedRegression(PyroModule):
    """Linear regression of log GDP on ruggedness, on being in Africa and on both, by ``PyroSample``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        weight, bias = self.linear.weight, self.linear.bias  # (..., 1, 3) and (..., 1)
        mean = (x @ weight.mT).squeeze(-1) + bias
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean.reshape(*sigma.shape[:-1], -1), sigma), obs=y)


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    """As in Pyro's example: the population is inside the plate, so every school has one of its own."""
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def baseball_beta(hits: Tensor) -> None:
    """Chances of 18 batters, partially pooled by a Beta with mean ``m`` and concentration ``kappa``."""
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(hits)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("hits", dist.Binomial(AT_BATS, phi), obs=hits)


def enumerated_mixture(y: Tensor) -> None:
    """Two Gaussians of one scale; which of them a row is from is summed out."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full([2], 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(y)):
        assignment = pyro.sample(
            "assignment", dist.Categorical(weights), infer={"enumerate": "parallel"}
        )
        pyro.sample("y", dist.Normal(Vindex(locs)[..., assignment], scale), obs=y)


def lkj(y: Tensor) -> None:
    """Variances of the columns of ``y`` and correlations under an LKJ prior."""
    size = y.shape[-1]
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(size)).to_event(1))
    factor = pyro.sample("L_omega", dist.LKJCholesky(size, torch.tensor(1.0)))
    scale_tril = theta.sqrt().diag_embed() @ factor
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(size), scale_tril=scale_tril), obs=y)


def kernel_regression(x: Tensor, y: Tensor) -> None:
    """Sparse quadratic regression as a Gaussian process: the coefficients are integrated out."""
    (rows, size), sparsity = x.shape, 2.0
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    phi = sigma * (sparsity / math.sqrt(rows)) / (size - sparsity)
    eta1 = pyro.sample("eta1", dist.HalfCauchy(phi))
    msq = pyro.sample("msq", dist.InverseGamma(3.0, 1.0))
    xisq = pyro.sample("xisq", dist.InverseGamma(3.0, 1.0))
    lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(size)).to_event(1))
    eta2 = eta1.square() * xisq.sqrt() / msq
    m, e = msq.unsqueeze(-1), eta1.unsqueeze(-1)
    scaled = (m.sqrt() * lam / (m + (e * lam).square()).sqrt()).unsqueeze(-2) * x
    product, squares = scaled @ scaled.mT, scaled.square() @ scaled.square().mT
    one, two = (eta.square()[..., None, None] for eta in (eta1, eta2))
    kernel = 0.5 * two * ((1.0 + product).square() - squares) + (one - two) * product
    kernel = kernel + (1.0 - 0.5 * two)
    noise = (sigma.square() + 1e-4)[..., None, None] * torch.eye(rows)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(rows), kernel + noise), obs=y)


def survival(captures: Tensor) -> None:
    """Cormack-Jolly-Seber with one chance to survive and one to be caught; ``captures`` ``(animals, years)``."""
    num_animals, num_years = captures.shape
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    caught = captures[:, 0].bool()  # an animal counts from its first capture on
    with pyro.plate("animals", num_animals, dim=-1):
        alive: Any = torch.ones(num_animals)
        for t in pyro.markov(range(1, num_years)):
            with poutine.mask(mask=caught):
                chance = torch.where(caught, phi * alive, torch.ones(()))
                alive = pyro.sample(
                    f"alive_{t}", dist.Bernoulli(chance), infer={"enumerate": "parallel"}
                )
                pyro.sample(f"captured_{t}", dist.Bernoulli(rho * alive), obs=captures[:, t])
            caught = caught | captures[:, t].bool()


def gamma_def(counts: Tensor) -> None:
    """A deep exponential family of sparse gammas over Poisson counts, of widths 4, 3 and 2."""
    shapes = {"top": (4, 3), "mid": (3, 2), "bottom": (2, counts.shape[-1])}
    w = {
        name: pyro.sample(f"w_{name}", dist.Gamma(0.1, 0.3).expand(shape).to_event(2))
        for name, shape in shapes.items()
    }
    with pyro.plate("rows", len(counts)):
        z = pyro.sample("z_top", dist.Gamma(0.1, 0.1).expand([4]).to_event(1))
        for name, above in (("mid", "top"), ("bottom", "mid")):
            mean = (z.unsqueeze(-2) @ w[above]).squeeze(-2)
            z = pyro.sample(f"z_{name}", dist.Gamma(0.1, 0.1 / mean).to_event(1))
        rate = (z.unsqueeze(-2) @ w["bottom"]).squeeze(-2)
        pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def small_programs() -> dict[str, Program]:
    """All eighteen programs by name, with small data; the simplest come first."""
    draw = torch.Generator().manual_seed(1)
    eight = first.programs()
    hits = torch.tensor(HITS, dtype=torch.float)
    slides = (2 * LENGTH / (GRAVITY * (math.sin(SLOPE) - 0.12 * math.cos(SLOPE)))) ** 0.5
    x = torch.randn(20, 8, generator=draw)
    interaction = x[:, 0] - 0.5 * x[:, 1] + x[:, 0] * x[:, 1]
    points = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    at_the_data = {
        "weights": torch.tensor([0.5, 0.5]),
        "scale": points.var() / 2,
        "locs": torch.tensor([1.0, 10.0]),
    }
    captures = first.simulate_captures(40, 3, draw)
    walk = torch.randn(60, generator=draw).mul(0.2).cumsum(0)
    return {
        "inclined plane": Program(
            inclined_plane, (slides + TIMER_ERROR * torch.randn(20, generator=draw),)
        ),
        "banana": Program(banana, ()),
        "eight schools": Program(eight_schools, (torch.tensor(ERRORS), torch.tensor(EFFECTS))),
        "baseball": Program(baseball_beta, (hits,)),
        "baseball, logit": eight["baseball"],
        "Bayesian regression": Program(RuggedRegression(), _terrain(draw)),
        "LKJ": Program(lkj, (torch.randn(100, 4, generator=draw),)),
        "correlation": eight["correlation"],
        "Dirichlet-multinomial": Program(
            first.dirichlet_multinomial, (first.simulate_groups(5, draw),)
        ),
        "horseshoe": eight["sparse regression"],
        "sparse regression": Program(
            kernel_regression, (x, interaction + 0.1 * torch.randn(20, generator=draw))
        ),
        "Gaussian mixture": Program(
            enumerated_mixture,
            (points,),
            latents=("weights", "scale", "locs"),
            init_loc_fn=init_to_value(values=at_the_data),
        ),
        "mixture, guide list": eight["mixture"],
        "state space": Program(
            first.state_space, (walk.mul(0.5).exp() * torch.randn(60, generator=draw),)
        ),
        "capture-recapture 1": Program(survival, (captures,), latents=("phi", "rho")),
        "capture-recapture, random": Program(
            first.capture_recapture,
            (captures,),
            latents=("survival_loc", "survival_scale", "catch", "survival_1", "survival_2"),
        ),
        "hidden Markov": Program(
            first.hidden_markov,
            (first.simulate_sequences(12, 3, draw),),
            latents=("transition", "rate"),
        ),
        "gamma DEF": Program(
            gamma_def, (_sparse_counts(5, 8, draw),), init_loc_fn=init_to_feasible
        ),
    }


def _terrain(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    rugged = torch.rand(60, generator=draw).mul(5.0)
    africa = (torch.rand(60, generator=draw) < 0.3).float()
    x = torch.stack([africa, rugged, africa * rugged], -1)
    noise = 0.9 * torch.randn(60, generator=draw)
    return x, 9.2 + x @ torch.tensor([-1.9, -0.2, 0.4]) + noise


def _sparse_counts(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Two patterns of columns, of which a row has one, the other, or both."""
    patterns = torch.stack([torch.arange(columns) < columns // 2, torch.arange(columns) % 3 == 0])
    strength = 4.0 * torch.rand(rows, 2, generator=draw)
    return torch.poisson(strength @ patterns.float() + 0.2, draw)
