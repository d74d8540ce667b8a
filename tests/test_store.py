"""Modules and the param store: names, adoption, refusal, and the private names of Pyro that this leans on."""

import copy
import gc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor

from pyro_flowkit import SplineFlow
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}
X = torch.linspace(-2.0, 2.0, 10).reshape(5, 2)


def make_flow(**settings) -> SplineFlow:
    return SplineFlow(2, **{**TINY, **settings})


def train(flow: SplineFlow, steps: int = 2) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(), obs=x)

    svi = SVI(model, lambda x: None, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(X)


def density(flow: SplineFlow) -> Tensor:
    with torch.no_grad():
        return flow().log_prob(X)


def reload(tmp_path) -> None:
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    gc.collect()
    pyro.get_param_store().load(tmp_path / "store.pt")


def test_store_holds_the_very_tensors_under_deterministic_names() -> None:
    flow = make_flow()
    flow()
    store = pyro.get_param_store()
    state = flow.state_dict(keep_vars=True)
    floats = {f"SplineFlow.{k}": v for k, v in state.items() if v.is_floating_point()}
    assert set(store.keys()) == set(floats)
    for name, tensor in floats.items():
        entry = store._params[name]
        assert entry is tensor or (
            not tensor.requires_grad and entry.data_ptr() == tensor.data_ptr()
        )
    assert "SplineFlow.standardization.loc" in floats


def test_store_round_trip_gives_a_fresh_flow_the_same_distribution(tmp_path) -> None:
    flow = make_flow(base="student_t", mixing="permute").standardize(
        5 + 3 * torch.randn(50, 2), "full"
    )
    train(flow)
    expected = density(flow)
    reload(tmp_path)
    del flow
    fresh = make_flow(base="student_t", mixing="permute")
    assert torch.equal(fresh.log_prob(X), expected), "already before its first call"
    assert torch.equal(density(fresh), expected)
    assert torch.equal(fresh.standardization.loc, pyro.param("SplineFlow.standardization.loc"))


def test_store_loaded_under_a_living_flow_reaches_it(tmp_path) -> None:
    flow = make_flow()
    train(flow)
    expected = density(flow)
    pyro.get_param_store().save(tmp_path / "store.pt")
    train(flow)
    assert not torch.equal(density(flow), expected)
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert torch.equal(flow.log_prob(X), expected)
    train(flow)  # and it goes on training
    assert not torch.equal(density(flow), expected)


@pytest.mark.parametrize("called_before", [False, True])
def test_store_of_another_shape_is_refused(tmp_path, called_before: bool) -> None:
    flow = make_flow(hidden_dims=[8, 8])
    flow()
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    other = make_flow(hidden_dims=[9, 9])
    if called_before:
        other()
    pyro.get_param_store().load(tmp_path / "store.pt")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Expected .* of shape .*, got shape"):
            other()


def test_store_with_missing_entries_is_refused(tmp_path) -> None:
    make_flow(num_transforms=3)()
    reload(tmp_path)
    with pytest.raises(ValueError, match="got also"):
        make_flow(num_transforms=2)()
    pyro.clear_param_store()
    make_flow(num_transforms=2)()
    reload(tmp_path)
    with pytest.raises(ValueError, match="got nothing"):
        make_flow(num_transforms=3)()


def test_second_living_flow_takes_a_suffix_and_both_train() -> None:
    first, second = make_flow(), make_flow()
    train(first)
    before = density(first)
    train(second)
    assert torch.equal(density(first), before)
    assert not torch.equal(density(second), before)
    after = density(second)
    train(first)
    assert torch.equal(density(second), after)
    names = {name.split(".")[0] for name in pyro.get_param_store()}
    assert names == {"SplineFlow", "SplineFlow_1"}


def test_unclaimed_second_flow_does_not_read_the_entries_of_a_living_first() -> None:
    first, second = make_flow(), make_flow()
    expected = second.log_prob(X)
    train(first)
    assert torch.equal(second.log_prob(X), expected)


@pytest.mark.parametrize("hidden_dims", [[8, 8], [9, 9]])
def test_new_flow_does_not_take_over_what_a_dead_one_left(hidden_dims: list[int]) -> None:
    first = make_flow().standardize(X + 100.0, "full")
    train(first)
    del first
    fresh = make_flow(hidden_dims=hidden_dims)
    expected = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(X)
    torch.testing.assert_close(fresh.log_prob(X), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(density(fresh), expected, rtol=0, atol=1e-5)
    train(fresh)
    name = "SplineFlow.layers.0.conditioner.packed"
    assert pyro.get_param_store()._params[name] is fresh.layers[0].conditioner.packed


def test_density_in_a_function_is_that_of_its_own_data() -> None:
    def mean_log_prob(x: Tensor) -> float:
        flow = SplineFlow(2).standardize(x, "full")
        return float(flow().log_prob(x).mean().detach())

    x = torch.randn(1000, 2)
    first, second = mean_log_prob(x), mean_log_prob(x + 100.0)
    assert first == pytest.approx(-2.84, abs=0.2)
    assert second == pytest.approx(first, abs=1e-3)


def test_loop_over_folds_gives_what_separate_programs_give() -> None:
    def fold(seed: int) -> Tensor:
        pyro.set_rng_seed(seed)
        flow = make_flow().standardize(X + seed)
        train(flow, 3)
        return density(flow)

    expected = []
    for seed in range(5):
        pyro.clear_param_store()
        expected.append(fold(seed))
    pyro.clear_param_store()
    for seed in range(5):
        assert torch.equal(fold(seed), expected[seed])


def test_flows_in_pyro_modules_start_fresh_in_every_fold() -> None:
    def fold() -> Tensor:
        torch.manual_seed(0)
        model = Model()
        before = density(model.prior)
        perturb_(model.prior, 0.3)
        density(model.prior)
        return before

    first = fold()
    assert torch.equal(fold(), first)


def test_guides_start_fresh_in_every_fold() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def fold(x: Tensor) -> Tensor:
        pyro.set_rng_seed(0)
        guide = AutoSplineFlow(model, num_transforms=1, hidden_dims=[4])
        svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(3):
            svi.step(x)
        return guide.median()["z"]

    pyro.clear_param_store()
    alone = fold(torch.full((2,), 5.0))
    pyro.clear_param_store()
    fold(torch.full((2,), -5.0))
    assert torch.equal(fold(torch.full((2,), 5.0)), alone)


def test_store_set_in_the_same_program_is_adopted() -> None:
    flow = make_flow()
    train(flow)
    expected = density(flow)
    state = pyro.get_param_store().get_state()
    del flow
    pyro.clear_param_store()
    gc.collect()
    pyro.get_param_store().set_state(state)
    assert torch.equal(density(make_flow()), expected)


def test_copy_keeps_its_own_values_when_the_original_is_gone() -> None:
    flow = make_flow()
    train(flow)
    twin, expected = copy.deepcopy(flow), density(flow)
    train(flow)
    del flow
    gc.collect()
    assert torch.equal(density(twin), expected)


def test_flow_that_is_built_anew_for_every_step_is_said() -> None:
    def model(x: Tensor) -> None:
        flow = make_flow()
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(), obs=x)

    svi = SVI(model, lambda x: None, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="SplineFlow was built anew for every step"):
        for _ in range(5):
            svi.step(X)


def test_clearing_the_store_leaves_the_flow_as_it_is() -> None:
    flow = make_flow()
    train(flow)
    expected = density(flow)
    pyro.clear_param_store()
    assert torch.equal(density(flow), expected)
    train(flow)
    assert not torch.equal(density(flow), expected)


def test_store_scopes_keep_flows_apart() -> None:
    store = pyro.get_param_store()
    with store.scope() as first_scope:
        first = make_flow()
        train(first)
        expected = density(first)
    with store.scope():
        second = make_flow()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(second, 1)
        assert not torch.equal(density(second), expected)
    with store.scope(first_scope):
        assert torch.equal(density(first), expected)


def test_deepcopy_of_a_flow_keeps_its_values_and_trains_alone() -> None:
    flow = make_flow()
    train(flow)
    twin = copy.deepcopy(flow)
    expected = density(flow)
    assert torch.equal(density(twin), expected)
    train(twin)
    assert torch.equal(density(flow), expected)
    assert not torch.equal(density(twin), expected)


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.prior, self.likelihood = make_flow(), make_flow(context_dim=2)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.linear(z)), obs=x)


def test_flows_inside_a_pyro_module_take_their_names_from_there_and_train() -> None:
    model = Model()

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    svi.step(X)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    roots = {name.split(".")[0].split("$$$")[0] for name in pyro.get_param_store()}
    assert roots == {"prior", "likelihood", "linear"}


def test_module_store_round_trip(tmp_path) -> None:
    model = Model()
    perturb_(model, 0.2)
    pyro.poutine.trace(model).get_trace(X)
    expected = density(model.prior)
    reload(tmp_path)
    fresh = Model()
    assert not torch.equal(SplineFlow(2, **TINY).log_prob(X), expected)
    pyro.poutine.trace(fresh).get_trace(X)
    assert torch.equal(density(fresh.prior), expected)


def test_frozen_parameters_are_stored_and_not_trained(tmp_path) -> None:
    flow = perturb_(make_flow(), 0.2)
    flow.layers[0].requires_grad_(False)
    frozen = flow.layers[0].conditioner.packed
    before = frozen.clone()
    train(flow)
    assert torch.equal(frozen, before) and not frozen.requires_grad and frozen.grad is None
    reload(tmp_path)
    fresh = make_flow()
    fresh()
    assert torch.equal(fresh.layers[0].conditioner.packed, before)


def test_standardization_after_the_first_call_reaches_the_store(tmp_path) -> None:
    flow = make_flow()
    flow()
    flow.standardize(torch.randn(20, 2) * 4 + 7)
    expected = density(flow)
    reload(tmp_path)
    assert torch.equal(density(make_flow()), expected)


def test_conversion_after_the_first_call_keeps_store_and_flow_in_step() -> None:
    flow = make_flow().standardize(torch.randn(20, 2) * 4 + 7)
    train(flow)
    flow.double()
    flow()
    assert {t.dtype for t in pyro.get_param_store()._params.values()} == {torch.float64}
    assert flow.log_prob(X.double()).dtype == torch.float64


def test_only_trainable_parameters_are_param_sites() -> None:
    flow = make_flow()
    flow.layers[0].requires_grad_(False)
    with pyro.poutine.trace(param_only=True) as capture:
        flow()
    trainable = {f"SplineFlow.{name}" for name, p in flow.named_parameters() if p.requires_grad}
    assert {name for name in capture.trace.nodes if "SplineFlow" in name} == trainable
    assert 0 < len(trainable) < len(pyro.get_param_store())


def test_standardisation_after_a_conversion_is_kept() -> None:
    """The store's entry is then an earlier tensor of the same module, and nothing to read back."""
    flow = SplineFlow(2, num_transforms=1, hidden_dims=[4])
    flow()
    flow.double()
    data = 5.0 + 3.0 * torch.randn(100, 2, dtype=torch.float64)
    flow.standardize(data)
    flow()
    assert torch.allclose(flow.standardization.loc, data.mean(0))
    stored = pyro.get_param_store()["SplineFlow.standardization.loc"]
    assert torch.equal(stored, flow.standardization.loc)


def test_gradient_hooks_go_on_every_entry_of_the_store() -> None:
    """As in Pyro's own tutorials, with buffers and a frozen parameter in the store."""
    flow = SplineFlow(2, num_transforms=1, hidden_dims=[4])
    flow.layers[0].passed_params.requires_grad_(False)
    flow()
    seen = []
    for name, value in pyro.get_param_store().named_parameters():
        value.register_hook(lambda grad, name=name: seen.append(name))
    flow.log_prob(torch.randn(5, 2)).sum().backward()
    assert seen
    assert not any("standardization" in name or "passed_params" in name for name in seen)
    assert not flow.layers[0].passed_params.requires_grad


def test_flow_inside_a_guide_with_a_suffix_reads_its_own_entries() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    settings = {"num_transforms": 1, "hidden_dims": [4], "count_bins": 4}
    first = AutoSplineFlow(model, **settings).setup()
    perturb_(first, 0.3)
    with pytest.warns(UserWarning, match="another live AutoSplineFlow"):
        second = AutoSplineFlow(model, **settings).setup()
    x = torch.randn(5, 2)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    assert torch.allclose(second.flow.log_prob(x), base.log_prob(x), atol=1e-5)
    assert not torch.allclose(first.flow.log_prob(x), base.log_prob(x), atol=1e-2)
