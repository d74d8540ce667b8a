"""Where the distribution of a guide's latents takes the path gradient, and where the ordinary one."""

import pytest
import torch

from pyro_flowkit.guides import posterior
from tests.tiny import ready_guide


@pytest.mark.parametrize("affine", ["full", "diagonal"])
def test_path_gradient_up_to_a_derivative_measured_in_units_of_the_scale(
    monkeypatch, affine: str
) -> None:
    guide = ready_guide(affine=affine)
    d = guide.get_posterior()
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
        assert (parts.entropy_term is not parts.log_prob) == takes_path
        assert torch.equal(parts.entropy_term, parts.log_prob)
    (through_x,) = torch.autograd.grad(parts.entropy_term.sum(), x)
    assert torch.allclose(through_x, derivative, atol=1e-4)


def test_nan_takes_the_ordinary_gradient() -> None:
    guide = ready_guide()
    d = guide.get_posterior()
    x = d.rsample((3,))
    with torch.no_grad():
        guide.flow.layers[0].passed_params.fill_(torch.nan)
    parts = d.score_parts(x)
    assert parts.entropy_term is parts.log_prob
