"""Where the distribution of a guide's latents takes the path gradient, and where the ordinary one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_flowkit.guides import posterior
from tests.tiny import make_guide, ready_guide


def takes_path_gradient(parts, guide) -> bool:
    """Whether the parameters are reached through the draw alone."""
    (parameter,) = torch.autograd.grad(
        parts.entropy_term.sum(), guide.affine.raw_log_scale, retain_graph=True
    )
    (ordinary,) = torch.autograd.grad(
        parts.log_prob.sum(), guide.affine.raw_log_scale, retain_graph=True
    )
    return not torch.allclose(parameter, ordinary, equal_nan=True)


@pytest.mark.parametrize("affine", ["full", "diagonal"])
def test_path_gradient_up_to_a_derivative_measured_in_units_of_the_scale(
    monkeypatch, affine: str
) -> None:
    guide = ready_guide(affine=affine)
    d = guide.get_posterior()
    d.noise.update(torch.tensor([0.0, 100.0]))
    x = d.rsample((50,))
    point = x.detach().requires_grad_()
    (derivative,) = torch.autograd.grad(d.log_prob(point).sum(), point)
    unscaled = guide.hierarchy.inv(guide.affine.inv(x.detach()))
    jacobian = torch.vmap(torch.func.jacrev(lambda z: guide.affine(guide.hierarchy(z))))(unscaled)
    ladj = torch.func.grad(lambda z: guide.hierarchy.call_and_ladj(z)[1].sum())(unscaled)
    u = (derivative.unsqueeze(-2) @ jacobian).squeeze(-2) + ladj
    roughness = u.square().mean().item()
    assert roughness > 0.1
    for limit, takes_path in ((0.99 * roughness, False), (1.01 * roughness, True)):
        monkeypatch.setattr(posterior, "MAX_ROUGHNESS", limit)
        parts = d.score_parts(x)
        assert takes_path_gradient(parts, guide) == takes_path
        assert torch.equal(parts.entropy_term, parts.log_prob)
    (through_x,) = torch.autograd.grad(parts.entropy_term.sum(), x)
    assert torch.allclose(through_x, derivative, atol=1e-4)


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("settings", [{}, {"affine": "low_rank"}, {"base": "student_t"}])
def test_the_derivative_at_its_own_draw_is_carried_along_and_elsewhere_pulled_back(
    monkeypatch, settings, is_own: bool
) -> None:
    guide = ready_guide(**settings)
    d = guide.get_posterior().expand((4, 1))
    d.noise.update(torch.tensor([0.0, 100.0]))
    x = d.rsample((50,))
    if not is_own:
        x = x.detach().requires_grad_()
    point = x.detach().requires_grad_()
    fixed = d._pull(point, d.base_dist, d.transforms)
    (expected,) = torch.autograd.grad(fixed.sum(), point)
    if is_own:
        monkeypatch.setattr(d, "_pulled_derivatives", None)
    parts = d.score_parts(x)
    (through_x,) = torch.autograd.grad(parts.entropy_term.sum(), x)
    assert (through_x - expected).abs().max() < 1e-4 * expected.abs().max()


def test_nan_takes_the_ordinary_gradient() -> None:
    guide = ready_guide()
    d = guide.get_posterior()
    x = d.rsample((3,))
    with torch.no_grad():
        guide.flow.layers[0].passed_params.fill_(torch.nan)
    with pytest.warns(UserWarning, match="gradient was not finite"):
        assert not takes_path_gradient(d.score_parts(x), guide)


def test_the_less_noisy_gradient_is_taken() -> None:
    """Far from the posterior the ordinary one, at the posterior the path gradient; learned from backward passes."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = make_guide(of=model, init_scale=1.0).setup()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    noise = guide._gradient_noise()
    with torch.no_grad():
        guide.affine.raw_log_scale.fill_(-0.3)  # a scale of 0.05: log q is steep, log p is not
    for _ in range(20):
        elbo.differentiable_loss(model, guide).backward()
    assert noise.with_path > 10 * noise.without_path > 0.0
    assert not noise.favours_path
    with torch.no_grad():
        guide.affine.raw_log_scale.zero_()
    for _ in range(60):
        elbo.differentiable_loss(model, guide).backward()
    assert noise.without_path == pytest.approx(1.0, rel=0.2), "the mean square of a standard normal"
    assert noise.favours_path
    guide.zero_grad()
    elbo.differentiable_loss(model, guide).backward()
    gradients = [p.grad for p in guide.parameters() if p.grad is not None]
    assert max(float(g.abs().max()) for g in gradients) < 1e-5, "nothing is left at the posterior"


def test_numbers_that_are_none_leave_the_noise_as_it_is() -> None:
    noise = posterior.GradientNoise(posterior.GradientNoise.at_first())
    noise.update(torch.tensor([torch.nan, 1.0]))
    noise.update(torch.tensor([1.0, torch.inf]))
    assert (noise.with_path, noise.without_path) == (1.0, 0.0)
