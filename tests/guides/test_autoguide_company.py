"""AutoSplineFlow in company: guide lists, handlers, the param store, NeuTra, and before its setup."""

import copy
import gc
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiscreteParallel,
    AutoGuideList,
    init_to_sample,
)
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_flowkit.training import fit
from tests.tiny import DATA, LATENT_DIM, make_guide, model, ready_guide, step

# 6: in company


def two_part_list(of=model) -> AutoGuideList:
    guide = AutoGuideList(of)
    guide.append(make_guide(poutine.block(of, expose=["loc", "scale"])))
    guide.append(make_guide(poutine.block(of, expose=["weights", "local"]), affine="diagonal"))
    return guide


def test_06_guide_list_of_two_parts_trains() -> None:
    guide = two_part_list()
    step(guide, DATA, steps=2)
    assert {".".join(name.split(".")[:2]) for name in pyro.get_param_store()} == {
        "AutoGuideList.0",
        "AutoGuideList.1",
    }
    before = [p.detach().clone() for p in guide.parameters()]
    step(guide, DATA)
    assert len(before) > 10
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    assert guide[1].plates is guide.plates
    assert set(guide.median(DATA)) == {"loc", "scale", "weights", "local"}
    assert guide.quantiles([0.2, 0.8], DATA)["local"].shape == (2, 4)
    assert guide[0].latent_dim + guide[1].latent_dim == LATENT_DIM


def test_06_master_is_held_weakly() -> None:
    guide = two_part_list()
    guide()
    assert isinstance(guide[0].master, weakref.ref) and guide[0].master() is guide
    part, ref = guide[0], weakref.ref(guide)
    del guide
    gc.collect()
    assert ref() is None and part.master() is None


def test_06_guide_list_is_copied_and_saved() -> None:
    guide = two_part_list()
    step(guide, DATA)
    expected = guide.median(DATA)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        pyro.clear_param_store()
        assert twin[0].master() is twin
        assert all(torch.equal(twin.median(DATA)[name], expected[name]) for name in expected)


def test_06_works_beside_auto_discrete_parallel() -> None:
    def mixture(data: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("rows", len(data)):
            k = pyro.sample("k", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Normal(locs[k], 0.5), obs=data)

    guide = AutoGuideList(mixture)
    guide.append(make_guide(poutine.block(mixture, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["k"])))
    guide(DATA)
    before = guide[0].affine.raw_loc.detach().clone()
    loss = step(guide, DATA, of=mixture, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert torch.isfinite(torch.tensor(loss))
    assert not torch.equal(guide[0].affine.raw_loc, before)


def test_06_works_under_handlers() -> None:
    guide = ready_guide()
    with poutine.mask(mask=False):
        masked = poutine.trace(guide).get_trace()
    masked.compute_log_prob()
    assert masked.nodes["_AutoSplineFlow_latent"]["log_prob_sum"] == 0
    with poutine.scale(scale=0.5):
        scaled = poutine.trace(guide).get_trace()
    scaled.compute_log_prob()
    node = scaled.nodes["_AutoSplineFlow_latent"]
    with torch.no_grad():
        expected = 0.5 * guide.get_posterior().log_prob(node["value"])
    assert torch.allclose(node["log_prob_sum"], expected, atol=1e-4)
    first = poutine.trace(guide).get_trace()
    again = poutine.trace(poutine.replay(guide, trace=first)).get_trace()
    assert torch.equal(again.nodes["local"]["value"], first.nodes["local"]["value"])
    fixed = {"_AutoSplineFlow_latent": torch.zeros(LATENT_DIM)}
    conditioned = poutine.condition(guide, data=fixed)()
    assert conditioned["loc"] == 0 and conditioned["scale"] == 1
    blocked = poutine.trace(poutine.block(guide, hide=["loc"])).get_trace()
    assert "loc" not in blocked.nodes and "local" in blocked.nodes


def test_06_works_inside_an_outer_plate_stack() -> None:
    guide = ready_guide()
    with pyro.plate_stack("outer", (3, 2), rightmost_dim=-2):
        values = guide()
    assert {n: tuple(v.shape) for n, v in values.items()} == {
        "loc": (3, 2, 1),
        "scale": (3, 2, 1),
        "weights": (3, 2, 1, 3),
        "local": (3, 2, 4),
    }
    assert values["loc"].unique().numel() == 6


@pytest.mark.parametrize("path_gradient", [False, True])
def test_06_vectorized_particles_give_the_same_expected_loss(path_gradient: bool) -> None:
    guide = ready_guide(path_gradient=path_gradient)
    with torch.no_grad():
        elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
        expected = elbo.loss(model, guide, DATA)
        one_by_one = torch.tensor([Trace_ELBO().loss(model, guide, DATA) for _ in range(100)])
    assert abs(expected - float(one_by_one.mean())) < 4 * float(one_by_one.std()) / 10
    assert abs(expected) > 1.0


def test_06_predictive_draws_from_it() -> None:
    guide = ready_guide()
    draws = Predictive(model, guide=guide, num_samples=5, parallel=True)(DATA)
    assert draws["local"].shape == (5, 4) and draws["weights"].shape == (5, 1, 3)


# 7: submodules (copying, saving and jit are in test_pitfalls.py)


def test_07_every_submodule_attribute_survives_hasattr_and_is_registered_once() -> None:
    guide = ready_guide()
    for module in guide.modules():
        for name in dir(module):
            hasattr(module, name)
    parameters = list(guide.named_parameters(remove_duplicate=False))
    assert len(parameters) == len({id(p) for _, p in parameters})
    assert guide.get_transform().sign == 1


# 8: param store (more in test_pitfalls.py and test_store.py)


def test_08_clearing_the_store_is_safe() -> None:
    guide = make_guide()
    step(guide)
    expected = guide.median()
    pyro.clear_param_store()
    assert all(torch.equal(guide.median()[name], expected[name]) for name in expected)
    before = guide.affine.raw_loc.detach().clone()
    step(guide)
    assert not torch.equal(guide.affine.raw_loc, before)
    assert pyro.get_param_store()._params["AutoSplineFlow.affine.raw_loc"] is guide.affine.raw_loc


def test_08_module_local_params_train_with_a_torch_optimizer() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = make_guide()
        loss_fn = Trace_ELBO()(model, guide)
        loss_fn(DATA)
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(DATA).backward()
            optimizer.step()
        assert len(before) > 5
        assert all(not torch.equal(p, before[n]) for n, p in guide.named_parameters())
        stated = poutine.trace(guide).get_trace(DATA).param_nodes
        assert {name.partition(".")[2] for name in stated} == set(before), "handlers see them"
        assert len(pyro.get_param_store()) == 0


def test_08_module_local_params_are_trained_by_fit() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = ready_guide()  # no Gaussian any more, so that only the steps move it
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        fit(model, guide, args=(DATA,), max_steps=3, lr=0.01, num_particles=4, progress=False)
        assert len(before) > 5
        assert all(not torch.equal(p, before[n]) for n, p in guide.named_parameters())
        assert len(pyro.get_param_store()) == 0


def test_08_store_brings_back_the_gaussian_that_training_started_from(tmp_path) -> None:
    """Its location and scale are buffers: a store of parameters alone would lose them."""
    guide = make_guide().setup(DATA)
    triangle = torch.eye(LATENT_DIM) + 0.3 * torch.ones(LATENT_DIM, LATENT_DIM).tril(-1)
    guide.affine.restart(torch.arange(float(LATENT_DIM)), triangle)
    step(guide, DATA)
    expected = guide.quantiles([0.2, 0.8])
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    del guide
    fresh = make_guide().setup(DATA)
    got = fresh.quantiles([0.2, 0.8])
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# 9: NeuTra


def test_09_neutra_runs() -> None:
    guide = make_guide()
    step(guide, DATA, steps=2)
    assert isinstance(guide, AutoContinuous)
    assert set(guide.plates) == {"rows"}
    neutra = NeuTraReparam(guide)
    reparametrised = neutra.reparam(model)
    trace = poutine.trace(reparametrised).get_trace(DATA)
    latents = [n for n, _ in trace.iter_stochastic_nodes() if n != "rows"]
    assert latents == ["loc_shared_latent"]
    original = poutine.trace(
        poutine.condition(
            model, data={n: trace.nodes[n]["value"] for n in ("loc", "scale", "weights", "local")}
        )
    ).get_trace(DATA)
    z = trace.nodes["loc_shared_latent"]["value"]
    x = guide.get_transform()(z)
    jacobian = guide.get_transform().log_abs_det_jacobian(z, x)
    for site, value in guide._unpack_latent(x):
        to = torch.distributions.biject_to(site["fn"].support)
        jacobian = jacobian + to.log_abs_det_jacobian(value, to(value)).sum()
    expected = original.log_prob_sum() + jacobian
    assert torch.allclose(trace.log_prob_sum(), expected, atol=1e-3)
    kernel = NUTS(reparametrised, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(DATA)
    draws = neutra.transform_sample(mcmc.get_samples()["loc_shared_latent"].unsqueeze(-2))
    assert draws["weights"].shape == (3, 1, 3)
    assert torch.isfinite(draws["local"]).all()


# 10: before setup


@pytest.mark.parametrize(
    "action",
    [
        lambda g: list(g.parameters()),
        lambda g: list(g.named_parameters()),
        lambda g: g.state_dict(),
        lambda g: g.load_state_dict({}),
        lambda g: g.get_posterior(),
        lambda g: g.get_transform(),
        lambda g: g.get_base_dist(),
        lambda g: g.median(),
        lambda g: g.quantiles([0.5]),
        lambda g: g.sample_latent(),
        lambda g: g._loc_scale(),
    ],
)
def test_10_before_setup_errors_name_it(action) -> None:
    with pytest.raises(RuntimeError, match="setup"):
        action(make_guide())


def test_10_state_dict_round_trip() -> None:
    first = ready_guide()
    expected = first.median()
    state = first.state_dict()
    pyro.clear_param_store()
    second = make_guide(init_loc_fn=init_to_sample).setup()
    second.load_state_dict(state)
    assert all(torch.equal(second.median()[n], expected[n]) for n in expected)
    step(second)


def test_10_conversion_before_setup_survives_copying_and_pickling() -> None:
    guide = make_guide().double()
    pickle.dumps(guide)
    twin = copy.deepcopy(guide).setup()
    assert {p.dtype for p in twin.parameters()} == {torch.float64}


# 11 is in test_pitfalls.py: subsampled local latents are refused
