"""Where a guide's training starts: the best Gaussian, found without noise, and never left for something worse."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.gaussian import Gaussian, best_gaussian
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.ops.quasi_random import normal_draws
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training import Callback

TINY = {"num_transforms": 2, "hidden_dims": [8], "count_bins": 4}
EYE = torch.eye(3, dtype=torch.float64)


def badly_scaled(points: Tensor) -> Tensor:
    """A Gaussian far from the origin with scales from 1e-4 to 1e3, strongly correlated."""
    scale = torch.tensor([[1e-4, 0.0, 0.0], [5.0, 0.1, 0.0], [900.0, -400.0, 1e3]]).double()
    loc = torch.tensor([3.0, -200.0, 5e3]).double()
    # far out a line search overflows: that is a density that is no number, as in a guide, and no error
    return dist.MultivariateNormal(loc, scale_tril=scale, validate_args=False).log_prob(points)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_best_gaussian_finds_a_badly_scaled_one(kind) -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    start = Gaussian(zeros, 0.1 * (EYE if kind == "full" else EYE.diagonal()))
    found = best_gaussian(badly_scaled, start)
    elbo = found.elbo(badly_scaled, normal_draws(512, zeros, seed=9))
    if kind == "full":
        assert abs(elbo) < 0.01, "log Z is 0, and the posterior is Gaussian"
    else:
        # the best mean field of a Gaussian has the diagonal of its precision
        precision = -torch.autograd.functional.hessian(lambda x: badly_scaled(x[None])[0], zeros)
        exact = 0.5 * (torch.linalg.slogdet(precision)[1] - precision.diagonal().log().sum())
        assert elbo == pytest.approx(float(exact), abs=0.02)


def test_a_mode_that_misleads_is_not_accepted() -> None:
    def spike(points: Tensor) -> Tensor:
        x = points[:, 0]
        narrow = dist.Normal(5.0, 1e-4).log_prob(x) + math.log(0.001)
        return torch.logaddexp(narrow, dist.Normal(0.0, 1.0).log_prob(x) + math.log(0.999))

    start = Gaussian(torch.tensor([4.99995]).double(), torch.tensor([0.5]).double())
    found = best_gaussian(spike, start)
    judges = normal_draws(512, start.loc, seed=9)
    assert found.elbo(spike, judges) > -0.1, "the spike holds a thousandth of the mass"


def test_density_that_overflows_is_not_an_error() -> None:
    def steep(points: Tensor) -> Tensor:
        return torch.where(points[:, 0] > 1.0, math.nan, -0.5 * points[:, 0].square())

    start = Gaussian(torch.zeros(1).double(), torch.full((1,), 0.1).double())
    found = best_gaussian(steep, start)
    assert math.isfinite(found.elbo(steep, normal_draws(64, start.loc, seed=9)))


def plates(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 2, dim=-2):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.deterministic("twice", 2 * mu)


def mixes_particles(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(float(mu), 1.0), obs=x.sum())


@pytest.mark.parametrize(("model", "vectorized"), [(plates, True), (mixes_particles, False)])
def test_latent_density_is_the_models_log_joint(model, vectorized) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    guide = AutoSplineFlow(model, **TINY).setup(x)
    density = LatentDensity(model, guide, (x,))
    assert (density.obstacle is None) == vectorized
    latent = torch.randn(4, guide.latent_dim)
    expected = []
    for row in latent:
        values, ladj = {}, 0.0
        for site, unconstrained in guide._unpack_latent(row):
            transform = biject_to(site["fn"].support)
            values[site["name"]] = transform(unconstrained)
            ladj += transform.log_abs_det_jacobian(unconstrained, values[site["name"]]).sum()
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
        expected.append(trace.log_prob_sum() + ladj)
    torch.testing.assert_close(density(latent), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_latent_density_names_a_latent_without_guide() -> None:
    def part(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    def whole(x: Tensor) -> None:
        part(x)
        pyro.sample("other", dist.Normal(0.0, 1.0))

    guide = AutoSplineFlow(part, **TINY).setup(torch.zeros(1))
    with pytest.raises(ValueError, match="every latent of the model, got none for 'other'"):
        LatentDensity(whole, guide, (torch.zeros(1),))(torch.zeros(2, 1))


def regression(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(x.new_zeros(x.shape[-1]), 1e3).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((b * x).sum(-1), 0.5), obs=y)


def elbo_of(model, guide, *args) -> float:
    latent, log_prob = guide.get_posterior().rsample_and_log_prob((4000,))
    with torch.no_grad():
        return float((LatentDensity(model, guide, args)(latent) - log_prob).mean())


def test_fit_reaches_a_badly_scaled_gaussian_posterior() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64) * torch.tensor([1.0, 3e3, 0.01, 50.0])
    x = x + torch.tensor([1.0, 2e4, 0.0, 1e3])
    y = x @ torch.tensor([5.0, 0.02, -3.0, 0.3], dtype=torch.float64) + 0.5 * torch.randn(40)
    hessian = x.mT @ x / 0.25 + torch.eye(4) / 1e6
    mode = torch.linalg.solve(hessian, x.mT @ y / 0.25)
    at_mode = poutine.trace(poutine.condition(regression, data={"b": mode})).get_trace(x, y)
    volume = 2 * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(hessian)[1]
    exact = float(at_mode.log_prob_sum() + volume)
    guide = AutoSplineFlow(regression, **TINY)
    fit(regression, guide, args=(x, y), max_steps=100, seed=0, progress=False)
    assert elbo_of(regression, guide, x, y) > exact - 0.05


def correlated() -> None:
    scale = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale))


def skewed() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0].square(), 0.3), obs=torch.tensor(0.0))


def bent_funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(3), (v / 2).exp()).to_event(1))
    pyro.sample("y", dist.StudentT(2.0, x.sum(-1), 1.0), obs=torch.tensor(3.0))


def test_the_search_goes_on_where_its_first_step_leaves_the_numbers() -> None:
    """The first step of L-BFGS has length one: here to where the density is infinite, and it ended there and then."""
    guide = AutoSplineFlow(bent_funnel, **TINY).setup()
    assert guide.find_start(bent_funnel) is not None
    assert guide.hierarchy is not None
    assert float(guide.hierarchy.conditioners[0].weight.detach().abs().max()) > 0.1
    assert elbo_of(bent_funnel, guide) > -3.6, "the best Gaussian is at -3.92"


@pytest.mark.parametrize(
    ("model", "is_said"), [(skewed, True), (bent_funnel, True), (correlated, False)]
)
def test_a_flow_that_ends_below_its_gaussian_is_taken_back(model, is_said, recwarn) -> None:
    """It is said where the posterior is no Gaussian, so that something was lost."""
    guide = AutoSplineFlow(model, **TINY).setup()
    start = guide.find_start(model)
    assert start is not None
    before = elbo_of(model, guide)
    perturb_(guide.flow, 1.0)
    assert elbo_of(model, guide) < before - 0.1
    assert not start.keep_better()
    said = [str(warning.message) for warning in recwarn]
    assert [("nats below the Gaussian that it started from" in one) for one in said] == [
        True
    ] * is_said
    assert elbo_of(model, guide) == pytest.approx(before, abs=0.1)


@pytest.mark.parametrize(
    ("shape", "loss", "is_said"),
    [
        (2.0, 0.1, True),  # the best Gaussian leaves 0.038 nats, about
        (2.0, 0.025, False),  # no loss that is worth a word
        (10.0, 0.1, False),  # the best Gaussian leaves 0.007 nats
    ],
)
def test_a_loss_is_said_from_a_twentieth_of_a_nat_on_unless_the_gaussian_is_all_but_exact(
    shape, loss, is_said, recwarn
) -> None:
    def model() -> None:
        pyro.sample("z", dist.Gamma(shape, 1.0))

    guide = AutoSplineFlow(model, **TINY).setup()
    start = guide.find_start(model)
    assert start is not None
    with torch.no_grad():
        before, _ = start._elbos(1)
        guide.affine.raw_loc.add_((2.0 * loss) ** 0.5 / guide.affine.rate)
        after, _ = start._elbos(1)
    assert float((before - after).mean()) == pytest.approx(loss, rel=0.25)
    assert not start.keep_better()
    said = [w for w in recwarn if "nats below the Gaussian" in str(w.message)]
    assert len(said) == is_said


def test_a_flow_with_a_small_gain_is_kept() -> None:
    """A gain far below a hundredth of a nat is a smaller spread of the weights all the same."""

    def model() -> None:
        pyro.sample("z", dist.SoftLaplace(0.0, 1.0))

    guide = AutoSplineFlow(model, **TINY)
    fit(model, guide, max_steps=300, seed=0, progress=False)
    trained = guide.evidence(seed=1)
    assert trained.elbo > -0.01
    with torch.no_grad():
        x = guide.flow.layers[0](torch.tensor([[1.0], [3.0]]))
    assert float((x - torch.tensor([[1.0], [3.0]])).abs().max()) > 1e-3, "the flow is there"


def test_each_part_of_the_guide_has_its_rate_unless_the_caller_gives_one() -> None:
    def model():
        v = pyro.sample("v", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(()), v.exp()))

    guide = AutoSplineFlow(model, **TINY)
    seen = []

    class Look(Callback):
        def on_step(self, state):
            seen.append(
                [(len(group["params"]), group["lr"]) for group in state.optimizer.param_groups]
            )

    settings = {"max_steps": 2, "scheduler": "constant", "callbacks": [Look()], "progress": False}
    fit(model, guide, **settings)
    recipe = guide.recipe()
    parts = [guide.flow, guide.affine, guide.hierarchy]
    rates = [recipe.lr, *(rate for _, rate in guide.parameter_groups())]
    for step in (0, 1):
        share = (step + 1) / (recipe.warmup_steps + 1)
        assert [count for count, _ in seen[step]] == [len(list(p.parameters())) for p in parts]
        assert [lr for _, lr in seen[step]] == pytest.approx([share * rate for rate in rates])
    fit(model, guide, lr=0.01, **settings)
    assert [lr for _, lr in seen[-1]] == [0.01]


def test_the_first_steps_keep_what_the_start_has_found() -> None:
    """Adam's first step moves every parameter by the whole rate; without a warm-up it lost 1 to 1.5 nats here."""
    x = torch.linspace(-2.0, 2.0, 60)[:, None] ** torch.arange(4)

    def model() -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        mean = (weights[..., None, :] * x).sum(-1)
        pyro.sample("y", dist.StudentT(4.0, mean, sigma[..., None]).to_event(1), obs=x[:, 1].sin())

    guide = AutoSplineFlow(model)
    lost = []

    class Look(Callback):
        def on_start(self, state):
            self.before = elbo_of(model, guide)

        def on_step(self, state):
            lost.append(self.before - elbo_of(model, guide))

    fit(model, guide, max_steps=3, seed=0, callbacks=[Look()], progress=False)
    assert max(lost) < 0.05


def test_a_trained_guide_is_not_started_again_and_is_its_own_net(recwarn) -> None:
    guide = AutoSplineFlow(correlated, **TINY).setup()
    perturb_(guide.flow, 0.3)
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    start = guide.find_start(correlated)
    torch.testing.assert_close(dict(guide.state_dict()), before, rtol=0, atol=0)
    perturb_(guide.flow, 1.0)
    assert start is not None and not start.keep_better()
    torch.testing.assert_close(dict(guide.state_dict()), before, rtol=0, atol=0)
    assert "nats below the trained flow that it started from" in str(recwarn.pop().message)


def test_a_second_fit_goes_on_from_the_first_and_never_ends_below_it() -> None:
    guide = AutoSplineFlow(skewed, **TINY)
    fit(skewed, guide, max_steps=100, seed=0, progress=False)
    first = elbo_of(skewed, guide)
    rates = []

    class Look(Callback):
        def on_step(self, state):
            rates.append([group["lr"] for group in state.optimizer.param_groups])

    class Spoil(Callback):
        def on_step(self, state):
            if state.step == 5:
                perturb_(state.guide.flow, 1.0)

    more = {"scheduler": "constant", "progress": False}
    fit(skewed, guide, max_steps=60, seed=1, callbacks=[Look()], **more)
    recipe = guide.recipe()
    assert rates[recipe.warmup_steps] == [
        recipe.lr,
        *(rate for _, rate in guide.parameter_groups()),
    ]
    better = elbo_of(skewed, guide)
    assert better > first + 0.02
    result = fit(skewed, guide, max_steps=5, seed=2, callbacks=[Spoil()], **more)
    assert result.best_step == 0
    assert elbo_of(skewed, guide) == pytest.approx(better, abs=0.05)


@pytest.mark.parametrize(("max_seconds", "expected"), [(3.0, 2.7), (1000.0, 900.0), (None, None)])
def test_the_search_may_take_nearly_all_of_a_short_budget(monkeypatch, max_seconds, expected):
    seen = []

    def search(self, *args, max_seconds, **kwargs):
        seen.append(max_seconds)

    monkeypatch.setattr(AutoSplineFlow, "find_start", search)
    guide = AutoSplineFlow(correlated, **TINY)
    fit(correlated, guide, max_steps=1, max_seconds=max_seconds, progress=False)
    assert seen == [None if expected is None else pytest.approx(expected)]


def test_a_vague_prior_does_not_decide_where_the_guide_starts() -> None:
    def vague(x: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(0.01 * x.new_ones(()), 0.01 * x.new_ones(())))
        with pyro.plate("rows", len(x)):
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), tau.rsqrt()))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = torch.linspace(-2, 2, 20, dtype=torch.float64)
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoSplineFlow(vague, **TINY).setup(x)
        assert elbo_of(vague, guide, x) > -500, "the prior's median of tau is about 1e-30"


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("base", ["normal", "student_t"])
def test_every_kind_of_affine_map_starts_at_a_gaussian(kind, base) -> None:
    guide = AutoSplineFlow(correlated, affine=kind, base=base, **TINY).setup()
    before = elbo_of(correlated, guide)
    assert guide.find_start(correlated) is not None
    assert elbo_of(correlated, guide) > before + 0.5


def test_one_draw_far_out_does_not_hide_a_gain(monkeypatch) -> None:
    """A seventh of a nat is gained; one of the first draws says that 400 are lost, and so does none of the next."""
    guide = AutoSplineFlow(correlated, **TINY).setup()
    start = guide.find_start(correlated)
    assert start is not None
    trained = guide.affine.raw_loc.detach() + 0.125
    numbers = []

    def elbos(number: int) -> tuple[torch.Tensor, float]:
        found = torch.zeros(2048)
        if torch.equal(guide.affine.raw_loc, trained):
            numbers.append(number)
            found += 0.14
            found[5] -= 400.0 if number == 1 else 0.0
        return found, 1.0 + 8.0 * (number == 1)

    monkeypatch.setattr(start, "_elbos", elbos)
    with torch.no_grad():
        guide.affine.raw_loc.copy_(trained)
    assert start.keep_better()
    assert torch.equal(guide.affine.raw_loc, trained) and 1 < len(numbers) < 8


@pytest.mark.parametrize(("spread", "is_kept"), [(0.5, True), (2.0, False)])
def test_of_two_guides_that_are_level_the_one_with_less_spread_is_kept(
    spread: float, is_kept: bool, monkeypatch
) -> None:
    guide = AutoSplineFlow(correlated, **TINY).setup()
    start = guide.find_start(correlated)
    assert start is not None
    first = guide.affine.raw_loc.clone()

    def elbos(number: int) -> tuple[torch.Tensor, float]:
        noise = torch.randn(2048, generator=torch.Generator().manual_seed(number))
        is_first = torch.equal(guide.affine.raw_loc, first)
        found = torch.zeros(2048) if is_first else noise - noise.mean() - 0.01
        return found, 1.0 if is_first else spread

    monkeypatch.setattr(start, "_elbos", elbos)
    with torch.no_grad():
        guide.affine.raw_loc.add_(0.125)
    assert start.keep_better() == is_kept
    assert torch.equal(guide.affine.raw_loc, first) != is_kept


def test_a_gain_that_is_none_leaves_the_gaussian() -> None:
    guide = AutoSplineFlow(correlated, **TINY).setup()
    start = guide.find_start(correlated)
    before = guide.affine.raw_loc.clone()
    with torch.no_grad():
        guide.affine.raw_loc.add_(1e-4)
    assert start is not None and not start.keep_better(), "nothing was gained"
    assert torch.equal(guide.affine.raw_loc, before)
    with torch.no_grad():
        start.tensors["affine.raw_loc"].add_(0.1)  # a start half a nat below
    assert start.keep_better()
    assert torch.equal(guide.affine.raw_loc, before)
