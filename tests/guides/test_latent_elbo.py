"""The ELBO without handlers is that of ``Trace_ELBO``, with its gradient, data in batches and a weight of the KL."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_elbo import FEW_STEPS
from pyro_flowkit.programs.pairs import vectorized
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training.messengers import KLWeight

_generator = torch.Generator().manual_seed(0)
X = torch.randn(30, 2, generator=_generator)
Y = X @ torch.tensor([1.0, -0.5]) + 0.3 + 0.2 * torch.randn(30, generator=_generator)


def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    bias = pyro.param("bias", torch.tensor(0.1))
    with pyro.plate("groups", 3):
        b = pyro.sample("b", dist.Normal(bias, sigma))
    with pyro.plate("data", 30, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w + b.sum(), sigma), obs=y)


def trained_guide():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[8]).setup(X, Y)
    perturb_(guide.flow, 0.1)
    return guide


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("rows", [30, 10])
@pytest.mark.parametrize("favours_path", [True, False])
def test_loss_and_gradient_are_those_of_the_handlers(favours_path, rows, weight):
    guide = trained_guide()
    batch = X[:rows], Y[:rows]
    program = vectorized(model, guide, batch, {})
    elbo = guide.elbo(program, 16)
    elbo.kl_weight = weight
    messenger = KLWeight()
    messenger.weight = weight
    reference = Trace_ELBO(16, max_plate_nesting=1, vectorize_particles=True)
    parameters = [*guide.parameters(), pyro.get_param_store()._params["bias"]]
    found = []
    for objective, programs in (
        (elbo, (program, guide)),
        (reference, (messenger(program), messenger(guide))),
    ):
        guide._noise_squares.copy_(torch.tensor([0.0, 1.0] if favours_path else [1.0, 0.0]))
        pyro.set_rng_seed(7)
        loss = objective.differentiable_loss(*programs, *batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append((loss.detach(), *(g for g in gradients if g is not None)))
        pyro.set_rng_seed(7)
        assert objective.loss(*programs, *batch) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=2e-3)


def test_fit_trains_guide_and_parameters_by_it():
    guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[8])
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    handled = []

    class Noted(pyro.poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            handled.append(msg["name"])

    with Noted():
        fit(model, guide, args=(X, Y), max_steps=200, progress=False)
    assert len(handled) < 200, "no handler sees a step"
    assert abs(pyro.param("bias").item() - 0.1) > 1e-3
    assert float(guide.median()["w"][0]) == pytest.approx(1.0, abs=0.15)


def test_guides_with_masked_latents_keep_the_handlers():
    mask = torch.tensor([True, True, False])

    def masked():
        with pyro.plate("rows", 3), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    guide = AutoSplineFlow(masked, num_transforms=2, hidden_dims=[8]).setup()
    assert guide.elbo(vectorized(masked, guide, (), {}), 4) is None


def plain_model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal((w.unsqueeze(-2) @ x.mT).squeeze(-2), sigma), obs=y)


def ready_to_step():
    """A guide, its ELBO as after many steps, and what it is called with."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSplineFlow(plain_model, num_transforms=2, hidden_dims=[8]).setup(X, Y)
    perturb_(guide.flow, 0.1)
    guide.pace.is_resting = True
    elbo = guide.elbo(vectorized(plain_model, guide, (X, Y), {}), 16)
    elbo.num_steps = FEW_STEPS
    return guide, elbo


def gradients_of(guide, take):
    for parameter in guide.parameters():
        parameter.grad = None
    pyro.set_rng_seed(7)
    loss = take()
    return loss, [parameter.grad for parameter in guide.parameters()], guide._noise_squares.clone()


@pytest.mark.parametrize("favours_path", [True, False])
def test_a_step_without_autograd_has_the_gradient_of_one_with_it(
    kernel_calls, monkeypatch, favours_path
):
    guide, elbo = ready_to_step()
    noise = torch.tensor([0.0, 1.0] if favours_path else [1.0, 0.0])

    def by_autograd():
        loss = elbo.differentiable_loss(elbo.program, guide, X, Y) / 30.0
        loss.backward()
        return loss.item()

    guide._noise_squares.copy_(noise)
    expected = gradients_of(guide, by_autograd)
    guide._noise_squares.copy_(noise)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", None)
        found = gradients_of(guide, lambda: elbo.step(30.0, elbo.program, guide, X, Y))
    assert kernel_calls["run_chain_backward"] == 2 and not kernel_calls["couple_backward"]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1:], expected[1:])
    before = [grad.clone() for grad in found[1]]
    guide._noise_squares.copy_(noise)
    pyro.set_rng_seed(7)
    elbo.step(30.0, elbo.program, guide, X, Y)
    doubled = [parameter.grad for parameter in guide.parameters()]
    torch.testing.assert_close(doubled, [2.0 * grad for grad in before])


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_who_watches_a_parameter_sees_its_gradient(fused_kernel, kind):
    guide, elbo = ready_to_step()
    seen = []
    handle = getattr(guide.affine.raw_loc, kind)(seen.append)
    elbo.step(1.0, elbo.program, guide, X, Y)
    assert len(seen) == 1
    handle.remove()
    elbo.step(1.0, elbo.program, guide, X, Y)
    assert len(seen) == 1


def test_a_frozen_parameter_gets_no_gradient(fused_kernel):
    guide, elbo = ready_to_step()
    guide.flow.requires_grad_(False)
    elbo.step(1.0, elbo.program, guide, X, Y)
    assert all(parameter.grad is None for parameter in guide.flow.parameters())
    assert guide.affine.raw_loc.grad is not None
