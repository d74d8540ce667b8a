"""A step's draws of a guide with their log-density by the kernel: one node of the autograd graph for all layers.

What a :class:`~pyro_flowkit.guides.posterior.GuidePosterior` gives for its own draws, without a distribution, a layer
at a time or a hook: the choice between the two gradients and their noise are settled in the backward pass itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_flowkit.bases import LOG_SQRT_2PI, NormalBase
from pyro_flowkit.guides.posterior import GradientNoise, corrected, takes_path
from pyro_flowkit.ops import chain
from pyro_flowkit.path_gradient import count_bent


@dataclass
class _Plan:
    """What a draw is made of, and what its passage left behind."""

    links: list[chain.Link]
    noise: GradientNoise
    affine: Any
    on_undefined: Callable[[Tensor], None]
    path_gradient: bool
    num_bent: int
    shape: torch.Size
    passage: chain.Passage | None = None
    derivative: Tensor | None = None
    before_affine: Tensor | None = None
    is_path: bool = False


def kernel_draw(
    base: nn.Module,
    layers: Sequence[Any],
    noise: GradientNoise,
    on_undefined: Callable[[Tensor], None],
    *,
    num_samples: int,
    path_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Draws ``(n, D)``, log q and the term of it that gradients go through, ``(n,)``; None where the kernel cannot.

    Args:
        base: the flow's base, a module.
        layers: from the base to the latents, an affine map last.
        noise: of the gradients so far.
        on_undefined: called with derivatives at draws of which some, but not all, are no numbers.
        num_samples: how many.
        path_gradient: whether the path gradient may be taken.
    """
    links = [layer.link() for layer in layers]
    if type(base) is not NormalBase or any(link is None for link in links):
        return None
    z = torch.empty(num_samples, *base.loc.shape, dtype=base.loc.dtype, device=base.loc.device)
    if not chain.applies(z, links):
        return None
    path_gradient = path_gradient and torch.is_grad_enabled()
    plan = _Plan(links, noise, layers[-1], on_undefined, path_gradient, count_bent(layers), z.shape)
    tensors = [tensor for link in links for tensor in link.tensors]
    return cast(tuple[Tensor, Tensor, Tensor], _Draw.apply(plan, z.normal_(), *tensors))


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, z: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        value, ladj, passage = chain.run(z, plan.links)
        plan.passage = passage
        at_base = z.square().sum(-1).mul_(-0.5).sub_(z.shape[-1] * LOG_SQRT_2PI)
        log_prob = at_base.sub_(ladj)
        if plan.path_gradient:
            u, plan.before_affine, plan.derivative = passage.pushed(z.neg(), plan.num_bent)
            plan.is_path = takes_path(plan.noise, u)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(log_prob)
        return value, log_prob, log_prob.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor | None, _: Any, weight: Tensor | None) -> tuple:
        plan: _Plan = ctx.plan
        passage = cast(chain.Passage, plan.passage)
        _ = ctx.saved_tensors  # raises an error where one has been written to since
        if grad_value is None:
            if weight is None:
                return (None,) * len(ctx.needs_input_grad)
            grad_value = weight.new_zeros(plan.shape)
        if weight is not None and plan.is_path:
            grad_value = torch.addcmul(
                grad_value, weight.unsqueeze(-1), cast(Tensor, plan.derivative)
            )
        noise = None
        if weight is not None and plan.derivative is not None:
            if math.isfinite(float(grad_value.sum())):
                noise = chain.Noise(weight, cast(Tensor, plan.before_affine), plan.is_path)
            else:  # some draws may have to be left out
                grad_value = corrected(
                    grad_value,
                    weight,
                    plan.derivative,
                    plan.is_path,
                    plan.noise,
                    plan.affine,
                    plan.on_undefined,
                )
        of_ladj = None if weight is None or plan.is_path else weight.neg()
        grads, squares = passage.backward(grad_value, of_ladj, noise)
        if squares is not None:
            plan.noise.update(squares)
        return (None, None, *grads[1:])
