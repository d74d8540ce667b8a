"""The first draw that trains an encoder: from it on the location follows the context."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AmortizedSplineFlow
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine

SEEDS = (0, 1, 2)


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
def test_half_of_the_variance_comes_to_follow_the_context(dtype: torch.dtype) -> None:
    affine, context = affine_map(dtype), learned(dtype=dtype)
    loc = draw(affine, context)
    expected = torch.tensor([1.0, -2.0], dtype=dtype)
    assert torch.allclose(loc.mean(0), expected, atol=1e-4)
    assert torch.allclose(loc.var(0, correction=0), torch.full((2,), 0.125, dtype=dtype), rtol=1e-3)
    log_scale = affine.call_and_ladj(torch.zeros(200, 2, dtype=dtype), context)[1] / 2
    assert torch.allclose(log_scale.exp() ** 2, torch.full((200,), 0.125, dtype=dtype), rtol=1e-5)


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


def data(seed: int) -> Tensor:
    """400 rows of 16 columns, which three factors make: log p under the best model is known."""
    generator = torch.Generator().manual_seed(seed)
    weight = 2 * torch.randn(3, 16, generator=generator)
    factors = torch.randn(400, 3, generator=generator)
    return factors @ weight + 0.5 * torch.randn(400, 16, generator=generator)


def best_log_prob(x: Tensor) -> float:
    """Of probabilistic PCA with six factors and noise .5, per row (Tipping and Bishop 1999)."""
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    kept = values[-6:].clamp(min=0.25)
    covariance = 0.25 * torch.eye(16) + vectors[:, -6:] @ torch.diag(kept - 0.25) @ vectors[:, -6:].mT
    return float(dist.MultivariateNormal(torch.zeros(16), covariance).log_prob(x).mean())


class VAE(nn.Module):
    """Its encoder ends in a context of few numbers, its posterior is a flow and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 8))
        self.decoder = nn.Linear(6, 16, bias=False)
        self.flow = SplineFlow(6, 8, num_transforms=2, hidden_dims=[16])

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", 400, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("flow", self.flow)
        with pyro.plate("rows", 400, subsample_size=len(x)):
            pyro.sample("z", self.flow(self.encoder(x), path_gradient=True))


@pytest.mark.parametrize("loop", ["svi", "jit", "fit", "amortized"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_vae_whose_posterior_is_a_flow_does_not_collapse(loop: str, seed: int) -> None:
    x = data(seed)
    torch.manual_seed(seed)
    vae = VAE()
    guide = vae.guide
    if loop == "amortized":
        guide = AmortizedSplineFlow(vae.model, vae.encoder, context_dim=8, num_transforms=2)
    if loop == "fit":
        fit(vae.model, guide, data=x, batch_size=100, max_steps=400, lr=5e-3, progress=False)
    else:
        elbo = JitTrace_ELBO(ignore_jit_warnings=True) if loop == "jit" else Trace_ELBO()
        svi = SVI(vae.model, guide, Adam({"lr": 5e-3}), elbo)
        for step in range(400):
            svi.step(x[100 * (step % 4) :][:100])
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=20).loss(vae.model, guide, x) / 400
    assert math.isfinite(loss)
    print("GAP", loop, seed, best_log_prob(x) + loss)
