"""The guide sees what the user's optimizer does, and takes back what its parts cannot bear."""

import copy
import io
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.optim import SGD, Adam, ClippedAdam, PyroOptim
from torch import Tensor

from models._drop_in_more import small_programs
from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides import pace as module
from tests.tiny import make_guide

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("y", dist.Normal(0.03 * x**2 - 3.0, 1.0))


def eight_schools() -> None:
    with pyro.plate("schools", 8):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS), obs=EFFECTS)


def gaussian() -> None:
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.6, 0.3, 2.0]])
    pyro.sample("z", dist.MultivariateNormal(torch.tensor([1.0, -2.0, 3.0]), scale_tril=factor))


def trained(
    model: Callable, optimizer: PyroOptim, steps: int, guide=None, elbo=None, num_particles: int = 1
):
    guide = AutoSplineFlow(model) if guide is None else guide
    elbo = elbo or Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1)
    svi = SVI(model, guide, optimizer, elbo)
    losses = [svi.step() for _ in range(steps)]
    assert all(math.isfinite(loss) for loss in losses)
    return guide


@torch.no_grad()
def elbo_of(model: Callable, guide) -> float:
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    return -elbo.loss(model, guide)


OPTIMIZERS = {
    "ClippedAdam": lambda: ClippedAdam({"lr": 0.05}),
    "Adam": lambda: Adam({"lr": 0.05}),
    "SGD": lambda: SGD({"lr": 0.05, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_particle_at_a_large_rate_trains_beyond_the_best_gaussian(name: str) -> None:
    guide = trained(banana, OPTIMIZERS[name](), 400)
    assert elbo_of(banana, guide) > -0.72, "the best Gaussian has -0.726"


def test_the_model_that_ended_in_nan_trains() -> None:
    """Without a pace the loss was NaN within 200 steps; AutoNormal's ELBO here is -41.6."""
    guide = trained(eight_schools, ClippedAdam({"lr": 0.02}), 300, num_particles=8)
    assert elbo_of(eight_schools, guide) > -40.0


def test_a_posterior_far_away_on_another_scale_is_reached() -> None:
    def far() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1e3).to_event(1))
        pyro.sample(
            "x",
            dist.Normal(z, torch.tensor([1.0, 0.1])).to_event(1),
            obs=torch.tensor([300.0, -40.0]),
        )

    median = trained(far, Adam({"lr": 0.02}), 700).median()["z"]
    assert abs(float(median[0]) - 300.0) < 5.0, (
        "at AutoNormal's pace it is 14 away from the start by now"
    )
    assert abs(float(median[1]) + 40.0) < 0.5


def test_a_guide_arrives_before_it_widens() -> None:
    """The mixture's start is far off: widened on the way, its guide stayed on both components at once, at -21.6."""
    program = small_programs()["Gaussian mixture"]
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide, elbo = program.guide(AutoSplineFlow), program.elbo(1)
        svi = SVI(program.model, guide, ClippedAdam({"lr": 0.003}), elbo)
        for _ in range(300):
            svi.step(*program.args)
        low, high = guide.quantiles([0.16, 0.84])["locs"]
        assert float((high - low).max()) < 3.5, "the data are 1 and 2 wide, and 10 apart"


def test_inside_a_guide_list() -> None:
    guide = AutoGuideList(banana)
    guide.append(AutoSplineFlow(banana))
    trained(banana, ClippedAdam({"lr": 0.05}), 300, guide=guide)
    assert elbo_of(banana, guide) > -1.0


def test_under_jit_an_exact_gaussian_is_found() -> None:
    """A trace takes the path gradient while the flow bends little, and its guide keeps no pace; the exact ELBO is 0."""
    guide = AutoSplineFlow(gaussian)
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.01 ** (1 / 300)}
    )
    elbo = JitTrace_ELBO(
        num_particles=100, vectorize_particles=True, max_plate_nesting=0, ignore_jit_warnings=True
    )
    svi = SVI(gaussian, guide, optimizer, elbo)
    for _ in range(300):
        svi.step()
        optimizer.step()
    traced = elbo_of(gaussian, guide)
    assert traced > -0.05
    guide.median()
    assert elbo_of(gaussian, guide) == pytest.approx(traced, abs=0.05), "nothing is taken back"


def values(guide) -> Tensor:
    return torch.cat([p.detach().flatten() for p in guide.parameters()])


def stepped_guide(lr: float = 0.05, steps: int = 1) -> AutoSplineFlow:
    """A guide whose optimizer has stepped since its last call."""
    return trained(banana, Adam({"lr": lr}), steps, guide=make_guide(banana))


def test_a_step_is_shortened_to_the_limits_at_the_next_look() -> None:
    guide = make_guide(banana).setup()
    start, flow = values(guide), values(guide.flow)
    trained(banana, Adam({"lr": 0.05}), 1, guide=guide)
    assert float((values(guide) - start).abs().max()) == pytest.approx(0.05, rel=0.01)
    guide.median()
    moves = (values(guide.flow) - flow).abs()
    assert 0.0 < float(moves.max()) <= 1.01 * module.FLOW.first
    scale = guide.affine.rate * guide.affine.raw_log_scale.detach() - math.log(0.1)
    assert float(scale.abs().max()) == pytest.approx(module.SCALE.first, rel=0.01)


def test_small_rates_set_the_pace_by_themselves() -> None:
    guide = make_guide(banana).setup()
    trained(banana, Adam({"lr": 1e-4}), 1, guide=guide)
    before = values(guide.flow)
    guide.median()
    assert torch.allclose(values(guide.flow), before, atol=1e-7)


def test_summaries_state_and_pickles_agree_after_the_last_step() -> None:
    guide = stepped_guide()
    overshot = values(guide)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    state, median = copy.deepcopy(guide.state_dict()), guide.median()["x"]
    assert not torch.equal(values(guide), overshot)
    assert all(torch.equal(tensor, guide.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(values(loaded), values(guide))
    assert torch.equal(loaded.median()["x"], median)
    trained(banana, Adam({"lr": 0.05}), 3, guide=guide)
    guide.load_state_dict(state)
    assert torch.equal(guide.median()["x"], median)


def test_a_store_saved_right_after_the_last_step_has_the_step_as_it_was_taken(tmp_path) -> None:
    guide = stepped_guide(steps=30)
    overshot = values(guide)
    pyro.get_param_store().save(tmp_path / "store.pt")
    saved = values(guide)
    assert not torch.equal(saved, overshot)
    trained(banana, Adam({"lr": 0.05}), 3, guide=guide)
    pyro.get_param_store().load(tmp_path / "store.pt")
    guide.median()
    assert torch.equal(values(guide), saved)


@pytest.mark.parametrize("how", ["state_dict", "store", "by hand"])
def test_what_somebody_else_writes_is_no_step(how: str) -> None:
    other = stepped_guide(steps=5)
    other.median()
    wanted = copy.deepcopy(other.state_dict())
    store = copy.deepcopy(pyro.get_param_store().get_state())
    guide = other
    trained(banana, Adam({"lr": 0.01}), 3, guide=guide)
    if how == "state_dict":
        guide.load_state_dict(wanted)
    elif how == "store":
        pyro.get_param_store().set_state(store)
        guide()
    else:
        guide.median()
        with torch.no_grad():
            for name, parameter in guide.named_parameters():
                parameter.copy_(wanted[name])
    expected = {name: tensor.clone() for name, tensor in wanted.items()}
    guide.median()
    for name, tensor in guide.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_gradient_that_is_not_finite_is_no_step_and_said_once() -> None:
    calls = []

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        calls.append(1)
        if is_trained and len(calls) % 3 == 0:  # a finite value whose derivative is NaN
            pyro.factor("broken", torch.where(z > 100.0, (z - 100.0).sqrt(), 0.0).sum(-1))

    is_trained = False
    guide = make_guide(model).setup()
    is_trained = True
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    with pytest.warns(UserWarning, match="not finite") as caught:
        for _ in range(60):
            svi.step()
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    assert bool(values(guide).isfinite().all())
    median = guide.median()["z"]
    assert float(median.abs().max()) < 1.0


def test_copies_keep_the_pace() -> None:
    guide = copy.deepcopy(stepped_guide(steps=20))
    assert elbo_of(banana, trained(banana, Adam({"lr": 0.05}), 300, guide=guide)) > -1.0


def test_training_by_hand_and_by_fit_with_a_rate_take_the_same_care() -> None:
    guide = make_guide(banana)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # fit may go back to the Gaussian it began with
        fit(banana, guide, lr=0.05, num_particles=1, max_steps=50, progress=False, seed=0)
    steps = float(guide.pace.clock[module._STEPS])
    assert steps == 50.0
    here = values(guide)
    guide.median()
    assert torch.equal(values(guide), here), "fit leaves nothing to be taken back"
    pyro.clear_param_store()
    by_recipe = make_guide(banana)
    fit(banana, by_recipe, max_steps=5, progress=False, seed=0)
    assert float(by_recipe.pace.clock[module._STEPS]) == 0.0


def test_limits_fall_with_noise_and_have_a_floor_that_rises_with_the_particles() -> None:
    limit = module.Limit(1e-2, 10.0, 1.0, 1e-4)
    assert limit.after(0.0, 1.0) == 1e-2
    assert limit.after(30.0, 1.0) == pytest.approx(2.5e-3)
    assert limit.after(1e6, 1.0) == 1e-4
    assert limit.after(1e6, 64.0) == pytest.approx(8e-4)
    assert limit.after(1e6, 1e9) == 1e-2


def test_the_clock_stands_still_on_the_way_and_runs_in_noise() -> None:
    """Location first: a far posterior and a large rate; then a guide that has arrived."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.full((5,), 40.0), 1.0).to_event(1))

    guide = trained(model, Adam({"lr": 0.05}), 40, guide=make_guide(model))
    noisy = module._NOISY
    on_the_way = float(guide.pace.signs[0, noisy])
    assert on_the_way < 2.0
    trained(model, Adam({"lr": 0.05}), 400, guide=guide)
    assert float(guide.pace.signs[0, noisy]) > 100.0
