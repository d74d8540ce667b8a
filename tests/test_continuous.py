"""ContinuousFlow: the density of a velocity field, its solvers, and how it learns the field."""

import copy
import importlib.util
import itertools
import math
import pickle
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flowkit import ContinuousFlow, fit
from pyro_flowkit.continuous import VelocityNetwork, _optimal_pairing
from pyro_flowkit.diagnostics import compare_densities, heldout_log_prob
from pyro_flowkit.ops import ode
from pyro_flowkit.testing import check_transform, perturb_
from pyro_flowkit.training import Callback, FitState
from pyro_flowkit.transforms.ode import ODE, ConditionalODE, Solution
from tests.tiny import CONTEXT, make_flow

HAS_TORCHDIFFEQ = importlib.util.find_spec("torchdiffeq") is not None
needs_torchdiffeq = pytest.mark.skipif(not HAS_TORCHDIFFEQ, reason="torchdiffeq is not installed")


def bent(input_dim: int = 2, context_dim: int = 0, **settings) -> ContinuousFlow:
    settings = {"hidden_dims": [16, 16], "num_steps": 8, **settings}
    return perturb_(ContinuousFlow(input_dim, context_dim, **settings), 0.2)


class Linear(nn.Module):
    """dx/dt = A x, whose flow is the matrix exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.5, -1.0], [0.3, 0.2]]))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return x @ self.matrix.mT


# the density


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("input_dim", [1, 3])
def test_a_fresh_flow_is_its_base(input_dim: int, context_dim: int) -> None:
    flow = ContinuousFlow(input_dim, context_dim, num_steps=2)
    context = CONTEXT if context_dim else None
    x = torch.randn(5, input_dim)
    assert torch.equal(flow.log_prob(x, context), flow.base().log_prob(x))


def test_a_linear_field_gives_the_gaussian_of_its_matrix_exponential() -> None:
    flow = ContinuousFlow(2, velocity=Linear()).double()
    scale = torch.linalg.matrix_exp(flow.ode.velocity.matrix.detach())
    expected = dist.MultivariateNormal(torch.zeros(2).double(), scale @ scale.mT)
    x = torch.randn(20, 2).double()
    log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob, expected.log_prob(x), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(log_prob.sum(), flow.ode.velocity.matrix)
    matrix = flow.ode.velocity.matrix.detach().requires_grad_()
    scale = torch.linalg.matrix_exp(matrix)
    exact = dist.MultivariateNormal(torch.zeros(2).double(), scale @ scale.mT).log_prob(x).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, matrix)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_density_is_that_of_its_draws_and_integrates_to_one(context_dim: int) -> None:
    flow = bent(2, context_dim, hidden_dims=[8, 8]).double()
    context = CONTEXT[0].double() if context_dim else None
    axis = torch.linspace(-8.0, 8.0, 81, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis), context).exp()
        assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-3)
        x, log_prob = flow(context).rsample_and_log_prob((50,))
        torch.testing.assert_close(flow.log_prob(x, context), log_prob, atol=1e-4, rtol=0)
        z, _ = flow.ode.inverse_and_ladj(x, *([] if context is None else [context]))
        back, _ = flow.ode.call_and_ladj(z, *([] if context is None else [context]))
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)


def test_samples_follow_the_context_and_the_standardisation() -> None:
    flow = bent(2, 2).standardize(torch.tensor([5.0, -3.0]) + torch.randn(500, 2))
    torch.manual_seed(0)
    draws = flow.sample((3,), CONTEXT)
    torch.manual_seed(0)
    assert draws.shape == (3, 5, 2) and not draws.requires_grad
    torch.testing.assert_close(flow(CONTEXT).sample((3,)), draws)
    assert (draws.mean((0, 1)) - torch.tensor([5.0, -3.0])).abs().max() < 1.5


def test_more_steps_have_less_error_and_the_error_is_said() -> None:
    flow, x = bent(num_steps=2).double(), torch.randn(50, 2).double()
    with torch.no_grad():
        stated, coarse = flow.solver_error(x), flow.log_prob(x)
        flow.ode.solution = Solution(num_steps=64)
        error = (coarse - flow.log_prob(x)).abs()
    assert error.mean() > 1e-6
    torch.testing.assert_close(stated, error, rtol=0.3, atol=float(error.mean()))


@needs_torchdiffeq
def test_the_adaptive_solver_agrees_with_fine_steps() -> None:
    flow, x = bent(num_steps=64).double(), torch.randn(20, 2).double()
    adaptive = ContinuousFlow(2, hidden_dims=[16, 16], solver="dopri5", tolerance=1e-8).double()
    adaptive.load_state_dict(flow.state_dict())
    torch.testing.assert_close(adaptive.log_prob(x), flow.log_prob(x), atol=1e-5, rtol=0)
    assert adaptive.solver_error(x).max() < 1e-5
    adaptive.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in adaptive.parameters())


def test_without_torchdiffeq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pyro-flowkit\[continuous\]"):
        ContinuousFlow(2, solver="dopri5")


def test_hutchinsons_trace_is_an_estimate_and_called_one() -> None:
    exact = bent(3).double()
    flow = ContinuousFlow(3, hidden_dims=[16, 16], num_steps=8, trace="hutchinson").double()
    flow.load_state_dict(exact.state_dict())
    x = torch.randn(3).double()
    with torch.no_grad():
        found = flow.log_prob(x.expand(4000, 3))
        want = exact.log_prob(x)
    error = float(found.std() / math.sqrt(4000))
    assert error > 0 and abs(float(found.mean() - want)) < 5 * error
    assert flow.is_estimate and not exact.is_estimate
    table = compare_densities({"flow": heldout_log_prob(flow, torch.randn(20, 3).double())})
    assert table["kind"].iloc[0].startswith("estimate")


def test_the_solvers_error_is_in_the_table_of_densities() -> None:
    x = torch.randn(30, 2)
    scores = {"flow": heldout_log_prob(bent(), x), "spline": heldout_log_prob(make_flow(2), x)}
    stated = scores["flow"].attrs["solver_error"]
    kinds = compare_densities(scores)["kind"]
    assert kinds["spline", "log p"] == "exact"
    kind, _, error = kinds["flow", "log p"].partition(" to ")
    assert kind == "exact" and stated <= float(error) < 10 * stated


# at home in PyTorch and Pyro


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize(
    "check",
    [
        "identity_at_init",
        "shapes",
        "context",
        "input_errors",
        "nan",
        "deepcopy",
        "state_dict",
        "param_store",
        "with_cache",
        "pyro_module",
        "inverse_module",
        "distribution",
    ],
)
def test_its_transform_keeps_the_contract(check: str, context_dim: int) -> None:
    def constructor() -> ODE | ConditionalODE:
        field = VelocityNetwork(2, [4], context_dim=context_dim)
        if context_dim:
            return ConditionalODE(2, context_dim, field, Solution(num_steps=2))
        return ODE(2, field, Solution(num_steps=4))

    check_transform(constructor, only=[check], perturbation=0.02)


def test_vmap_and_jacobians_go_through_it() -> None:
    flow, x = bent(2, num_steps=2).double(), torch.randn(3, 2).double()
    log_prob = flow._distribution(None).log_prob
    torch.testing.assert_close(torch.func.vmap(log_prob)(x), flow.log_prob(x))
    jacobian = torch.func.jacrev(log_prob)(x[0])
    by_autograd = torch.autograd.functional.jacobian(flow.log_prob, x[0])
    torch.testing.assert_close(jacobian, by_autograd)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_by_jit_is_refused_with_the_way_out() -> None:
    prior, x = bent(2, num_steps=2), torch.randn(4, 2)
    with pytest.raises(RuntimeError, match=r"outside of torch\.jit\.trace.*Use Trace_ELBO"):
        torch.jit.trace(lambda x: prior.log_prob(x), (x,), check_trace=False)

    def model() -> None:
        pyro.sample("z", prior())

    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), JitTrace_ELBO(ignore_jit_warnings=True))
    with pytest.raises(RuntimeError, match=r"Use Trace_ELBO"):
        svi.step()


def test_copies_and_the_param_store_hold_all_of_it() -> None:
    flow, x = bent().standardize(torch.randn(50, 2)), torch.randn(5, 2)
    expected = flow.log_prob(x)
    assert torch.equal(pickle.loads(pickle.dumps(flow)).log_prob(x), expected)
    assert torch.equal(copy.deepcopy(flow).log_prob(x), expected)
    flow()
    names = {name for name in pyro.get_param_store() if name.startswith(flow._pyro_name)}
    assert len(names) == len(list(flow.named_parameters())) + 2


def test_it_is_a_prior_in_a_model() -> None:
    prior = bent(2, num_steps=2)
    data = 1.5 + torch.randn(20, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(20, 2))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))

    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    before = prior.ode.velocity.network.packed.detach().clone()
    losses = [svi.step(data) for _ in range(15)]
    assert losses[-1] < losses[0] - 10
    assert not torch.equal(prior.ode.velocity.network.packed, before)


# learning


def two_bumps(n: int) -> Tensor:
    side = torch.randint(0, 2, (n, 1)).float() * 4 - 2
    return torch.cat([side, torch.zeros(n, 1)], -1) + 0.3 * torch.randn(n, 2)


def test_fit_matches_the_flow_without_an_equation_and_likelihood_refines_it(monkeypatch) -> None:
    torch.manual_seed(0)
    data, test = two_bumps(1000), two_bumps(300)
    flow = ContinuousFlow(2, hidden_dims=[16, 16], num_steps=4).standardize(data)
    start = flow.log_prob(test).mean().item()
    options = {"batch_size": 100, "progress": False, "seed": 0}
    with monkeypatch.context() as patched:
        patched.setattr(ode, "rk4", None)
        result = fit(flow, data=data, max_steps=300, lr=0.01, **options)
    assert result.history["elbo"][-20:].mean() > result.history["elbo"][:20].mean()
    matched = flow.log_prob(test).mean().item()
    assert matched > start + 0.5
    fit(flow, data=data, objective="likelihood", max_steps=10, lr=3e-3, **options)
    assert flow.log_prob(test).mean().item() > matched


def test_fit_follows_the_recipe_of_matching_and_arguments_win(monkeypatch) -> None:
    flow, x, sizes = ContinuousFlow(2, hidden_dims=[8], num_steps=2), two_bumps(300), set()
    matching_loss = flow.matching_loss

    def noted(x: Tensor) -> Tensor:
        sizes.add(len(x))
        return matching_loss(x)

    monkeypatch.setattr(flow, "matching_loss", noted)

    def rates(data: Tensor, **options) -> list[float]:
        sizes.clear()
        result = fit(flow, data=data, seed=0, progress=False, **options)
        return result.history["learning_rate"].tolist()

    recipe = flow.recipe()
    found = rates(x, max_steps=20)
    assert sizes == {recipe.batch_size} and found[0] == recipe.lr
    assert found[-1] < 0.01 * recipe.lr < found[-2] < found[-3]
    assert len(rates(x, max_epochs=3)) == 3
    rates(x[:100], max_steps=2)
    assert sizes == {100}
    assert rates(x, max_steps=3, lr=0.1, scheduler="constant", batch_size=50) == [0.1] * 3
    assert sizes == {50}
    assert rates(x, max_steps=2, objective="likelihood")[0] == 3e-3


def test_matching_ends_with_the_average_of_its_last_parameters() -> None:
    flow, path = ContinuousFlow(2, hidden_dims=[8]), []
    packed = flow.ode.velocity.network.packed

    class Noted(Callback):
        def on_step(self, state: FitState) -> None:
            path.append(packed.detach().clone())

    fit(flow, data=two_bumps(300), max_steps=40, seed=0, progress=False, callbacks=[Noted()])
    average = path[0]
    for i, parameters in enumerate(path[1:], 1):
        average = average.lerp(parameters, 9 / (i + 9))
    torch.testing.assert_close(packed.detach(), average)
    assert not torch.equal(packed, path[-1])


def test_fit_learns_a_conditional_flow() -> None:
    torch.manual_seed(0)
    context = torch.randn(1000, 1)
    data = 2 * context + 0.2 * torch.randn(1000, 1)
    flow = ContinuousFlow(1, 1, hidden_dims=[32, 32], num_steps=8).standardize(data)
    fit(flow, data=(data, context), max_steps=300, batch_size=200, lr=0.01, progress=False)
    draws = flow.sample(200, torch.tensor([[1.0], [-1.0]]))
    assert (draws.mean(0)[:, 0] - torch.tensor([2.0, -2.0])).abs().max() < 0.3


def test_pairs_are_those_of_least_total_distance() -> None:
    z, x = torch.randn(5, 2), torch.randn(5, 2)
    pairing = _optimal_pairing(z, x)
    best = min(
        float((z[list(order)] - x).square().sum()) for order in itertools.permutations(range(5))
    )
    assert float((z[pairing] - x).square().sum()) == pytest.approx(best)
    torch.manual_seed(0)
    optimal = ContinuousFlow(2, pairing="optimal").matching_loss(two_bumps(64)).mean()
    torch.manual_seed(0)
    independent = ContinuousFlow(2).matching_loss(two_bumps(64)).mean()
    assert optimal < 0.7 * independent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_dim": 0}, "input_dim"),
        ({"context_dim": -1}, "context_dim"),
        ({"solver": "euler"}, "solver"),
        ({"trace": "none"}, "trace"),
        ({"num_steps": 0}, "num_steps"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"pairing": "optimal", "context_dim": 2}, "pairing"),
        ({"pairing": "greedy"}, "pairing"),
        ({"base": "student_t"}, "base"),
        ({"hidden_dims": [8], "velocity": Linear()}, "hidden_dims"),
        ({"hidden_dims": 8}, "hidden_dims"),
    ],
)
def test_bad_settings_say_expected_and_got(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)Expected .*{message}.*got"):
        ContinuousFlow(**{"input_dim": 2, **settings})


def test_objectives_that_do_not_fit_are_refused() -> None:
    x = torch.randn(10, 2)
    with pytest.raises(ValueError, match="objective='likelihood'"):
        fit(ContinuousFlow(2), data=x, objective=Trace_ELBO(), max_steps=1)
    with pytest.raises(TypeError, match="instance of pyro.infer.ELBO, got 'likelihood'"):
        fit(lambda x: None, data=x, objective="likelihood", max_steps=1)
    with pytest.raises(ValueError, match="context"):
        ContinuousFlow(2).matching_loss(x, x)
