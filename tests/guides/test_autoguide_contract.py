"""AutoSplineFlow keeps what Pyro expects of an autoguide: the numbers in the names are the points of that list."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    init_to_value,
)

from pyro_flowkit import FlowDistribution
from tests.tiny import DATA, LATENT_DIM, make_guide, model, ready_guide

# 1: construction


@pytest.mark.parametrize("init_scale", [0, 1, 0.0, -0.1, "0.1", True])
def test_01_init_scale_must_be_a_positive_float(init_scale) -> None:
    with pytest.raises(ValueError, match="init_scale"):
        make_guide(init_scale=init_scale)


@pytest.mark.parametrize("bad", [{"base": "cauchy"}, {"affine": "lu"}, {"num_transforms": 0}])
def test_01_bad_settings_are_said_at_construction(bad) -> None:
    with pytest.raises(ValueError, match=r"Expected .* got"):
        make_guide(**bad)


def test_01_model_is_wrapped_by_init_and_is_no_submodule() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self) -> None:
            pyro.sample("z", dist.Normal(self.linear.weight.sum(), 1.0))

    guide = make_guide(Model(), init_loc_fn=init_to_value(values={"z": torch.tensor(3.0)}))
    guide.setup()
    assert not any("linear" in name for name, _ in guide.named_parameters())
    assert not any(isinstance(module, Model) for module in guide.modules())
    assert poutine.trace(guide.model).get_trace().nodes["z"]["value"] == 3.0


def test_01_pickle_drops_model_and_master_and_the_guide_keeps_them() -> None:
    guides = AutoGuideList(model)
    guides.append(make_guide(poutine.block(model, hide=["loc"])))
    guides.append(AutoDelta(poutine.block(model, expose=["loc"])))
    guides()
    state = guides[0].__getstate__()
    assert state["_model"] is None and state["master"] is None
    assert guides[0].master() is guides and guides[0].model is not None
    pickle.dumps(guides[0])
    assert guides[0].model is not None


# 2: prototype and setup


def test_02_setup_is_explicit_and_lazy() -> None:
    guide = make_guide()
    assert guide.prototype_trace is None
    assert guide.setup(DATA) is guide
    prototype, parameters = guide.prototype_trace, list(guide.parameters())
    assert guide.latent_dim == LATENT_DIM
    assert set(guide._prototype_frames) == {"rows"}
    shapes = {"loc": (), "scale": (), "weights": (2,), "local": (4,)}
    assert {name: tuple(shape) for name, shape in guide._unconstrained_shapes.items()} == shapes
    assert {name: len(stack) for name, stack in guide._cond_indep_stacks.items()} == {
        "loc": 0,
        "scale": 0,
        "weights": 0,
        "local": 1,
    }
    guide.setup(DATA)
    guide(DATA)
    assert guide.prototype_trace is prototype
    assert all(a is b for a, b in zip(guide.parameters(), parameters, strict=True))


def test_02_no_latents_is_a_runtime_error() -> None:
    def observed() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    guide = make_guide(observed)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no latent"):
            guide()


def test_02_discrete_latent_points_to_enumeration() -> None:
    def discrete() -> None:
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="enumeration.html"):
        make_guide(discrete)()


def test_02_sphere_points_to_projected_normal_reparam() -> None:
    def sphere() -> None:
        pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))

    with pytest.raises(ValueError, match="ProjectedNormalReparam"):
        make_guide(sphere)()


# 3: forward


def test_03_forward_has_one_auxiliary_site_and_a_delta_per_latent() -> None:
    guide = ready_guide()
    trace = poutine.trace(guide).get_trace()
    samples = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
    auxiliary = samples.pop("_AutoSplineFlow_latent")
    assert auxiliary["infer"]["is_auxiliary"] is True
    assert isinstance(auxiliary["fn"], FlowDistribution)
    assert auxiliary["value"].shape == (LATENT_DIM,)
    plates = {n for n in samples if n == "rows"}
    assert set(samples) - plates == {"loc", "scale", "weights", "local"}
    for name in set(samples) - plates:
        assert isinstance(samples[name]["fn"], dist.Delta)
    assert [f.name for f in samples["local"]["cond_indep_stack"]] == ["rows"]
    assert samples["loc"]["cond_indep_stack"] == ()
    assert samples["weights"]["fn"].event_dim == 1
    returned = trace.nodes["_RETURN"]["value"]
    assert set(returned) == {"loc", "scale", "weights", "local"}
    assert all(returned[name] is samples[name]["value"] for name in returned)


def test_03_log_density_is_that_of_the_constrained_latents() -> None:
    guide = ready_guide()
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    scale, latent = trace.nodes["scale"], trace.nodes["_AutoSplineFlow_latent"]["value"]
    assert torch.allclose(scale["log_prob"], -scale["value"].log(), atol=1e-5)
    total = trace.nodes["_AutoSplineFlow_latent"]["log_prob"]
    assert torch.allclose(total, guide.get_posterior().log_prob(latent.detach()), atol=1e-4)


def test_03_log_density_is_zero_where_the_mask_is_false() -> None:
    guide = ready_guide()
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace()
    assert bool((trace.nodes["scale"]["fn"].log_density == 0.0).all())


def test_03_call_returns_a_tuple_sorted_by_name() -> None:
    guide = ready_guide()
    pyro.set_rng_seed(1)
    by_name = guide()
    pyro.set_rng_seed(1)
    values = guide.call()
    assert isinstance(values, tuple)
    for value, name in zip(values, ["loc", "local", "scale", "weights"], strict=True):
        assert torch.equal(value, by_name[name])


# 4: posterior


def test_04_base_and_transform_need_no_arguments_and_make_the_posterior() -> None:
    guide = ready_guide()
    base, transform, posterior = (
        guide.get_base_dist(),
        guide.get_transform(),
        guide.get_posterior(),
    )
    assert base.event_shape == (LATENT_DIM,)
    assert transform.domain.event_dim == transform.codomain.event_dim == 1
    assert isinstance(posterior, dist.TransformedDistribution)
    by_hand = dist.TransformedDistribution(base, [transform])
    x = posterior.sample((5,))
    assert torch.allclose(posterior.log_prob(x.clone()), by_hand.log_prob(x), atol=1e-4)
    assert guide.sample_latent().shape == (LATENT_DIM,)


def test_04_unpack_latent_puts_particles_to_the_left() -> None:
    guide = ready_guide()
    latent = torch.randn(7, 1, LATENT_DIM)
    shapes = {site["name"]: tuple(value.shape) for site, value in guide._unpack_latent(latent)}
    assert shapes == {"loc": (7, 1), "scale": (7, 1), "weights": (7, 1, 2), "local": (7, 4)}


def test_04_loc_scale_describe_the_posterior() -> None:
    guide = make_guide(init_scale=0.25).setup()
    loc, scale = guide._loc_scale()
    assert torch.allclose(loc, guide._init_loc(), atol=1e-5)
    assert torch.allclose(scale, torch.full((LATENT_DIM,), 0.25), rtol=0.05)


# 5: medians and quantiles

VALUES = {
    "loc": torch.tensor(0.7),
    "scale": torch.tensor(2.0),
    "weights": torch.tensor([0.2, 0.3, 0.5]),
    "local": torch.tensor([1.0, -2.0, 0.5, 30.0]),
}


@pytest.mark.parametrize("base", ["normal", "student_t"])
@pytest.mark.parametrize("affine", ["full", "diagonal"])
def test_05_init_values_and_scale_are_honoured(base: str, affine: str) -> None:
    guide = make_guide(
        init_loc_fn=init_to_value(values=VALUES), init_scale=0.3, base=base, affine=affine
    ).setup()
    for name, value in guide.median().items():
        assert torch.allclose(value, VALUES[name], atol=1e-5), name
    assert torch.allclose(guide.affine.scale.diagonal(), torch.tensor(0.3), atol=1e-6)
    if base == "normal":
        fresh = dist.Normal(guide._init_loc(), 0.3).to_event(1)
        x = fresh.sample((10,))
        assert torch.allclose(guide.get_posterior().log_prob(x), fresh.log_prob(x), atol=1e-3)


def test_05_median_is_the_middle_quantile_stacked_and_detached() -> None:
    guide = ready_guide()
    quantiles = guide.quantiles([0.1, 0.5, 0.9], DATA)
    median = guide.median(DATA)
    assert {n: tuple(v.shape) for n, v in quantiles.items()} == {
        "loc": (3,),
        "scale": (3,),
        "weights": (3, 3),
        "local": (3, 4),
    }
    for name in median:
        assert torch.allclose(quantiles[name][1], median[name], atol=1e-5)
        assert not median[name].requires_grad and not quantiles[name].requires_grad
    assert (quantiles["local"][0] < quantiles["local"][2]).all()
    again = guide.quantiles(torch.tensor([0.1, 0.5, 0.9]))
    assert all(torch.allclose(again[name], quantiles[name], atol=1e-5) for name in again)


def test_05_quantiles_and_variance_agree_with_draws() -> None:
    guide = ready_guide()
    with torch.no_grad():
        draws = guide.get_posterior().sample((20_000,))
    low, high = guide.quantiles([0.1, 0.9])["local"]
    drawn = draws[:, 4:].quantile(torch.tensor([0.1, 0.9]), dim=0)
    sd = draws.std(0)
    assert ((low - drawn[0]) / sd[4:]).abs().max() < 0.06
    assert ((high - drawn[1]) / sd[4:]).abs().max() < 0.06
    variance = guide.get_posterior().variance
    assert torch.allclose(variance, draws.var(0), rtol=0.08)
    fresh = make_guide(init_scale=0.2)
    with pytest.warns(UserWarning):
        fresh.setup()
    low, high = fresh.quantiles([0.1587, 0.8413])["loc"]
    assert float((high - low) / 2) == pytest.approx(
        float(fresh.get_posterior().variance[0].sqrt()), rel=0.05
    )


def test_05_summaries_leave_the_random_state_alone() -> None:
    guide = ready_guide()
    state = torch.get_rng_state()
    guide.median()
    guide.get_posterior().variance  # noqa: B018
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("quantile", [-0.1, 1.1, float("nan")])
def test_05_quantile_outside_the_unit_interval_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ready_guide().quantiles([quantile])


# 6 to 10 are in test_autoguide_company.py, 11 is in test_pitfalls.py
