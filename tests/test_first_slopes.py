"""The first draw that trains an encoder: from it on the location follows the context."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AmortizedSplineFlow
from pyro_flowkit.transforms.conditional_affine import START_SHARE, ConditionalAffine


def affine_map(dtype: torch.dtype = torch.float64) -> ConditionalAffine:
    loc = torch.tensor([1.0, -2.0], dtype=dtype)
    return ConditionalAffine(loc, 0.5, 3, "diagonal", hidden_dims=[4])


def learned(rows: int = 200, dtype: torch.dtype = torch.float64) -> Tensor:
    """Contexts of an encoder, far from 0 and of unequal scales."""
    torch.manual_seed(0)
    context = torch.randn(rows, 3, dtype=dtype) * torch.tensor([0.01, 1.0, 3.0]) + 5.0
    return context.requires_grad_()


def draw(affine: ConditionalAffine, context: Tensor) -> Tensor:
    return affine.call_and_ladj(torch.zeros(len(context), 2, dtype=affine.weight.dtype), context)[0]


def has_slopes(affine: ConditionalAffine) -> bool:
    return bool(affine.weight.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_of_the_variance_comes_to_follow_the_context(dtype: torch.dtype) -> None:
    affine, context = affine_map(dtype), learned(dtype=dtype)
    loc = draw(affine, context)
    expected = torch.tensor([1.0, -2.0], dtype=dtype)
    assert torch.allclose(loc.mean(0), expected, atol=1e-4)
    assert torch.allclose(
        loc.var(0, correction=0), torch.full((2,), 0.0025, dtype=dtype), rtol=1e-3
    )
    log_scale = affine.call_and_ladj(torch.zeros(200, 2, dtype=dtype), context)[1] / 2
    assert torch.allclose(log_scale.exp() ** 2, torch.full((200,), 0.2475, dtype=dtype), rtol=1e-5)


def test_the_encoder_has_a_gradient_from_the_first_draw_on() -> None:
    affine, context = affine_map(), learned()
    draw(affine, context).square().sum().backward()
    assert (context.grad.abs().amax(0) > 0).all()


def test_it_happens_once() -> None:
    affine, context = affine_map(), learned()
    draw(affine, context)
    kept = copy.deepcopy(affine.state_dict())
    twin, other = copy.deepcopy(affine), affine_map()
    other.load_state_dict(kept)
    for same in (affine, twin, other):
        draw(same, 7 * context + 1)
        assert all(torch.equal(value, kept[name]) for name, value in same.state_dict().items())


@pytest.mark.parametrize("why", ["data", "no grad", "evaluation", "frozen", "trained by densities"])
def test_other_maps_keep_their_location(why: str) -> None:
    affine, context = affine_map(), learned()
    if why == "trained by densities":
        affine.inverse_and_ladj(torch.zeros(200, 2, dtype=torch.float64), context)
    if why == "frozen":
        affine.weight.requires_grad_(False)
    affine.train(why != "evaluation")
    with torch.set_grad_enabled(why != "no grad"):
        draw(affine, context.detach() if why == "data" else context)
    assert not has_slopes(affine)


def test_it_waits_for_contexts_that_differ() -> None:
    affine, context = affine_map(), learned()
    draw(affine, context[:1])
    draw(affine, context[:1].expand(5, 3))
    assert not has_slopes(affine)
    draw(affine, context)
    assert has_slopes(affine)


def test_a_column_that_did_not_vary_has_no_slope() -> None:
    affine, context = affine_map(), learned()
    with torch.no_grad():
        context[:, 1] = 0.1
    loc = draw(affine, context)
    assert torch.equal(affine.weight[:, 1], torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(loc.mean(0), torch.tensor([1.0, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("loop", ["svi", "fit"])
def test_a_training_keeps_them(loop: str) -> None:
    encoder, flow, x = nn.Linear(8, 5), SplineFlow(2, 5), torch.randn(30, 8)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 4), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", flow(encoder(x), path_gradient=True))

    if loop == "fit":
        fit(model, guide, args=(x,), max_steps=1, lr=1e-6, progress=False)
    else:
        SVI(model, guide, Adam({"lr": 1e-6}), Trace_ELBO()).step(x)
    loc, _ = flow.affine.call_and_ladj(torch.zeros(30, 2), encoder(x))
    assert loc.var(0, correction=0).tolist() == pytest.approx([START_SHARE] * 2, rel=0.01)


@pytest.mark.parametrize("encoder", ["learned", "frozen"])
def test_an_amortized_guide_follows_its_encoder_and_not_its_global_latents(encoder: str) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    network = nn.Linear(2, 3).requires_grad_(encoder == "learned")
    guide = AmortizedSplineFlow(model, network, context_dim=3, condition_on_global=True)
    x = torch.randn(20, 2)
    guide.setup(x)
    assert not has_slopes(guide.affine)
    guide(x)
    has_slope = guide.affine.weight[:2] != 0.0
    assert has_slope.all(0).tolist() == 3 * [encoder == "learned"] + [False]
    assert not guide.affine.weight[2:].any()
