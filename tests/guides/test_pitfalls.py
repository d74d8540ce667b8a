"""What flow guides are known to get wrong elsewhere: one test or more for each, with a model small enough to know."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor

from pyro_flowkit import SplineFlow
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}


def two_latents() -> None:
    z = pyro.sample("z", dist.Normal(1.0, 0.5))
    pyro.sample("s", dist.LogNormal(z, 0.3))


def make_guide(model=two_latents, **settings) -> AutoSplineFlow:
    return AutoSplineFlow(model, **{**TINY, **settings})


def train(model, guide, steps: int = 3, *args, lr: float = 0.01, elbo=None) -> list[float]:
    svi = SVI(model, guide, Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def values_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    after = values_of(module)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def log_prob_at(guide: AutoSplineFlow, points: Tensor) -> Tensor:
    with torch.no_grad():
        guide()  # comes into step with the store
        return guide.get_posterior().log_prob(points)


POINTS = torch.linspace(-2.0, 2.0, 10).reshape(5, 2)


def test_second_guide_of_a_living_first_takes_a_suffix_warns_and_both_train() -> None:
    first = make_guide()
    train(two_latents, first)
    second = make_guide()
    with pytest.warns(UserWarning, match="AutoSplineFlow_1"):
        second.setup()
    at_start = values_of(second)
    weight, bias = second.flow.layers[0].conditioner.layers()[-1]
    assert not weight.any() and torch.equal(bias, torch.zeros(1 * 11))
    train(two_latents, second)
    of_first, of_second = values_of(first), values_of(second)
    assert len(moved(at_start, second)) == len(at_start)
    assert moved(of_first, first) == set(), "training the second leaves the first alone"
    train(two_latents, first)
    assert len(moved(of_first, first)) == len(of_first)
    assert moved(of_second, second) == set()
    names = {name.split(".")[0] for name in pyro.get_param_store()}
    assert names == {"AutoSplineFlow", "AutoSplineFlow_1"}


def test_second_guide_of_a_dead_first_starts_fresh_and_trains() -> None:
    pyro.set_rng_seed(0)
    expected = log_prob_at(make_guide().setup(), POINTS)
    pyro.clear_param_store()
    first = make_guide()
    train(two_latents, first)
    del first
    pyro.set_rng_seed(0)
    second = make_guide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.setup()
    assert torch.equal(log_prob_at(second, POINTS), expected)
    before = values_of(second)
    train(two_latents, second)
    assert len(moved(before, second)) == len(before)
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"AutoSplineFlow"}


def test_two_guides_with_svi_in_a_loop_train_each_time() -> None:
    for _ in range(3):
        guide = make_guide()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first may still be alive: the suffix is said
            guide.setup()
        before = values_of(guide)
        train(two_latents, guide)
        assert len(moved(before, guide)) == len(before)


def test_saved_store_gives_the_same_distribution_to_a_fresh_guide(tmp_path) -> None:
    guide = make_guide(base="student_t")
    train(two_latents, guide)
    expected, medians = log_prob_at(guide, POINTS), guide.median()
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    del guide
    fresh = make_guide(base="student_t")
    assert torch.equal(log_prob_at(fresh, POINTS), expected)
    assert all(torch.equal(fresh.median()[name], medians[name]) for name in medians)
    before = values_of(fresh)
    train(two_latents, fresh)
    assert len(moved(before, fresh)) == len(before)


def test_saved_store_is_read_by_median_before_any_call(tmp_path) -> None:
    guide = make_guide()
    train(two_latents, guide)
    expected = guide.quantiles([0.1, 0.9])
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    fresh = make_guide()
    fresh.setup()
    assert not torch.equal(fresh.quantiles([0.1, 0.9])["z"], expected["z"])
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert torch.equal(fresh.quantiles([0.1, 0.9])["z"], expected["z"])


def test_store_of_another_shape_is_refused_with_expected_and_got(tmp_path) -> None:
    train(two_latents, make_guide())
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    with pytest.raises(ValueError, match=r"Expected .* of shape .*, got shape"):
        make_guide(hidden_dims=[9, 9])()


def subsampled(data: Tensor) -> None:
    with pyro.plate("rows", 20, subsample_size=5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data[:5])


@pytest.mark.parametrize("first", ["setup", "call"])
def test_local_latents_in_a_subsampled_plate_are_refused(first: str) -> None:
    guide = make_guide(subsampled)
    for _ in range(2):  # refused again the second time, not half set up
        with pytest.raises(ValueError, match="AmortizedSplineFlow") as error:
            (guide.setup if first == "setup" else guide)(torch.zeros(20))
        assert "'z'" in str(error.value) and "5 of 20" in str(error.value)
    assert len(pyro.get_param_store()) == 0


def test_global_latents_beside_a_subsampled_plate_are_fine() -> None:
    def model(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])

    guide = make_guide(model)
    train(model, guide, 2, torch.zeros(20))
    assert guide.latent_dim == 1


@pytest.mark.parametrize("path_gradient", [False, True])
def test_jit_trace_elbo_trains_and_agrees_with_trace_elbo(path_gradient: bool) -> None:
    guide = make_guide(num_transforms=1, path_gradient=path_gradient)
    guide.setup()
    perturb_(guide, 0.05)
    before = values_of(guide)
    settings = {"num_particles": 2, "vectorize_particles": path_gradient, "max_plate_nesting": 0}
    jit = JitTrace_ELBO(ignore_jit_warnings=True, **settings)
    train(two_latents, guide, 3, elbo=jit)
    assert len(moved(before, guide)) == len(before)

    def loss_and_gradient(elbo) -> tuple[float, Tensor]:
        guide.zero_grad()
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(two_latents, guide)
        return loss, torch.cat([p.grad.reshape(-1) for p in guide.parameters()])

    # a trace takes the path gradient where the flow bends little; outside of one it has to be the less noisy one, too
    guide._gradient_noise().update(torch.tensor([0.0, 1e9]))
    expected, expected_gradient = loss_and_gradient(Trace_ELBO(**settings))
    got, got_gradient = loss_and_gradient(jit)
    assert got == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(got_gradient, expected_gradient, atol=1e-3)


def test_guide_goes_through_jit_trace_module() -> None:
    guide = make_guide()
    guide.setup()
    perturb_(guide, 0.1)
    with pyro.validation_enabled(False):  # Pyro's own validation warns while it is traced
        traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    pyro.set_rng_seed(7)
    expected = guide.call()
    pyro.set_rng_seed(7)
    got = traced.call()
    assert len(got) == len(expected) == 2
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_predictive_goes_through_jit() -> None:
    guide = make_guide()
    guide.setup()
    predictive = Predictive(two_latents, guide=guide, num_samples=4, parallel=True)
    assert predictive()["z"].shape[0] == 4

    class Traceable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guide = guide

        def forward(self) -> tuple[Tensor, ...]:
            draws = predictive()
            return tuple(draws[name] for name in sorted(draws))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of Pyro's Predictive
        traced = torch.jit.trace(Traceable(), (), check_trace=False)
    first, second = traced(), traced()
    assert [tuple(value.shape) for value in first] == [(4,), (4,)]
    assert not torch.equal(first[0], second[0]), "draws, not constants"


def copies_of(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("convert", [False, True])
def test_trained_guide_is_copied_and_saved(convert: bool) -> None:
    guide = make_guide()
    if convert:
        guide.double()
    train(two_latents, guide)
    expected = log_prob_at(guide, POINTS.to(guide.affine.raw_loc.dtype))
    for how, twin in copies_of(guide).items():
        pyro.clear_param_store()
        got = twin.get_posterior().log_prob(POINTS.to(twin.affine.raw_loc.dtype))
        assert torch.equal(got, expected), how
        assert torch.equal(twin.median()["z"], guide.median()["z"]), how
        twin()  # draws without its model
        assert guide.model is not None, how


def test_deepcopy_of_a_guide_trains_alone() -> None:
    guide = make_guide()
    train(two_latents, guide)
    twin = copy.deepcopy(guide)
    original, before = values_of(guide), values_of(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(two_latents, twin)
    assert len(moved(before, twin)) == len(before)
    assert moved(original, guide) == set()


def test_guide_of_a_model_with_learned_parameters_is_copied_and_saved() -> None:
    prior = SplineFlow(2, **TINY)

    def model() -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(2 * loc, scale))
        y = pyro.sample("y", dist.Normal(loc, 1.0))
        w = pyro.sample("w", prior())
        pyro.sample("x", dist.Normal(z + y + w.sum(), 1.0), obs=torch.tensor(1.0))

    guide = make_guide(model)
    train(model, guide)
    expected = guide.median()
    for how, twin in copies_of(guide).items():
        got = twin.median()
        assert set(got) == {"z", "y", "w"}, how
        assert all(torch.equal(got[name], expected[name]) for name in got), how


def test_pickled_guide_does_not_grow_with_the_data_or_with_use() -> None:
    def model(data: Tensor) -> Tensor:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=data)
        return data

    guide = make_guide(model)
    guide.setup(torch.zeros(50_000, 2))
    small = len(pickle.dumps(guide))
    train(model, guide, 2, torch.zeros(50_000, 2))
    with torch.no_grad():
        guide.get_posterior().log_prob(torch.zeros(50_000, 2))
    assert small < 100_000
    assert len(pickle.dumps(guide)) < small + 2000


def far_model() -> None:
    pyro.sample("x", dist.Normal(torch.tensor([12.0, -40.0]), torch.tensor([1.0, 2.0])).to_event(1))


@pytest.mark.parametrize("path_gradient", [True, False])
def test_posterior_far_from_the_origin_is_reached(path_gradient: bool) -> None:
    guide = make_guide(
        far_model, init_loc_fn=lambda site: torch.zeros(2), path_gradient=path_gradient
    )
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.997}
    )
    svi = SVI(far_model, guide, optimizer, elbo)
    first = svi.evaluate_loss()
    for _ in range(1000):
        svi.step()
        optimizer.step()
    assert first > 100
    assert sum(svi.evaluate_loss() for _ in range(20)) / 20 < 0.2, "exactly 0 at the posterior"
    target = torch.tensor([12.0, -40.0])
    scale = torch.tensor([1.0, 2.0])
    low, middle, high = guide.quantiles([0.1587, 0.5, 0.8413])["x"]
    assert torch.allclose(middle, target, atol=0.5)
    assert torch.allclose(guide.median()["x"], middle, atol=1e-5)
    assert torch.allclose((high - low) / 2, scale, rtol=0.25)
    points = target + scale * torch.randn(50, 2)
    exact = dist.Normal(target, scale).to_event(1).log_prob(points)
    assert (guide.get_posterior().log_prob(points) - exact).abs().median() < 0.3


@pytest.mark.parametrize("to", [lambda g: g.double(), lambda g: g.to(torch.float64)])
def test_conversion_before_the_first_call_is_kept(to) -> None:
    guide = to(make_guide())
    train(two_latents, guide, 2)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert guide()["z"].dtype == torch.float64
    assert guide.get_posterior().sample().dtype == torch.float64
    assert guide.median()["z"].dtype == torch.float64


def test_conversion_after_the_first_call_is_kept() -> None:
    guide = make_guide()
    train(two_latents, guide, 1)
    guide.double()
    train(two_latents, guide, 2)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


def test_dtype_comes_from_the_prototype() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = make_guide(model)
    guide()
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert {b.dtype for b in guide.buffers() if b.is_floating_point()} == {torch.float64}


class FlowPrior(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.prior = SplineFlow(2, **TINY)

    def forward(self) -> None:
        z = pyro.sample("z", self.prior())
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize("guide_type", [AutoNormal, AutoDiagonalNormal, AutoDelta, AutoSplineFlow])
@pytest.mark.parametrize("elbo", [Trace_ELBO])
def test_model_whose_prior_is_a_flow_works_with_autoguides(guide_type, elbo) -> None:
    model = FlowPrior()
    assert str(model.prior().support) == str(dist.constraints.real_vector)
    guide = guide_type(model)
    losses = train(model, guide, 3, elbo=elbo())
    assert torch.tensor(losses).isfinite().all()
    before = values_of(model)
    train(model, guide, 1)
    assert len(moved(before, model)) > 5, "the prior trains along with the guide"


def test_frozen_parameter_inside_a_pyro_module_stays_frozen() -> None:
    model = FlowPrior()
    model.prior.layers[0].requires_grad_(False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    guide = AutoNormal(model)
    pyro.poutine.trace(model).get_trace()
    before = values_of(model)
    train(model, guide, 4)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    assert frozen and moved(before, model) == set(before) - frozen


def test_frozen_part_of_a_guide_stays_frozen() -> None:
    guide = make_guide()
    guide.setup()
    guide.affine.requires_grad_(False)
    before = values_of(guide)
    train(two_latents, guide, 3)
    assert moved(before, guide) == {name for name in before if not name.startswith("affine")}
