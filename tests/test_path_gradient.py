"""The sticking-the-landing gradient: what is held fixed, what it equals, where it applies, and its guard."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

import pyro_flowkit.path_gradient as guard
import pyro_flowkit.transforms as T
from pyro_flowkit import FlowDistribution, SplineFlow
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.ops import backend
from pyro_flowkit.path_gradient import MAX_ROUGHNESS
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.coupling import _Coupling

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}
KINDS = {
    "normal": {},
    "student_t": {"base": "student_t"},
    "context": {"context_dim": 2},
    "conditional_normal": {"context_dim": 2, "base": "conditional_normal"},
    "autoregressive": {"coupling": False},
    "autoregressive, context": {"coupling": False, "context_dim": 2},
}


def tiny(kind: str, bend: float = 0.1) -> tuple[SplineFlow, Tensor | None]:
    flow = perturb_(SplineFlow(3, **TINY, **KINDS[kind]), bend).double()
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    return flow, context if flow.context_dim else None


def gradients(flow: SplineFlow, context: Tensor | None, output: Tensor) -> dict[str, Tensor]:
    inputs = dict(flow.named_parameters())
    if context is not None:
        inputs["context"] = context
    grads = torch.autograd.grad(output, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), grads, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_term_holds_parameters_context_and_base_fixed(kind: str) -> None:
    flow, context = tiny(kind)
    d = flow(context, path_gradient=True)
    x = d.sample((6,)).requires_grad_()
    parts = d.score_parts(x)
    assert torch.allclose(parts.entropy_term, parts.log_prob, atol=1e-9)
    assert parts.score_function == 0
    only_x = torch.autograd.grad(parts.entropy_term.sum(), x, retain_graph=True)[0]
    full = torch.autograd.grad(parts.log_prob.sum(), x, retain_graph=True)[0]
    assert torch.allclose(only_x, full, atol=1e-9) and only_x.abs().max() > 0.1
    assert all(
        g.abs().max() == 0 for g in gradients(flow, context, parts.entropy_term.sum()).values()
    )
    assert all(p.requires_grad for p in flow.parameters()), "parameters are given back"


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_one_made_by_hand(kind: str) -> None:
    flow, context = tiny(kind)
    twin = copy.deepcopy(flow).requires_grad_(False)
    fixed_context = None if context is None else context.detach().clone()
    torch.manual_seed(5)
    x = flow(context).rsample((6,))
    by_hand = gradients(flow, context, twin(fixed_context).log_prob(x).sum())
    torch.manual_seed(5)
    d = flow(context, path_gradient=True)
    got = gradients(flow, context, d.score_parts(d.rsample((6,))).entropy_term.sum())
    torch.manual_seed(5)
    d = flow(context)
    plain = gradients(flow, context, d.score_parts(d.rsample((6,))).entropy_term.sum())
    assert any(value.abs().max() > 1e-2 for value in got.values())
    for name in got:
        assert torch.allclose(got[name], by_hand[name], atol=1e-8), name
    assert any((got[name] - plain[name]).abs().max() > 1e-2 for name in got)


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_at_a_draw_is_carried_along_and_no_coupling_inverted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, context = tiny(kind)
    d = flow(context, path_gradient=True)
    x = d.rsample((6,))
    monkeypatch.setattr(d, "_pull", None)
    inverted, original = [], _Coupling.inverse_and_ladj
    monkeypatch.setattr(
        _Coupling, "inverse_and_ladj", lambda *args: inverted.append(1) or original(*args)
    )
    parts = d.score_parts(x)
    assert torch.equal(parts.entropy_term, parts.log_prob)
    has_couplings = not kind.startswith("autoregressive")
    assert len(inverted) == (2 if has_couplings and backend() != "fused" else 0)


def test_torch_func_differentiates_it() -> None:
    flow, context = tiny("conditional_normal")
    z = torch.randn(4, 3, dtype=torch.float64)

    def loss(context: Tensor) -> Tensor:
        d = flow(context, path_gradient=True)
        torch.manual_seed(0)
        return d.score_parts(d.rsample()).entropy_term @ z[:, 0]

    (expected,) = torch.autograd.grad(loss(context), context)
    found = torch.func.grad(loss)(context.detach())
    assert torch.allclose(found, expected, atol=1e-9) and expected.abs().max() > 1e-3


def test_gradient_is_zero_for_every_draw_at_the_exact_posterior() -> None:
    flow, _ = tiny("normal")
    target = copy.deepcopy(flow).requires_grad_(False)
    largest = {}
    for path_gradient in (True, False):
        torch.manual_seed(0)
        d = flow(path_gradient=path_gradient)
        x = d.rsample()  # one draw
        loss = d.score_parts(x).entropy_term - target().log_prob(x)
        assert abs(loss.item()) < 1e-9
        largest[path_gradient] = max(
            g.abs().max().item() for g in gradients(flow, None, loss).values()
        )
    assert largest[True] < 1e-8 < 1e-2 < largest[False]


def two_latents() -> None:
    z = pyro.sample("z", dist.Normal(torch.tensor(1.0, dtype=torch.float64), 0.5))
    pyro.sample("s", dist.LogNormal(z, 0.3))


def loss_and_gradient(elbo, path_gradient: bool, bend: float = 0.05) -> tuple[float, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSplineFlow(two_latents, path_gradient=path_gradient, **TINY).setup()
    perturb_(guide, bend)
    guide._gradient_noise().update(
        torch.tensor([0.0, 1e9])
    )  # the path gradient, where it is wanted, from the first step on
    guide.pace.is_resting = True  # gradients keep their size
    elbo.loss_and_grads(two_latents, guide)  # jit compiles here, and draws
    guide.zero_grad()
    pyro.set_rng_seed(2)
    loss = elbo.loss_and_grads(two_latents, guide)
    return loss, torch.cat([p.grad.reshape(-1) for p in guide.parameters()])


@pytest.mark.parametrize("vectorize", [False, True])
def test_trace_elbos_use_it_and_the_value_is_the_same(vectorize: bool) -> None:
    settings = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 0}
    elbos = {
        "Trace_ELBO": Trace_ELBO(**settings),
        "TraceGraph_ELBO": TraceGraph_ELBO(**settings),
        "JitTrace_ELBO": JitTrace_ELBO(ignore_jit_warnings=True, **settings),
    }
    reference_loss, reference = loss_and_gradient(elbos["Trace_ELBO"], path_gradient=True)
    plain_loss, plain = loss_and_gradient(elbos["Trace_ELBO"], path_gradient=False)
    assert reference_loss == pytest.approx(plain_loss, abs=1e-9)
    assert (reference - plain).abs().max() > 1e-2
    for name, elbo in elbos.items():
        with torch.jit.optimized_execution(False):  # which fuses, and rounds constants: 2e-9 here
            loss, gradient = loss_and_gradient(elbo, path_gradient=True)
        assert loss == pytest.approx(reference_loss, abs=1e-9), name
        assert torch.allclose(gradient, reference, atol=1e-8), name


def test_a_trace_leaves_it_where_the_flow_bends() -> None:
    settings = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 0}
    eager, traced = Trace_ELBO(**settings), JitTrace_ELBO(ignore_jit_warnings=True, **settings)
    _, path = loss_and_gradient(eager, path_gradient=True, bend=0.3)
    _, plain = loss_and_gradient(eager, path_gradient=False, bend=0.3)
    assert (path - plain).abs().max() > 1e-2
    _, gradient = loss_and_gradient(traced, path_gradient=True, bend=0.3)
    assert torch.allclose(gradient, plain, atol=1e-8)


def test_plain_and_path_gradient_have_the_same_mean() -> None:
    flow, _ = tiny("normal")
    target = dist.Normal(torch.tensor(0.3, dtype=torch.float64), 1.5).expand([3]).to_event(1)
    grads = {}
    for path_gradient in (True, False):
        d = flow(path_gradient=path_gradient)
        x = d.rsample((20_000,))
        loss = (d.score_parts(x).entropy_term - target.log_prob(x)).mean()
        grads[path_gradient] = gradients(flow, None, loss)["layers.1.bias"]
    assert torch.allclose(grads[True], grads[False], atol=0.15)  # about five standard errors
    assert grads[True].abs().max() > 0.1


def test_expand_plates_and_masks_keep_it() -> None:
    flow, _ = tiny("normal")
    d = flow(path_gradient=True)
    assert d.expand([4]).path_gradient and d.expand_by([2]).path_gradient
    assert not flow().expand([4]).path_gradient

    def guide() -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", flow(path_gradient=True).mask(torch.tensor([True, True, False, True])))

    trace = poutine.trace(guide).get_trace()
    trace.compute_score_parts()
    parts = trace.nodes["z"]["score_parts"]
    assert parts.entropy_term[2] == 0
    x = trace.nodes["z"]["value"]
    by_value = torch.autograd.grad(parts.entropy_term.sum(), x, retain_graph=True)[0]
    through_x = gradients(flow, None, (by_value.detach() * x).sum())
    got = gradients(flow, None, parts.entropy_term.sum())
    assert all(torch.allclose(got[name], through_x[name], atol=1e-8) for name in got)


def test_it_needs_no_gradients_and_costs_none() -> None:
    flow, _ = tiny("normal")
    d = flow(path_gradient=True)
    with torch.no_grad():
        parts = d.score_parts(d.rsample((2,)))
    assert parts.entropy_term is parts.log_prob


def test_frozen_parameters_stay_frozen() -> None:
    flow, _ = tiny("normal")
    flow.layers[0].requires_grad_(False)
    before = {n: p.requires_grad for n, p in flow.named_parameters()}
    d = flow(path_gradient=True)
    d.score_parts(d.rsample())
    assert {n: p.requires_grad for n, p in flow.named_parameters()} == before


def test_transforms_of_others_are_held_fixed_too() -> None:
    loc = torch.zeros(2, requires_grad=True)
    weight = torch.nn.Parameter(torch.tensor([0.5, 0.25]))
    affine = torch.distributions.AffineTransform(loc, weight.exp(), event_dim=1)
    coupling = perturb_(T.spline_coupling(2, count_bins=4), 0.3)
    base = dist.Normal(weight, 1.0).to_event(1)
    d = FlowDistribution(base, [coupling, affine], path_gradient=True)
    x = d.sample((3,)).requires_grad_()
    fixed = d.score_parts(x).entropy_term.sum()
    inputs = [loc, weight, *coupling.parameters()]
    found = torch.autograd.grad(fixed, inputs, allow_unused=True, retain_graph=True)
    assert all(g is None or g.abs().max() == 0 for g in found)
    assert torch.autograd.grad(fixed, x)[0].abs().max() > 0


def rough_flow() -> tuple[SplineFlow, Tensor]:
    """Some of its draws are rough, some are not."""
    torch.manual_seed(0)
    flow, context = tiny("conditional_normal", bend=0.3)
    return flow, context


@pytest.mark.parametrize("own_draw", [True, False])
def test_a_rough_draw_takes_the_ordinary_gradient_and_a_smooth_one_the_path(
    own_draw: bool,
) -> None:
    flow, context = rough_flow()
    twin = copy.deepcopy(flow).requires_grad_(False)
    d = flow(context, path_gradient=True)
    torch.manual_seed(1)
    x = d.rsample((12,))
    entropy_term = d.score_parts(x if own_draw else x.clone()).entropy_term
    ordinary, path = flow(context).log_prob(x), twin(context.detach()).log_prob(x)
    affine = flow.transforms(context)[-1]
    whitened = affine.inv(x.detach()).detach().requires_grad_()
    y = affine(whitened)
    (u,) = torch.autograd.grad(twin(context.detach()).log_prob(y).sum(), whitened)
    is_rough = u.square().mean(-1) > MAX_ROUGHNESS
    assert 0.1 < is_rough.double().mean() < 0.9
    for rows, expected in ((is_rough, ordinary), (~is_rough, path)):
        got = gradients(flow, context, entropy_term[rows].sum())
        for name, value in gradients(flow, context, expected[rows].sum()).items():
            assert torch.allclose(
                got[name], value, rtol=1e-6, atol=1e-6 * value.abs().max().item()
            ), name


def largest_gradient(flow: SplineFlow, context: Tensor, path_gradient: bool) -> Tensor:
    torch.manual_seed(1)
    d = flow(context, path_gradient=path_gradient)
    loss = d.score_parts(d.rsample((200,))).entropy_term.mean()
    return torch.stack([g.abs().max() for g in gradients(flow, context, loss).values()]).max()


def test_the_gradient_of_a_flow_full_of_spikes_is_of_the_size_of_the_ordinary_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow, context = tiny("conditional_normal", bend=1.5)
    guarded = largest_gradient(flow, context, True)
    assert guarded < 2 * largest_gradient(flow, context, False)
    monkeypatch.setattr(guard, "MAX_ROUGHNESS", math.inf)
    assert largest_gradient(flow, context, True) > 100 * guarded


def test_a_derivative_that_is_no_number_reaches_nothing() -> None:
    log_prob = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    derivative = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, torch.inf, 0.0]])
    term = guard.guarded_path_term(log_prob, [x], [derivative], derivative)
    assert torch.equal(term, log_prob)
    of_log_prob, of_x = torch.autograd.grad(term.sum(), [log_prob, x])
    assert of_log_prob.tolist() == [0, 1] and of_x.tolist() == [[1, 2, 3], [0, 0, 0]]


def test_a_trace_chooses_by_the_draws_of_its_step() -> None:
    flow, context = rough_flow()
    context = context.detach()

    def model() -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(context.new_zeros(3), 1.0).to_event(1))

    def guide(path_gradient: bool = True) -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", flow(context, path_gradient=path_gradient))

    def ordinary_guide() -> None:
        guide(path_gradient=False)

    def grads(elbo, guide, seed: int) -> Tensor:
        flow.zero_grad()
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, guide)
        return torch.cat([p.grad.reshape(-1) for p in flow.parameters()])

    jit, eager = JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO()
    grads(jit, guide, 0)  # compiles here, and draws
    differences = []
    for seed in range(1, 5):
        expected = grads(eager, guide, seed)
        assert torch.allclose(grads(jit, guide, seed), expected, rtol=1e-6, atol=1e-6)
        differences.append((grads(eager, ordinary_guide, seed) - expected).abs().max())
    assert max(differences) > 1.0, "some draws are smooth"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_roughness_is_in_units_of_the_affine_maps_or_of_the_base(scale: float) -> None:
    loc = torch.zeros(2, requires_grad=True)
    wide = torch.full((2,), scale)
    at_the_end = torch.distributions.AffineTransform(loc, wide, event_dim=1)
    coupling = T.spline_coupling(2, count_bins=4)
    for base, transforms in (
        (dist.Normal(torch.zeros(2), 1.0), [coupling, at_the_end]),
        (dist.Normal(loc, wide), [coupling]),
    ):
        d = FlowDistribution(base.to_event(1), transforms, path_gradient=True)
        term = d.score_parts(d.rsample((50,))).entropy_term
        (found,) = torch.autograd.grad(term.sum(), loc)
        assert found.abs().min() > 0, "the ordinary entropy does not depend on the location"
