"""A support that guides cannot map onto is refused, with the name of the latent and the way out."""

import math
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow
from tests.guides.support_models import TINY, WORKS, Encoder, improper, quadrature


class Unnamed(dist.TorchDistribution):
    """A distribution whose author forgot the support."""

    arg_constraints = {}

    def __init__(self) -> None:
        super().__init__(validate_args=False)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.zeros(sample_shape)

    def log_prob(self, value):
        return torch.zeros_like(value)


SQUARE = dist.Normal(torch.zeros(2, 2), 1.0).to_event(2)
REFUSED = {
    "boolean": (dist.Bernoulli(0.5), "discrete sample site 'z'.*enumeration.html"),
    "integer": (dist.Poisson(2.0), "discrete sample site 'z'.*enumeration.html"),
    "one hot": (dist.OneHotCategorical(torch.ones(3)), "discrete sample site 'z'.*enumeration"),
    "sphere": (dist.ProjectedNormal(torch.ones(3)), "sample site 'z'.*ProjectedNormalReparam"),
    "unit_lower_cholesky": (
        dist.ImproperUniform(constraints.unit_lower_cholesky, (), (2, 2)),
        "mapped onto for 'z'.*sample real numbers.*hide=\\['z'\\]",
    ),
    "symmetric": (
        dist.ImproperUniform(constraints.symmetric, (), (2, 2)),
        "mapped onto for 'z'.*sample real numbers",
    ),
    "none": (Unnamed(), "support for 'z', got Unnamed, which has none"),
}


def guides(model):
    """Both guides, of the latent alone and of the latent in a plate of data."""

    def rows(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            model()

    encoder = Encoder()
    yield lambda: AutoSplineFlow(model, **TINY).setup()
    yield lambda: AmortizedSplineFlow(rows, encoder, context_dim=2, **TINY).setup(torch.zeros(3))


@pytest.mark.parametrize("name", REFUSED)
def test_a_support_that_cannot_be_mapped_onto_is_refused_by_name(name) -> None:
    prior, message = REFUSED[name]

    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", prior)

    setup, setup_amortised = guides(model)
    for refused in (setup, setup_amortised):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
            warnings.filterwarnings("ignore", ".*does not define `support`")  # as PyTorch says, too
            refused()


def uniform_below_another() -> None:
    high = pyro.sample("high", dist.Gamma(3.0, 1.0))
    pyro.sample("z", dist.Uniform(0.0, high))


def pareto_of_another() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Pareto(scale, 3.0))


def event_of_another() -> None:
    high = pyro.sample("high", dist.Gamma(3.0, 1.0))
    pyro.sample("z", dist.Uniform(torch.zeros(2), high.unsqueeze(-1)).to_event(1))


def learned_bound() -> None:
    high = pyro.param("high", torch.tensor(2.0))
    pyro.sample("z", dist.Uniform(0.0, high))


def random_bound() -> None:
    high = dist.Gamma(3.0, 1.0).sample()
    pyro.sample("z", dist.Uniform(0.0, high))


CHANGING = {
    "follows another latent": [uniform_below_another, pareto_of_another, event_of_another],
    "follows a parameter": [learned_bound],
    "follows random numbers": [random_bound],
}


@pytest.mark.parametrize("model", sum(CHANGING.values(), []))
def test_a_support_that_follows_something_else_is_refused_by_name(model) -> None:
    setup, setup_amortised = guides(model)
    message = "(?s)support of 'z' to be the same at every call.*z = low \\+ \\(high - low\\)"
    with pytest.raises(ValueError, match=message):
        setup()
    if model is not random_bound:
        with pytest.raises(ValueError, match=message):
            setup_amortised()


def test_a_support_that_follows_a_hidden_latent_is_refused_by_name() -> None:
    hidden = poutine.block(uniform_below_another, hide=["high"])
    with pytest.raises(ValueError, match="support of 'z' to be the same"):
        AutoSplineFlow(hidden, **TINY).setup()


def test_the_way_out_of_a_changing_support_has_the_exact_evidence() -> None:
    def model() -> None:
        high = pyro.sample("high", dist.Gamma(3.0, 1.0))
        z = pyro.deterministic("z", high * pyro.sample("z_unit", dist.Uniform(0.0, 1.0)))
        pyro.sample("y", dist.Exponential(1.0 / z), obs=torch.tensor(1.0))

    # of the integral over high * unit = z, whose density is that of Gamma(2, 1) / 2 + Exponential(1) / 2
    points = torch.linspace(-12.0, 6.0, 4000, dtype=torch.float64)
    z = points.exp()
    of_z = torch.logaddexp(
        dist.Gamma(2.0, 1.0).log_prob(z), dist.Exponential(1.0).log_prob(z)
    ) - math.log(2.0)
    terms = of_z + points + dist.Exponential(1.0 / z).log_prob(torch.ones_like(z))
    exact = float(terms.logsumexp(0)) + math.log(float(points[1] - points[0]))
    guide = AutoSplineFlow(model, **TINY).setup()
    axes = [(-12, 5, 200), (-20, 20, 200)]
    assert quadrature(guide, model, axes) == pytest.approx(exact, abs=2e-3)


def test_fixed_bounds_in_tensors_are_no_changing_support() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])

    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("bounds", 2):
            z = pyro.sample("z", dist.Uniform(low, high))
        pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=torch.tensor(3.0))

    draws = AutoSplineFlow(model, **TINY).setup().sample(50)["z"]
    assert bool(((draws > low) & (draws < high)).all())


def test_setup_leaves_the_random_numbers_of_the_caller_alone_for_the_check() -> None:
    def model(check: bool) -> None:
        high = torch.tensor(2.0) if check else 2.0
        fn = dist.Uniform(0.0, high) if check else dist.Beta(1.0, 1.0)
        pyro.sample("z", fn)

    states = []
    for check in (True, False):
        pyro.set_rng_seed(0)
        AutoSplineFlow(model, **TINY, init_loc_fn=lambda site: torch.tensor(0.5)).setup(check)
        states.append(torch.get_rng_state())
    assert states[0].equal(states[1])


def test_init_loc_fn_that_cannot_sample_is_told_of_the_latent() -> None:
    model = improper(constraints.positive)
    guide = AutoSplineFlow(model, **TINY, init_loc_fn=init_to_median)
    with pytest.raises(ValueError, match="init_loc_fn to give a value for 'z'.*init_to_value"):
        guide.setup()


def test_the_tables_of_the_page_have_the_tested_supports() -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "supports.md"
    lines = page.read_text().splitlines()
    rows = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    tested = {name.partition(",")[0] for name in WORKS} - {"bounded above by 0"}
    assert rows - {"support"} == tested | set(REFUSED) | set(CHANGING)
