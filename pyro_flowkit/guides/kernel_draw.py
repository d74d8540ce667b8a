"""A step's draws of a guide with their log-density by the kernel: all layers at once, with autograd or without.

What a :class:`~pyro_flowkit.guides.posterior.GuidePosterior` gives for its own draws, without a distribution, a layer
at a time or a hook: the choice between the two gradients and their noise are settled on the way back itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_flowkit.bases import LOG_SQRT_2PI, NormalBase
from pyro_flowkit.guides.posterior import GradientNoise, corrected, takes_path
from pyro_flowkit.ops import chain
from pyro_flowkit.path_gradient import count_bent


def kernel_draw(
    base: nn.Module,
    layers: Sequence[Any],
    noise: GradientNoise,
    on_undefined: Callable[[Tensor], None],
    *,
    num_samples: int,
    path_gradient: bool,
) -> "KernelDraw | None":
    """Draws with their log-density; None where the kernel cannot.

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
    num_bent = count_bent(layers) if path_gradient and torch.is_grad_enabled() else None
    return KernelDraw(z.normal_(), links, noise, layers[-1], on_undefined, num_bent)


class KernelDraw:
    """Draws of a guide, and the way back from them to its parameters.

    Attributes:
        latent: the draws, shape ``(n, D)``, without a graph.
        log_prob: their log-density in nats, ``(n,)``.
    """

    @torch.no_grad()
    def __init__(
        self,
        z: Tensor,
        links: list[chain.Link],
        noise: GradientNoise,
        affine: Any,
        on_undefined: Callable[[Tensor], None],
        num_bent: int | None,
    ):
        self._tensors = [tensor for link in links for tensor in link.tensors]
        self._noise, self._affine, self._on_undefined = noise, affine, on_undefined
        self.latent, ladj, self._passage = chain.run(z, links)
        at_base = z.square().sum(-1).mul_(-0.5).sub_(z.shape[-1] * LOG_SQRT_2PI)
        self.log_prob = at_base.sub_(ladj)
        self._derivative: Tensor | None = None
        self._before_affine: Tensor | None = None
        self._is_path = False
        if num_bent is not None:
            u, self._before_affine, self._derivative = self._passage.pushed(z.neg(), num_bent)
            self._is_path = takes_path(noise, u)

    def in_graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """The draws, log q and the term of it that gradients go through; all of it is one node of autograd's graph."""
        return cast(tuple[Tensor, Tensor, Tensor], _Draw.apply(self, *self._tensors))

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants to see the gradients on their way to the parameters."""
        return any(
            t is not None
            and not (t.is_leaf and not t._backward_hooks and not t._post_accumulate_grad_hooks)
            for t in self._tensors
        )

    @torch.no_grad()
    def add_gradients(self, grad_latent: Tensor, weight: Tensor) -> None:
        """Add the gradients to those that the parameters have, as a backward pass through :meth:`in_graph` would.

        Args:
            grad_latent: what arrives at the draws, ``(n, D)``.
            weight: what arrives at the term of log q, ``(n,)``.
        """
        for tensor, grad in zip(self._tensors, self.gradients(grad_latent, weight), strict=True):
            if tensor is not None and grad is not None and tensor.requires_grad:
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad

    def gradients(self, grad_latent: Tensor, weight: Tensor | None) -> list[Tensor | None]:
        """Those of the layers' tensors, one after the other; the guide's noise learns of the step."""
        derivative, noise = self._derivative, None
        if weight is not None and derivative is not None:
            if self._is_path:
                grad_latent = torch.addcmul(grad_latent, weight.unsqueeze(-1), derivative)
            if math.isfinite(float(grad_latent.sum())):
                noise = chain.Noise(weight, cast(Tensor, self._before_affine), self._is_path)
            else:  # some draws may have to be left out
                grad_latent = corrected(
                    grad_latent,
                    weight,
                    derivative,
                    self._is_path,
                    self._noise,
                    self._affine,
                    self._on_undefined,
                )
        of_ladj = None if weight is None or self._is_path else weight.neg()
        (_, *grads), squares = self._passage.backward(grad_latent, of_ladj, noise)
        if squares is not None:
            self._noise.update(squares)
        return grads


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, draw: KernelDraw, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.draw = draw
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(draw.log_prob)
        return draw.latent.detach(), draw.log_prob, draw.log_prob.clone()  # a draw has no graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_latent: Tensor | None, _: Any, weight: Tensor | None) -> tuple:
        _ = ctx.saved_tensors  # raises an error where one has been written to since
        if grad_latent is None:
            if weight is None:
                return (None,) * len(ctx.needs_input_grad)
            grad_latent = torch.zeros_like(ctx.draw.latent)
        return (None, *ctx.draw.gradients(grad_latent, weight))
