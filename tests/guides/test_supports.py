"""Guides map onto every support that real numbers can be mapped onto, tails included, and name the latent elsewhere."""

import itertools
import math
import pickle
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_flowkit import fit
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow
from pyro_flowkit.guides.bijections import smallest
from pyro_flowkit.guides.latent_density import LatentDensity
from pyro_flowkit.guides.supports import bijection_to

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


# Every support of the table in docs/supports.md: model, exact log evidence, range and number of points of a quadrature
# in unconstrained space for each dimension.
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


@pytest.mark.parametrize("name", WORKS)
def test_the_whole_mass_of_a_latent_can_be_reached_in_float32(name) -> None:
    model, exact, axes = WORKS[name]
    guide = AutoSplineFlow(model, **TINY).setup()
    assert guide._init_loc().dtype == torch.float32
    assert quadrature(guide, model, axes) == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("name", WORKS)
def test_a_plain_loop_trains_every_support(name) -> None:
    pyro.set_rng_seed(0)
    model, exact, _ = WORKS[name]
    guide = AutoSplineFlow(model, **TINY)
    # Pyro's LKJ cannot be expanded, and so not stand in a plate
    vectorized = name != "corr_matrix"
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < sum(losses[:20])
    # what a flow says of a draw is the density that Trace_ELBO has counted
    trace = poutine.trace(guide).get_trace()
    latent_site = trace.nodes[f"_{guide._pyro_name}_latent"]
    counted = latent_site["fn"].log_prob(latent_site["value"]) + trace.nodes["z"]["fn"].log_prob(
        trace.nodes["z"]["value"]
    )
    value = {"z": trace.nodes["z"]["value"].detach()}
    torch.testing.assert_close(guide.log_prob(value), counted, rtol=1e-3, atol=1e-3)


def sparse_dirichlet(concentration: float):
    def model() -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((4,), concentration)))
        counts = torch.tensor([5.0, 0.0, 3.0, 0.0])
        pyro.sample("y", dist.Multinomial(8, probs=theta), obs=counts)

    return model


def test_fit_finds_the_evidence_of_a_sparse_dirichlet_in_float32() -> None:
    prior = torch.full((4,), 0.1, dtype=torch.float64)
    posterior = prior + torch.tensor([5.0, 0.0, 3.0, 0.0])
    exact = math.log(56) + sum(
        sign * float(torch.lgamma(a).sum() - torch.lgamma(a.sum()))
        for sign, a in ((1, posterior), (-1, prior))
    )
    assert exact == pytest.approx(-4.908, abs=1e-3)
    pyro.set_rng_seed(0)
    model = sparse_dirichlet(0.1)
    guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[16])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such an edge is not worth a warning
        fit(model, guide, max_steps=150, num_particles=64, seed=0, progress=False)
        evidence = guide.evidence(num_samples=4000, seed=0)
    assert evidence.log_evidence == pytest.approx(exact, abs=0.05)
    assert guide.sample(1000)["theta"].min() < 1e-12


def test_a_tail_beyond_the_floats_is_said_with_the_name_of_the_latent() -> None:
    pyro.set_rng_seed(0)
    model = sparse_dirichlet(0.01)
    guide = AutoSplineFlow(model, **TINY, init_scale=30.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    said = pytest.warns(UserWarning, match="draws of 'theta' within the numbers .* float64")
    with said as record:
        for _ in range(200):
            assert math.isfinite(svi.step())
    assert len(record) == 1
    with pytest.warns(UserWarning, match="draws of 'theta' within the numbers"):
        guide.evidence(num_samples=100)


# The bijections


BIJECTIONS = {
    "positive": (constraints.positive, (3,)),
    "bounded below": (constraints.greater_than(2.0), (3,)),
    "bounded above": (constraints.less_than(torch.tensor([0.0, 1.0, -3.0])), (3,)),
    "interval": (constraints.interval(torch.tensor([-1.0, 0.0, 2.0]), 3.0), (3,)),
    "half open interval": (constraints.half_open_interval(-2.0, 0.0), (3,)),
    "simplex": (constraints.simplex, (4,)),
    "corr_cholesky": (constraints.corr_cholesky, (6,)),
    "corr_matrix": (constraints.corr_matrix, (6,)),
    "cat": (constraints.cat([constraints.positive, constraints.real], dim=0), (2,)),
    "stack": (constraints.stack([constraints.positive, constraints.real], dim=0), (2, 3)),
    "lower_cholesky": (constraints.lower_cholesky, (6,)),
    "positive_definite": (constraints.positive_definite, (6,)),
}
MATRICES = {"corr_cholesky": -1, "corr_matrix": -1, "lower_cholesky": 0, "positive_definite": 0}


@pytest.mark.parametrize("name", BIJECTIONS)
def test_log_det_is_that_of_the_jacobian(name) -> None:
    support, shape = BIJECTIONS[name]
    transform = bijection_to(support)
    x = torch.linspace(-1.0, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)

    def free(x: Tensor) -> Tensor:
        y = transform(x)
        if name == "simplex":
            return y[..., :-1]
        if name in MATRICES:
            rows, columns = torch.tril_indices(*y.shape[-2:], MATRICES[name])
            return y[rows, columns]
        return y

    jacobian = torch.autograd.functional.jacobian(free, x).reshape(x.numel(), x.numel())
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y).sum()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(transform.inv(y), x)
    assert transform.inverse_shape(y.shape) == x.shape
    assert bool(support.check(y).all())


@pytest.mark.parametrize("name", sorted(set(BIJECTIONS) - {"lower_cholesky", "positive_definite"}))
def test_bijections_are_pytorchs_functions(name) -> None:
    """So that NeuTra and guides of Pyro's, which go by its registry, mean the same by unconstrained values."""
    support, shape = BIJECTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(5, *shape, dtype=torch.float64)
    if name in ("cat", "stack"):
        x = x[0]
    ours, theirs = bijection_to(support), biject_to(support)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(
        ours.log_abs_det_jacobian(x, ours(x)), theirs.log_abs_det_jacobian(x, theirs(x))
    )


@pytest.mark.parametrize("name", ["simplex", "corr_cholesky", "interval at 0"])
def test_small_values_keep_their_digits_in_float32(name) -> None:
    support, x = {
        "simplex": (constraints.simplex, torch.tensor([-30.0, 20.0, -25.0])),
        "corr_cholesky": (constraints.corr_cholesky, torch.tensor([15.0, -20.0, 16.0])),
        "interval at 0": (constraints.unit_interval, torch.tensor([-70.0, -30.0])),
    }[name]
    transform = bijection_to(support)
    x.requires_grad_()
    y = transform(x)
    precise = transform(x.double())
    torch.testing.assert_close(y.double(), precise, rtol=1e-4, atol=0.0)
    log_det = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(
        log_det.double(), transform.log_abs_det_jacobian(x.double(), precise)
    )
    (gradient,) = torch.autograd.grad(y.clamp(min=smallest(y.dtype)).log().sum() + log_det.sum(), x)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(transform.inv(y.detach()), x.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "support", [constraints.positive, constraints.unit_interval, constraints.simplex]
)
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_values_stop_at_the_last_number_with_finite_gradients(support, far) -> None:
    transform = bijection_to(support)
    x = torch.full((2,), far, requires_grad=True)
    y = transform(x)
    density = 3.0 * y.log().sum() + transform.log_abs_det_jacobian(x, y).sum()
    (gradient,) = torch.autograd.grad(density, x)
    assert bool(density.isfinite()) and bool(gradient.isfinite().all())
    assert bool(support.check(y).all())
    assert bool(transform.at_edge(y).any())


# Around the guide


def test_the_tables_of_the_page_have_the_tested_supports() -> None:
    page = Path(__file__).parents[2] / "docs" / "supports.md"
    lines = page.read_text().splitlines()
    rows = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    tested = {name.partition(",")[0] for name in WORKS} - {"bounded above by 0"}
    assert rows - {"support"} == tested | set(REFUSED) | set(CHANGING)


@pytest.mark.parametrize("name", ["simplex", "simplex, sparse", "corr_cholesky", "unit interval"])
def test_nuts_in_the_coordinates_of_the_guide_has_its_values(name) -> None:
    model = WORKS[name][0]
    guide = AutoSplineFlow(model, **TINY).setup()
    neutra = NeuTraReparam(guide)
    with torch.no_grad():
        trace = poutine.trace(poutine.reparam(model, config=lambda _: neutra)).get_trace()
        latent = guide.get_transform()(trace.nodes["z_shared_latent"]["value"])
        (site, unconstrained), *_ = guide._unpack_latent(latent)
        own = bijection_to(site["fn"].support)(unconstrained)
    torch.testing.assert_close(trace.nodes["z"]["value"], own)


@pytest.mark.parametrize(
    "name", ["positive", "interval", "simplex", "corr_cholesky", "positive_definite"]
)
def test_a_fresh_guide_has_its_median_at_the_start(name) -> None:
    guide = AutoSplineFlow(WORKS[name][0], **TINY, init_loc_fn=init_to_median).setup()
    start = guide.prototype_trace.nodes["z"]["value"]
    torch.testing.assert_close(guide.median()["z"], start, rtol=1e-4, atol=1e-5)


LOCAL = {
    "positive": lambda: dist.Gamma(2.0, 1.0),
    "unit interval": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-1.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([0.3, 1.0, 2.0])),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        [dist.transforms.OrderedTransform()],
    ),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
    "positive_definite": lambda: dist.Wishart(torch.tensor(5.0), torch.eye(2)),
}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None])


@pytest.mark.parametrize("name", LOCAL)
def test_amortised_guide_trains_local_latents_of_every_support(name) -> None:
    pyro.set_rng_seed(0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=len(x)):
            z = pyro.sample("z", LOCAL[name]())
            first = z.reshape(len(x), -1)[:, 0] if z.dim() > 1 else z
            pyro.sample("x", dist.Normal(first, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 3)
    guide = AmortizedSplineFlow(model, Encoder(), context_dim=2, num_transforms=2, hidden_dims=[8])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
    assert all(math.isfinite(svi.step(x)) for _ in range(20))
    values = guide.median(x)["z"]
    fn = LOCAL[name]()
    assert values.shape == (3, *fn.event_shape)
    assert bool(fn.support.check(values).all())
    assert pickle.loads(pickle.dumps(guide)).median(x)["z"].equal(values)


def test_amortised_guide_reaches_small_components() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.full((3,), 0.1)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    x = torch.zeros(4)
    guide = AmortizedSplineFlow(model, Encoder(), context_dim=2, **TINY, init_scale=20.0)
    guide.setup(x)
    assert 0.0 < float(guide(x)["z"].detach().min()) < 1e-10


# Errors


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


@pytest.mark.parametrize("model", itertools.chain(*CHANGING.values()))
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
        pyro.sample("y", dist.Exponential(1.0), obs=z.detach() * 0 + 1.0)

    guide = AutoSplineFlow(model, **TINY).setup()
    axes = [(-15, 5, 200), (-20, 20, 200)]
    assert quadrature(guide, model, axes) == pytest.approx(-1.0, abs=2e-3)


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
