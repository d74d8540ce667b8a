"""AmortizedSplineFlow keeps what Pyro expects of an autoguide."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_flowkit import FlowDistribution
from tests.guides.amortized_models import (
    DATA,
    GLOBAL_DIM,
    LOCAL_DIM,
    SIZE,
    Encoder,
    make_guide,
    model,
    ready_guide,
)
from tests.tiny import step

SITES = {"loc", "scale", "z", "weights"}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def still(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    after = values_of(module)
    return {name for name, value in before.items() if torch.equal(value, after[name])}


def waiting(guide) -> set[str]:
    """What does not move in the first steps: all of the flows but their affine maps' linear part."""
    late = ("global_guide.flow.", "flow.layers.", "affine.network.")
    return {name for name, _ in guide.named_parameters() if name.startswith(late)}


def log_prob_of(guide) -> Tensor:
    points = torch.linspace(-1.0, 1.0, LOCAL_DIM).expand(SIZE, -1)
    with torch.no_grad():
        local = guide.get_posterior(DATA).log_prob(points)
        overall = guide.global_guide.get_posterior().log_prob(torch.zeros(GLOBAL_DIM))
    return torch.cat([local, overall[None]])


@pytest.mark.parametrize(
    "bad",
    [
        {"init_scale": 1},
        {"init_scale": -0.1},
        {"base": "cauchy"},
        {"affine": "lu"},
        {"num_transforms": 0},
        {"context_dim": 0},
        {"encoder": 3},
    ],
)
def test_bad_settings_are_said_at_construction(bad) -> None:
    with pytest.raises(ValueError, match=r"Expected .* got"):
        make_guide(**bad)


def test_setup_is_explicit_lazy_and_done_once() -> None:
    guide = make_guide()
    assert guide.prototype_trace is None
    assert guide.setup(DATA) is guide
    prototype, parameters = guide.prototype_trace, list(guide.parameters())
    guide.setup(DATA)
    guide(DATA[:5])
    assert guide.prototype_trace is prototype
    assert all(a is b for a, b in zip(guide.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "action",
    [
        lambda g: list(g.parameters()),
        lambda g: g.state_dict(),
        lambda g: g.load_state_dict({}),
        lambda g: g.get_posterior(DATA),
        lambda g: g.median(DATA),
        lambda g: g.quantiles([0.5], DATA),
        lambda g: g.unpack(torch.zeros(SIZE, LOCAL_DIM)),
    ],
)
def test_before_setup_errors_name_it(action) -> None:
    with pytest.raises(RuntimeError, match="setup"):
        action(make_guide())


def test_model_is_no_submodule_and_the_encoder_is() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.noise = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", SIZE, subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, self.noise), obs=x[..., 0])

    guide = make_guide(Model()).setup(DATA)
    assert not any(isinstance(module, Model) for module in guide.modules())
    assert guide.encoder.linear.weight in set(guide.parameters())
    assert guide.global_guide is None


def test_forward_has_one_auxiliary_site_and_a_delta_per_latent_inside_the_plate() -> None:
    guide = ready_guide()
    trace = poutine.trace(guide).get_trace(DATA[:5])
    trace.compute_log_prob()
    samples = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
    local = samples["_AmortizedSplineFlow_latent"]
    assert local["infer"]["is_auxiliary"] is True
    assert isinstance(local["fn"], FlowDistribution)
    assert local["value"].shape == (5, LOCAL_DIM)
    assert [frame.name for frame in local["cond_indep_stack"]] == ["rows"]
    assert set(samples) == {
        *SITES,
        "rows",
        "_AmortizedSplineFlow_latent",
        "_AmortizedSplineFlow.global_guide_latent",
    }
    for name in SITES:
        assert isinstance(samples[name]["fn"], dist.Delta)
        inside = name in ("z", "weights")
        assert [f.name for f in samples[name]["cond_indep_stack"]] == (["rows"] if inside else [])
    assert samples["weights"]["fn"].event_dim == 1
    assert samples["weights"]["value"].shape == (5, 3)
    returned = trace.nodes["_RETURN"]["value"]
    assert set(returned) == SITES
    assert all(returned[name] is samples[name]["value"] for name in returned)
    to = torch.distributions.biject_to(dist.constraints.simplex)
    expected = -to.log_abs_det_jacobian(local["value"][..., 1:], samples["weights"]["value"])
    assert torch.allclose(samples["weights"]["fn"].log_density, expected, atol=1e-5)


def test_log_density_is_zero_where_the_mask_is_false() -> None:
    guide = ready_guide()
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace(DATA)
    assert bool((trace.nodes["weights"]["fn"].log_density == 0.0).all())


def test_call_returns_a_tuple_sorted_by_name() -> None:
    guide = ready_guide()
    pyro.set_rng_seed(1)
    by_name = guide(DATA)
    pyro.set_rng_seed(1)
    for value, name in zip(guide.call(DATA), sorted(SITES), strict=True):
        assert torch.equal(value, by_name[name])


@pytest.mark.parametrize("condition_on_global", [False, True])
@pytest.mark.parametrize("base", ["normal", "student_t"])
@pytest.mark.parametrize("affine", ["full", "diagonal", None])
def test_init_values_and_scale_are_honoured(affine, base: str, condition_on_global: bool) -> None:
    values = {
        "loc": torch.tensor(0.7),
        "scale": torch.tensor(2.0),
        "z": torch.full((SIZE,), -1.5),
        "weights": torch.tensor([0.2, 0.3, 0.5]).expand(SIZE, 3),
    }
    guide = make_guide(
        init_loc_fn=init_to_value(values=values),
        init_scale=0.3,
        base=base,
        affine=affine,
        condition_on_global=condition_on_global,
    ).setup(DATA)
    for name, value in guide.median(DATA).items():
        assert torch.allclose(value, values[name], atol=1e-5), name
    if base == "normal":
        loc = torch.cat([values["z"][:, None], guide_loc(values["weights"])], -1)
        fresh = dist.Normal(loc, 0.3).to_event(1)
        x = fresh.sample((10,))
        assert torch.allclose(guide.get_posterior(DATA).log_prob(x), fresh.log_prob(x), atol=1e-3)


def guide_loc(weights: Tensor) -> Tensor:
    return torch.distributions.biject_to(dist.constraints.simplex).inv(weights)


@pytest.mark.parametrize("condition_on_global", [False, True])
def test_median_is_the_middle_quantile_detached_and_the_same_again(condition_on_global) -> None:
    guide = ready_guide(condition_on_global=condition_on_global)
    state = torch.get_rng_state()
    quantiles = guide.quantiles([0.1, 0.5, 0.9], DATA[:7])
    median = guide.median(DATA[:7])
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: tuple(v.shape) for n, v in quantiles.items()} == {
        "loc": (3,),
        "scale": (3,),
        "z": (3, 7),
        "weights": (3, 7, 3),
    }
    for name in median:
        assert torch.allclose(quantiles[name][1], median[name], atol=1e-5)
        assert not median[name].requires_grad
    assert (quantiles["z"][0] < quantiles["z"][2]).all()
    alone = guide.median(DATA[3:4])["z"]  # does not depend on the company of a datum
    assert torch.allclose(alone, median["z"][3:4], atol=1e-5)
    with torch.no_grad(), pyro.plate("draws", 2000, dim=-2):
        draws = guide(DATA[:7])["z"]
    spread = draws.std(0)
    for i, level in enumerate((0.1, 0.5, 0.9)):
        error = (quantiles["z"][i] - draws.quantile(level, dim=0)) / spread
        assert error.abs().max() < 0.2


@pytest.mark.parametrize("quantile", [-0.1, 1.1, float("nan")])
def test_quantile_outside_the_unit_interval_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ready_guide().quantiles([quantile], DATA)


def test_posterior_agrees_with_the_guides_own_draws() -> None:
    guide = ready_guide()
    posterior = guide.get_posterior(DATA[:4])
    assert posterior.batch_shape == (4,) and posterior.event_shape == (LOCAL_DIM,)
    trace = poutine.trace(guide).get_trace(DATA[:4])
    trace.compute_log_prob()
    node = trace.nodes["_AmortizedSplineFlow_latent"]
    latent = node["value"].detach()
    assert torch.allclose(node["log_prob"], node["scale"] * posterior.log_prob(latent), atol=1e-3)
    values = guide.unpack(latent)
    assert torch.allclose(values["z"], trace.nodes["z"]["value"])
    assert torch.allclose(values["weights"], trace.nodes["weights"]["value"])
    assert posterior.variance.shape == (4, LOCAL_DIM)


def test_posterior_is_conditioned_on_given_globals() -> None:
    guide = ready_guide(condition_on_global=True)
    at_median = guide.get_posterior(DATA[:4])
    medians = {name: guide.median(DATA)[name] for name in ("loc", "scale")}
    point = torch.zeros(4, LOCAL_DIM)
    given = guide.get_posterior(DATA[:4], given=medians).log_prob(point)
    assert torch.allclose(at_median.log_prob(point), given, atol=1e-4)
    elsewhere = guide.get_posterior(DATA[:4], given={**medians, "loc": torch.tensor(3.0)})
    assert not torch.allclose(elsewhere.log_prob(point), given, atol=1e-2)


# In company


@pytest.mark.parametrize("condition_on_global", [False, True])
@pytest.mark.parametrize("path_gradient", [False, True])
def test_vectorized_particles_give_the_same_expected_loss(
    path_gradient, condition_on_global
) -> None:
    guide = ready_guide(path_gradient=path_gradient, condition_on_global=condition_on_global)
    with torch.no_grad():
        elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
        expected = elbo.loss(model, guide, DATA[:6])
        one_by_one = torch.tensor([Trace_ELBO().loss(model, guide, DATA[:6]) for _ in range(100)])
    assert abs(expected - float(one_by_one.mean())) < 4 * float(one_by_one.std()) / 10
    assert abs(expected) > 1.0


def test_works_under_handlers() -> None:
    guide = ready_guide()
    with poutine.scale(scale=0.5):
        scaled = poutine.trace(guide).get_trace(DATA[:6])
    assert scaled.nodes["z"]["scale"] == 1.0  # half of 12 / 6
    first = poutine.trace(guide).get_trace(DATA[:6])
    again = poutine.trace(poutine.replay(guide, trace=first)).get_trace(DATA[:6])
    assert torch.equal(again.nodes["z"]["value"], first.nodes["z"]["value"])
    fixed = {"_AmortizedSplineFlow_latent": torch.zeros(6, LOCAL_DIM)}
    assert bool((poutine.condition(guide, data=fixed)(DATA[:6])["z"] == 0).all())
    with pyro.plate_stack("outer", (3, 2), rightmost_dim=-2):
        values = guide(DATA[:6])
    assert values["z"].shape == (3, 2, 6) and values["weights"].shape == (3, 2, 6, 3)
    assert values["z"].unique().numel() == 36


def test_part_of_a_guide_list_trains_and_is_copied(no_head_start) -> None:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["loc", "scale"])))
    guide.append(make_guide(poutine.block(model, hide=["loc", "scale"])))
    step(guide, DATA, of=model)
    before = values_of(guide[1])
    step(guide, DATA, of=model)
    assert still(before, guide[1]) == set()
    assert guide[1].plates is guide.plates
    assert any(name.startswith("AutoGuideList.1.flow") for name in pyro.get_param_store())
    assert set(guide.median(DATA)) == SITES
    expected = guide.median(DATA)["z"]
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert twin[1].master() is twin
        assert torch.equal(twin.median(DATA)["z"], expected)


def test_works_beside_enumerated_local_latents() -> None:
    def mixture(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", SIZE, subsample_size=len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(shift.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z + k, 0.5), obs=x[..., 0])

    guide = AutoGuideList(mixture)
    guide.append(make_guide(poutine.block(mixture, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["k"])))
    guide(DATA)
    before = values_of(guide[0])
    step(guide, DATA, of=mixture, elbo=TraceEnum_ELBO(max_plate_nesting=1), steps=2)
    assert still(before, guide[0]) == waiting(guide[0])


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_for_data_that_were_not_seen(parallel: bool) -> None:
    guide = ready_guide()
    new = torch.randn(7, 2)
    draws = Predictive(model, guide=guide, num_samples=5, parallel=parallel)(new)
    assert draws["z"].reshape(5, 7).unique().numel() == 35
    assert draws["weights"].reshape(5, 7, 3).sum(-1).allclose(torch.ones(5, 7))


# Global guides


def two_normals() -> AutoNormal:
    return AutoNormal(poutine.block(model, hide=["z", "weights"]))


def by_hand(x: Tensor) -> dict[str, Tensor]:
    loc = pyro.param("by_hand", torch.tensor([0.1, 0.2]))
    return {
        "loc": pyro.sample("loc", dist.Normal(loc[0], 0.1)),
        "scale": pyro.sample("scale", dist.LogNormal(loc[1], 0.1)),
    }


@pytest.mark.parametrize(
    "make",
    [
        two_normals,
        lambda: AutoDelta(poutine.block(model, hide=["z", "weights"])),
        lambda: by_hand,
    ],
)
@pytest.mark.parametrize("condition_on_global", [False, True])
def test_callers_global_guide_is_used_trained_and_summarised(make, condition_on_global) -> None:
    guide = make_guide(global_guide=make(), condition_on_global=condition_on_global).setup(DATA)
    step(guide, DATA, of=model)
    store = {name: pyro.param(name).detach().clone() for name in pyro.get_param_store()}
    step(guide, DATA[:5], of=model)
    fixed = {n for n in store if torch.equal(store[n], pyro.param(n))}
    known = {name for name in fixed if "standardization" in name}
    assert fixed - known == {f"AmortizedSplineFlow.{name}" for name in waiting(guide)}
    assert set(guide.median(DATA)) == SITES
    quantiles = guide.quantiles([0.1, 0.9], DATA)
    assert quantiles["loc"].shape == (2,) and quantiles["z"].shape == (2, SIZE)
    assert set(guide(DATA)) == SITES


def test_global_guide_that_leaves_latents_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['loc', 'scale'\], got one for \['loc'\]"):
        make_guide(global_guide=AutoNormal(poutine.block(model, expose=["loc"]))).setup(DATA)
    with pytest.raises(ValueError, match="z"):
        make_guide(global_guide=AutoNormal(model)).setup(DATA)


def test_conditioning_on_globals_needs_some() -> None:
    def without(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="condition_on_global"):
        make_guide(without, condition_on_global=True).setup(DATA)


# Encoders


class BayesStyle(PyroModule):
    """An encoder whose parameters Pyro knows by its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.gain = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)


@pytest.mark.parametrize("make", [Encoder, BayesStyle, lambda: nn.Sequential(BayesStyle())])
def test_encoder_module_is_trained_and_in_the_store_once(make) -> None:
    encoder = make()
    guide = make_guide(encoder=encoder).setup(DATA)
    with torch.no_grad():
        guide.affine.weight.normal_().div_(guide.affine.weight_rate)  # it is zero at first
    step(guide, DATA, of=model)
    before = values_of(encoder)
    step(guide, DATA, of=model)
    assert still(before, encoder) == set() and len(before) >= 2
    entries = [name for name in pyro.get_param_store() if "encoder" in name]
    assert len(entries) == len(before)
    assert all(name.startswith("AmortizedSplineFlow.encoder.") for name in entries)


def test_function_may_register_its_network() -> None:
    network = Encoder()

    def encoder(x: Tensor) -> Tensor:
        return pyro.module("network", network)(x)

    guide = make_guide(encoder=encoder).setup(DATA)
    guide.affine.weight.data.normal_()
    before = values_of(network)
    step(guide, DATA, of=model)
    assert still(before, network) == set()


def test_function_with_a_hidden_network_warns() -> None:
    network = Encoder()
    with pytest.warns(UserWarning, match="2 parameters that neither"):
        make_guide(encoder=lambda x: network(x)).setup(DATA)


@pytest.mark.parametrize(
    ("encoder", "got"),
    [
        (lambda x: x[..., :1], r"\(12, 1\)"),
        (lambda x: x[..., 0], r"\(12,\)"),
        (lambda x: x[None], r"\(1, 12, 2\)"),
        (lambda x: (x, x), "tuple"),
    ],
)
def test_encoder_output_of_another_shape_is_refused(encoder, got: str) -> None:
    with pytest.raises(ValueError, match=rf"\(batch, 2\).*got {got}"):
        make_guide(encoder=encoder).setup(DATA)


# Jit, copies, the store, devices


def test_jit_elbo_gives_the_loss_and_trains() -> None:
    guide = ready_guide(condition_on_global=True, path_gradient=False)
    before = values_of(guide)
    settings = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    jitted = JitTrace_ELBO(ignore_jit_warnings=True, **settings)
    step(guide, DATA, of=model, elbo=jitted, steps=2)
    assert still(before, guide) == set()
    losses = []
    for elbo in (jitted, Trace_ELBO(**settings)):
        pyro.set_rng_seed(3)
        losses.append(elbo.loss_and_grads(model, guide, DATA))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_jit_traces_the_guide() -> None:
    guide = ready_guide()
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of torch's own distributions
        traced = torch.jit.trace_module(guide, {"call": (DATA,)}, check_trace=False)
    pyro.set_rng_seed(1)
    got = traced.call(DATA)
    pyro.set_rng_seed(1)
    for a, b in zip(got, guide.call(DATA), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("make", [None, two_normals])
def test_copies_after_steps_are_the_same_guide_and_train_on(make) -> None:
    guide = make_guide(global_guide=make and make(), condition_on_global=True).setup(DATA)
    step(guide, DATA, of=model, steps=2)
    expected = guide.median(DATA)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(guide)
    assert guide.model is not None and guide._plain_model[0] is not None
    step(guide, DATA[:5], of=model)  # the original goes on
    pyro.clear_param_store()
    for twin in (loaded, copied):
        assert all(torch.equal(twin.median(DATA)[n], expected[n]) for n in expected)
        assert twin(DATA[:5])["z"].shape == (5,)
    before = values_of(copied)
    step(copied, DATA, of=model)
    assert still(before, copied) == waiting(copied)


def test_store_brings_back_the_distribution() -> None:
    guide = ready_guide(condition_on_global=True)
    guide(DATA)
    expected = log_prob_of(guide)
    state = pyro.get_param_store().get_state()
    state = pickle.loads(pickle.dumps({k: dict(v) for k, v in state.items()}))
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    other = make_guide(condition_on_global=True).setup(DATA)
    other(DATA)
    assert torch.allclose(log_prob_of(other), expected, atol=1e-5)
    fresh = make_guide(condition_on_global=True)
    pyro.clear_param_store()
    assert not torch.allclose(log_prob_of(fresh.setup(DATA)), expected, atol=1e-2)


@pytest.mark.parametrize("make", [None, two_normals])
def test_second_guide_in_one_process_starts_fresh_and_both_train(make) -> None:
    first = make_guide(global_guide=make and make())
    step(first, DATA, of=model)
    with pytest.warns(UserWarning, match="AmortizedSplineFlow_1"):
        second = make_guide(global_guide=make and make()).setup(DATA)
    for guide in (first, second):
        before = values_of(guide)
        step(guide, DATA, of=model, steps=2)
        assert still(before, guide) == waiting(guide)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert shared == set()


def test_cleared_store_is_no_harm() -> None:
    guide = make_guide()
    step(guide, DATA, of=model)
    pyro.clear_param_store()
    before = values_of(guide)
    step(guide, DATA, of=model)
    assert len(still(before, guide)) < len(before)


def test_module_local_parameters_train_without_the_store() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = make_guide(encoder=BayesStyle()).setup(DATA)
        loss_fn = Trace_ELBO()(model, guide)
        loss_fn(DATA)
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
        before = values_of(guide)
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(DATA).backward()
            optimizer.step()
        assert still(before, guide) == waiting(guide)
        assert len(pyro.get_param_store()) == 0


def test_dtype_is_the_models_and_conversion_before_setup_wins() -> None:
    guide = make_guide(encoder=Encoder().double()).setup(DATA.double())
    assert guide.affine.weight.dtype == torch.float32  # the latents of the model are
    converted = make_guide(encoder=Encoder()).double()
    copied = copy.deepcopy(converted)
    with pytest.warns(UserWarning, match="AmortizedSplineFlow_1"):
        converted.setup(DATA.double())
    with pytest.warns(UserWarning, match="AmortizedSplineFlow_2"):
        copied.setup(DATA.double())
    for twin in (converted, copied):
        assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert converted(DATA.double())["z"].dtype == torch.float64
