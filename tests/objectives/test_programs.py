"""The objectives under ``SVI``, as modules and under ``fit``, with the guides that people have."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import (
    block_autoregressive,
    neural_autoregressive,
    planar,
    radial,
)
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.objectives import AlphaDivergence, ForwardKL, ImportanceWeightedELBO
from tests.tiny import TINY

OBSERVED = torch.tensor([0.3, 1.2, -0.5, 0.9])
OBJECTIVES = {
    "iwae": ImportanceWeightedELBO,
    "plain_iwae": lambda *args, **kw: ImportanceWeightedELBO(
        *args, doubly_reparameterized=False, **kw
    ),
    "alpha": lambda *args, **kw: AlphaDivergence(0.5, *args, **kw),
    "forward_kl": ForwardKL,
}
STACKED = {"vectorize_particles": True, "max_plate_nesting": 1}
BOUNDS = [name for name in OBJECTIVES if name != "forward_kl"]


def model(x: Tensor = OBSERVED) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def by_hand(x: Tensor = OBSERVED) -> None:
    loc = pyro.param("q_loc", torch.tensor(0.0))
    pyro.sample("loc", dist.Normal(loc, 0.4))
    log_scale = pyro.param("q_log_scale", torch.tensor(0.0))
    pyro.sample("scale", dist.LogNormal(log_scale, 0.3))


GUIDES = {
    "by_hand": lambda: by_hand,
    "AutoNormal": lambda: AutoNormal(model),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
    "AutoSplineFlow": lambda: AutoSplineFlow(model, **TINY),
    "AutoNormalMessenger": lambda: AutoNormalMessenger(model),
}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("guide", GUIDES)
def test_svi_steps_with_every_guide(guide: str, objective: str, vectorize: bool) -> None:
    loss = OBJECTIVES[objective](3, vectorize_particles=vectorize)
    svi = SVI(model, GUIDES[guide](), Adam({"lr": 0.01}), loss)
    svi.step()
    store = pyro.get_param_store()
    before = {name: value.detach().clone() for name, value in store.items()}
    losses = [svi.step() for _ in range(2)]
    assert all(isinstance(loss, float) and 0 <= abs(loss) < 100 for loss in losses)
    assert any(not torch.equal(before[name], value) for name, value in store.items())
    assert isinstance(svi.evaluate_loss(), float)


def gradient(objective: ELBO, program) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = program()
    with pyro.poutine.trace(param_only=True) as capture:
        objective.loss(model, guide)  # lazy guides are set up
    if isinstance(guide, AutoSplineFlow):
        guide.pace.is_resting = True  # gradients keep their size
    for site in capture.trace.nodes.values():
        site["value"].unconstrained().grad = None
    pyro.set_rng_seed(1)
    loss = objective.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    found = {name: value.unconstrained().grad for name, value in store.items()}
    return loss, {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "guide", ["AutoDiagonalNormal", "AutoMultivariateNormal", "AutoSplineFlow"]
)
def test_particles_in_a_plate_and_one_by_one_are_the_same(guide: str, objective: str) -> None:
    # One draw of a few numbers per particle comes out of the generator in the same order.
    results = [
        gradient(OBJECTIVES[objective](3, vectorize_particles=vectorize), GUIDES[guide])
        for vectorize in (False, True)
    ]
    (one_loss, one), (other_loss, other) = results
    assert one_loss == pytest.approx(other_loss, rel=1e-5)
    assert one.keys() == other.keys() and any(grad.abs().max() > 0.1 for grad in one.values())
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4), name


def test_doubly_reparameterised_and_ordinary_gradient_have_the_same_mean() -> None:
    guide = AutoMultivariateNormal(model)
    guide()
    means, errors = [], []
    for doubly in (True, False):
        objective = AlphaDivergence(0.3, 3, doubly_reparameterized=doubly, **STACKED)
        found = []
        for _ in range(150):
            guide.zero_grad()
            objective.loss_and_grads(model, guide)
            found.append(guide.loc.grad.clone())
        means.append(torch.stack(found).mean(0))
        errors.append(torch.stack(found).std(0) / len(found) ** 0.5)
    assert ((means[0] - means[1]).abs() < 5 * (errors[0] + errors[1])).all()
    assert (means[0].abs() > 5 * errors[0]).any()


class VAE(PyroModule):
    def __init__(self, flow: bool, size: int = 40) -> None:
        super().__init__("vae")
        self.size, self.with_flow = size, flow
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Linear(2, 3)
        self.flow = SplineFlow(2, 4, base="conditional_normal", **TINY) if flow else None

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", self.size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        features = self.encoder(x)
        with pyro.plate("data", self.size, subsample_size=len(x)):
            if self.with_flow:
                pyro.sample("z", self.flow(features))
            else:
                loc, log_scale = features.chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.usefixtures("no_head_start")
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_vae_trains_encoder_and_decoder(objective: str, flow: bool, vectorize: bool) -> None:
    vae, x = VAE(flow), torch.randn(10, 3)
    loss = OBJECTIVES[objective](5, vectorize_particles=vectorize, plate="data")
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss)
    for _ in range(3):
        svi.step(x)
    after = dict(vae.named_parameters())
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still


@pytest.mark.parametrize("objective", ["iwae", "forward_kl"])
def test_fit_takes_it(objective: str) -> None:
    vae, x = VAE(flow=False), torch.randn(40, 3)
    loss = OBJECTIVES[objective](5, vectorize_particles=True)
    result = fit(
        vae.model, vae.guide, data=x, batch_size=10, objective=loss, max_steps=20, progress=False
    )
    assert len(result.history["elbo"]) == 20 and result.skipped_steps == 0
    assert torch.isfinite(torch.as_tensor(result.history["grad_norm"])).all()


def test_fit_with_it_reaches_the_posterior() -> None:
    guide = AutoNormal(model)
    objective = ImportanceWeightedELBO(5, vectorize_particles=True)
    fit(model, guide, objective=objective, max_steps=150, lr=0.05, seed=0, progress=False)
    elbo = -Trace_ELBO(500, **STACKED).loss(model, guide)
    assert elbo > -6.4  # -6.30 after training by ELBO, -8 at first


def test_fit_has_no_complaint_about_the_path_gradient_of_a_guide() -> None:
    guide = AutoSplineFlow(model, path_gradient=True, **TINY)
    result = fit(model, guide, objective=ForwardKL(3), max_steps=2, progress=False)
    assert len(result.history["elbo"]) == 2


def test_objectives_say_that_their_gradient_is_their_own() -> None:
    for make in OBJECTIVES.values():
        assert isinstance(make(), ELBO) and make().own_gradient is True


def test_they_are_modules_for_torch_optimizers() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.z = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self) -> None:
            pyro.sample("x", dist.Normal(self.z, 1.0), obs=torch.tensor(1.0))

    with pyro.settings.context(module_local_params=True):
        program = Model()
        guide = AutoNormal(program)
        bound = ImportanceWeightedELBO(5)(program, guide)
        bound()
        optimizer = torch.optim.Adam(bound.parameters(), lr=0.05)
        first = [p.detach().clone() for p in bound.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            bound().backward()
            optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(first, bound.parameters(), strict=True)]
    assert len(moved) == 2 and all(moved)


@pytest.mark.parametrize("guide", [AutoDelta, AutoStructured])
def test_guides_of_learned_deltas_get_the_ordinary_gradient(guide) -> None:
    plain, doubly = (
        gradient(OBJECTIVES[name](3), lambda: guide(model)) for name in ("plain_iwae", "iwae")
    )
    assert plain[0] == pytest.approx(doubly[0], rel=1e-5)
    assert any(grad.abs().max() > 0.1 for grad in plain[1].values())
    for name in plain[1]:
        assert torch.allclose(plain[1][name], doubly[1][name], atol=1e-4), name


def discrete_guide(x: Tensor = OBSERVED) -> None:
    by_hand(x)
    pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))


def discrete_model(x: Tensor = OBSERVED) -> None:
    model(x)
    pyro.sample("k", dist.Bernoulli(0.5))


@pytest.mark.parametrize("objective", BOUNDS)
def test_draws_without_rsample_are_refused_with_advice(objective: str) -> None:
    loss = OBJECTIVES[objective](3)
    assert isinstance(loss.loss(discrete_model, discrete_guide), float)  # the value is fine
    with pytest.raises(ValueError, match="with rsample, got Bernoulli at 'k': .*ForwardKL"):
        loss.loss_and_grads(discrete_model, discrete_guide)


def test_sites_marked_for_enumeration_are_warned_about() -> None:
    def guide(x: Tensor = OBSERVED) -> None:
        by_hand(x)
        pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})

    with pytest.warns(UserWarning, match="use TraceEnum_ELBO instead"):
        ForwardKL(3).loss(discrete_model, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForwardKL(3, strict_enumeration_warning=False).loss(discrete_model, guide)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImportanceWeightedELBO(0), ValueError, "num_particles >= 1, got 0"),
        (lambda: ForwardKL(1), ValueError, "num_particles >= 2, got 1"),
        (lambda: ImportanceWeightedELBO(2.0), TypeError, "an int, got 2.0"),
        (lambda: ImportanceWeightedELBO(True), TypeError, "an int, got True"),
        (lambda: AlphaDivergence(-0.5), ValueError, "alpha >= 0, got -0.5"),
        (lambda: AlphaDivergence(float("nan")), ValueError, "alpha >= 0, got nan"),
        (lambda: AlphaDivergence(float("inf")), ValueError, "alpha >= 0, got inf"),
        (lambda: ForwardKL(plate=-1), TypeError, "name of a plate or None, got -1"),
    ],
)
def test_bad_settings_are_refused(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("family", [planar, radial, block_autoregressive, neural_autoregressive])
@pytest.mark.parametrize("name", ["iwae", "alpha", "forward_kl"])
def test_guides_whose_transforms_have_no_inverse_are_refused_with_a_remedy(family, name) -> None:
    guide = AutoNormalizingFlow(model, family)
    with pytest.raises(ValueError, match="_latent'.*no inverse.*doubly_reparameterized=False"):
        OBJECTIVES[name](2).loss_and_grads(model, guide)
    loss = OBJECTIVES["plain_iwae"](2).loss_and_grads(model, guide)
    gradients = [parameter.grad for parameter in guide.parameters()]
    assert torch.isfinite(torch.tensor(loss)) and any(g.abs().sum() > 0 for g in gradients)


def looped_model(vectorized: bool):
    plate = pyro.plate("data", len(OBSERVED))
    if vectorized:
        with plate:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=OBSERVED)
        return
    for i in plate:
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=OBSERVED[i])


def looped_guide(vectorized: bool):
    plate = pyro.plate("data", len(OBSERVED))
    if vectorized:
        with plate:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        return
    for i in plate:
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sequential_plate_over_the_data_is_said_to_share_one_weight(name) -> None:
    with pytest.warns(UserWarning, match=r"'data' is sequential.*with pyro.plate\('data', size\)"):
        OBJECTIVES[name](3).loss(looped_model, looped_guide, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OBJECTIVES[name](3).loss(looped_model, looped_guide, True)
        AlphaDivergence(1.0, 3).loss(looped_model, looped_guide, False)  # the ELBO is the same
