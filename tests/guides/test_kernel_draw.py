"""Draws of a step by the kernel: those of the guide's distribution, with its gradients and its noise."""

import gc
import weakref

import pyro
import pytest
import torch

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.global_spline_flow import GlobalSplineFlow
from pyro_flowkit.ops import use_reference
from pyro_flowkit.testing import perturb_
from tests.tiny import LATENT_DIM, TINY, model, ready_guide

COUNT = 12


def noisy(guide, *, favours_path):
    guide._noise_squares.copy_(torch.tensor([0.0, 1.0] if favours_path else [1.0, 0.0]))
    return guide


def step(guide, *, spoil=None):
    """What a step sees: draws, log q, the gradients of all parameters, and the noise that was learned."""
    torch.manual_seed(3)
    latent, log_q, entropy_term, weights = guide.draw_with_log_prob(COUNT)
    assert weights is None
    term = (latent - 0.3).square().sum(-1) if spoil is None else spoil(latent)
    loss = (2.0 * entropy_term + term).mean()
    grads = torch.autograd.grad(loss, [*guide.parameters()], allow_unused=True)
    return latent.detach(), log_q.detach(), entropy_term.detach(), grads, guide._noise_squares


@pytest.mark.parametrize("favours_path", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"affine": "diagonal"}, {"path_gradient": False}, {"hierarchical": False}],
    ids=str,
)
def test_a_step_is_that_of_the_distribution(kernel_calls, settings, favours_path):
    guide = ready_guide(**settings)
    found = step(noisy(guide, favours_path=favours_path))
    assert kernel_calls["run_chain"] == 1 and kernel_calls["run_chain_backward"] == 1
    noise = found[-1].clone()
    with use_reference():
        expected = step(noisy(guide, favours_path=favours_path))
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(found[3], expected[3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, expected[-1], rtol=1e-3, atol=1e-4)
    assert kernel_calls["run_chain"] == 1, "the reference is no call of the kernel"


@pytest.mark.parametrize("favours_path", [True, False])
def test_draws_without_a_derivative_are_left_out(kernel_calls, favours_path):
    def spoil(latent):
        is_first = torch.arange(COUNT) == 0
        return torch.where(is_first, torch.nan, 1.0) * latent.square().sum(-1)

    guide = ready_guide()
    with pytest.warns(UserWarning, match=f"At 1 of {COUNT} draws the model's log-density has no"):
        found = step(noisy(guide, favours_path=favours_path), spoil=spoil)
    noise = found[-1].clone()
    guide._said_undefined = False
    with use_reference(), pytest.warns(UserWarning, match=f"At 1 of {COUNT} draws"):
        expected = step(noisy(guide, favours_path=favours_path), spoil=spoil)
    for one, other in zip(found[3], expected[3], strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, expected[-1], rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_differences(fused_kernel):
    """In float64, of a loss without the path gradient, whose gradient is that of its value."""
    torch.manual_seed(0)
    guide = AutoSplineFlow(model, path_gradient=False, **TINY).double()
    perturb_(guide.setup(), 0.1).double()
    guide.pace.is_resting = True  # or it takes back what is done to its parameters

    def loss():
        torch.manual_seed(3)
        latent, _, entropy_term, _ = guide.draw_with_log_prob(COUNT)
        return (entropy_term + latent.sin().sum(-1)).mean()

    parameters = [*guide.parameters()]
    grads = torch.autograd.grad(loss(), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for size in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=size)
                values.append(loss())
                parameter.sub_(direction, alpha=size)
        difference = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((grad * direction).sum(), difference, rtol=1e-5, atol=1e-7)


def test_nothing_is_kept_and_parameters_must_not_change_before_the_backward_pass(fused_kernel):
    guide = ready_guide()
    gc.disable()
    try:
        latent, _, entropy_term, _ = guide.draw_with_log_prob(COUNT)
        gone = weakref.ref(latent)
        del latent, entropy_term
        assert gone() is None
    finally:
        gc.enable()
    _, _, entropy_term, _ = guide.draw_with_log_prob(COUNT)
    with torch.no_grad():
        guide.flow.layers[0].conditioner.packed.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy_term.sum().backward()


def test_whoever_wants_another_draw_gets_that(kernel_calls):
    for settings in ({"base": "student_t"}, {"affine": "low_rank"}):
        pyro.clear_param_store()
        guide = ready_guide(**settings)
        latent, *_ = guide.draw_with_log_prob(3)
        assert latent.shape == (3, LATENT_DIM) and guide.draw_by_kernel(3) is None
    pyro.clear_param_store()
    other = GlobalSplineFlow(model, **TINY).setup()
    other.draw_with_log_prob(4)
    assert other.draw_by_kernel(4) is None
    pyro.clear_param_store()
    kernel_calls.clear()
    with torch.no_grad():
        _, log_q, _, _ = ready_guide().draw_with_log_prob(3)
    assert kernel_calls["run_chain"] == 1 and kernel_calls["push_chain"] == 0
    assert not log_q.requires_grad
