"""Models of one latent each, for every support, with their exact evidence."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import LatentDensity

TINY = {"num_transforms": 2, "hidden_dims": [8], "count_bins": 4}
HALF = dist.HalfNormal(1.0)
NORMAL = dist.Normal(0.0, 1.0)


def improper(support, event_shape=(), log_prob=None):
    """A model of one latent whose density is said by a factor."""

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(support, (), event_shape))
        if log_prob is not None:
            pyro.factor("density", log_prob(z))

    return model


def latent(prior):
    def model() -> None:
        pyro.sample("z", prior)

    return model


def rate(counts: float):
    """Beta(0.1, 1) with a binomial that saw no success."""

    def model() -> None:
        z = pyro.sample("z", dist.Beta(0.1, 1.0))
        pyro.sample("y", dist.Binomial(int(counts), probs=z), obs=torch.tensor(0.0))

    return model


DATA = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]])


def precision() -> None:
    z = pyro.sample("z", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), precision_matrix=z), obs=DATA)


def precision_evidence() -> float:
    """Wishart and normal are conjugate."""

    def normaliser(df: float, scale: Tensor) -> float:
        log_gamma = torch.mvlgamma(torch.tensor(df / 2), 2)
        return float(df * math.log(2) + df / 2 * torch.logdet(scale) + log_gamma)

    eye = torch.eye(2)
    posterior = normaliser(7.0, torch.linalg.inv(eye + DATA.T @ DATA))
    return posterior - normaliser(4.0, eye) - 3 * math.log(2 * math.pi)


def beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def simplex_counts() -> None:
    z = pyro.sample("z", dist.Dirichlet(torch.full((2,), 0.2)))
    pyro.sample("y", dist.Multinomial(4, probs=z), obs=torch.tensor([4.0, 0.0]))


# Every support of the table in docs/howto/supports.md: model, exact log evidence, range and number of points of a
# quadrature in unconstrained space for each dimension.
WORKS = {
    "real": (latent(dist.Normal(1.0, 2.0)), 0.0, [(-15, 15, 400)]),
    "positive": (latent(dist.Gamma(2.0, 1.0)), 0.0, [(-20, 6, 400)]),
    "positive, sparse": (latent(dist.Gamma(0.1, 1.0)), 0.0, [(-120, 6, 4000)]),
    "bounded below": (latent(dist.Pareto(1.0, 3.0)), 0.0, [(-20, 8, 400)]),
    "bounded above": (
        improper(constraints.less_than(2.0), (), lambda z: dist.Exponential(1.0).log_prob(2 - z)),
        0.0,
        [(-15, 5, 400)],
    ),
    "bounded above by 0": (
        improper(constraints.less_than(0.0), (), lambda z: dist.Gamma(0.1, 1.0).log_prob(-z)),
        0.0,
        [(-120, 6, 4000)],
    ),
    "interval": (latent(dist.Uniform(-1.0, 3.0)), 0.0, [(-20, 20, 400)]),
    "unit interval": (latent(dist.Beta(2.0, 3.0)), 0.0, [(-20, 20, 400)]),
    "unit interval, sparse at 0": (
        rate(5.0),
        beta(0.1, 6.0) - beta(0.1, 1.0),
        [(-120, 20, 4000)],
    ),
    "mixture": (
        latent(
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.LogNormal(torch.tensor([0.0, 1.0]), 1.0)
            )
        ),
        0.0,
        [(-10, 10, 400)],
    ),
    "simplex": (latent(dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]))), 0.0, [(-20, 20, 200)] * 2),
    "simplex, sparse": (
        simplex_counts,
        beta(4.2, 0.2) - beta(0.2, 0.2),
        [(-30, 100, 4000)],
    ),
    "independent": (
        improper(
            constraints.independent(constraints.positive, 1),
            (2,),
            lambda z: HALF.log_prob(z).sum(-1),
        ),
        0.0,
        [(-20, 3, 200)] * 2,
    ),
    "ordered": (
        improper(constraints.ordered_vector, (3,), lambda z: NORMAL.log_prob(z).sum(-1)),
        -math.log(6.0),
        [(-7, 7, 40), (-14, 3, 60), (-14, 3, 60)],
    ),
    "positive ordered": (
        improper(constraints.positive_ordered_vector, (2,), lambda z: HALF.log_prob(z).sum(-1)),
        -math.log(2.0),
        [(-15, 3, 150), (-12, 6, 400)],
    ),
    "corr_cholesky": (latent(dist.LKJCholesky(3, 0.5)), 0.0, [(-18, 18, 60)] * 3),
    "corr_matrix": (latent(dist.LKJ(3, 2.0)), 0.0, [(-3.2, 3.2, 24)] * 3),
    "lower_cholesky": (
        improper(
            constraints.lower_cholesky,
            (2, 2),
            lambda z: (
                NORMAL.log_prob(z[..., 1, 0]) + HALF.log_prob(z.diagonal(dim1=-2, dim2=-1)).sum(-1)
            ),
        ),
        0.0,
        [(-7, 7, 40), (-15, 3, 50), (-15, 3, 50)],
    ),
    "positive_definite": (precision, precision_evidence(), [(-5, 5, 24), (-4, 2, 24), (-4, 2, 24)]),
}


def quadrature(guide: AutoSplineFlow, model, axes) -> float:
    density = LatentDensity(model, guide)
    lines = [torch.linspace(low, high, count) for low, high, count in axes]
    points = torch.cartesian_prod(*lines).reshape(-1, len(axes))
    with torch.no_grad():
        values = density(points).double()
    steps = sum(math.log(float(line[1] - line[0])) for line in lines)
    return float(values.nan_to_num(nan=-math.inf).logsumexp(0)) + steps


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None])
