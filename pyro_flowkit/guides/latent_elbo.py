"""The ELBO of a guide over unconstrained latents, by its distribution and its model's densities, without handlers."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from pyro.infer import Trace_ELBO
from pyro.util import warn_if_nan
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_flowkit.guides.draws import Draws
from pyro_flowkit.guides.latent_vector import unpack
from pyro_flowkit.programs.derivative import Differentiated, Graph
from pyro_flowkit.programs.vectorized import Vectorized

FEW_STEPS = 50  # that do not pay for a graph


class LatentELBO(Trace_ELBO):
    """What ``Trace_ELBO`` computes in a plate of particles, for a guide and a model that are functions of tensors.

    Args:
        program: the model at many draws.
        num_particles: draws of the guide in a step.

    Attributes:
        kl_weight: what the log-densities of latents are multiplied by.
        num_steps: of training that came before. From some number on a density and its derivative come from a graph of
            their own. It is for the caller to count them: a training that is resumed then rounds as one that is not.
    """

    def __init__(self, program: Vectorized, num_particles: int):
        super().__init__(num_particles, max_plate_nesting=program.nesting, vectorize_particles=True)
        self.program = program
        self.kl_weight = 1.0
        self.num_steps = 0
        self._differentiated: tuple[Draws, Differentiated] | None = None

    def _differentiated_for(self, guide: Draws) -> Differentiated:
        known = self._differentiated
        if known is None or known[0] is not guide:
            known = self._differentiated = (
                guide,
                Differentiated(self.program, partial(unpack, guide)),
            )
        return known[1]

    @torch.no_grad()
    def loss(self, model: Callable[..., Any], guide: Draws, *args: Any, **kwargs: Any) -> float:
        """The loss in nats, without gradients."""
        log_p, log_q, _, weights = self._terms(guide, args, kwargs)
        loss = _mean(log_q - log_p, weights)
        warn_if_nan(loss, "loss")
        return loss.item()

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Draws, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar with the value of the loss, in nats, and the gradient of the objective."""
        return self._loss_of(*self._terms(guide, args, kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Draws, *args: Any, **kwargs: Any
    ) -> float:
        """The loss in nats; its gradient is added to the parameters'."""
        return self.step(1.0, model, guide, *args, **kwargs)

    def step(
        self, size: float, model: Callable[..., Any], guide: Draws, *args: Any, **kwargs: Any
    ) -> float:
        """The loss divided by a size; its gradient is added to the parameters'.

        Where kernel and graph give all that is needed, no autograd is at work.
        """
        draw = guide.draw_by_kernel(self.num_particles) if self._takes_graph else None
        if draw is None:
            terms = self._terms(guide, args, kwargs)
        else:
            found = self._differentiated_for(guide)(draw.latent, args, kwargs)
            if found is not None and not draw.is_watched:
                log_p, derivative = found
                loss = (draw.log_prob - log_p).mean().div_(size)
                share = 1.0 / (len(log_p) * size)
                draw.add_gradients(derivative * -share, torch.full_like(log_p, share))
                warn_if_nan(loss, "loss")
                return loss.item()
            latent, log_q, entropy_term = draw.in_graph()
            terms = (self._log_p(guide, latent, found, args, kwargs), log_q, entropy_term, None)
        loss = self._loss_of(*terms) / size
        loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @staticmethod
    def _loss_of(log_p: Tensor, _: Tensor, entropy_term: Tensor, weights: Tensor | None) -> Tensor:
        loss = _mean(entropy_term - log_p, weights)  # the term has the value of log q
        warn_if_nan(loss.detach(), "loss")
        return loss

    @torch.no_grad()
    def density_graph(self, guide: Draws, args: tuple, kwargs: dict) -> Graph | None:
        """The graph that a step takes the density and its derivative from; None where there is none."""
        with torch.random.fork_rng(devices=[]):
            latent = guide.draw_with_log_prob(self.num_particles)[0]
        return self._differentiated_for(guide).graph(latent, args, kwargs)

    def _terms(
        self, guide: Draws, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log p and log q of the draws, what the gradient of the second goes through, and the draws' weights.

        Each ``(num_particles,)``; weights are None where they are equal.
        """
        latent, log_q, entropy_term, weights = guide.draw_with_log_prob(self.num_particles)
        found = None
        if self._takes_graph:
            found = self._differentiated_for(guide)(latent, args, kwargs)
        log_p = self._log_p(guide, latent, found, args, kwargs)
        return log_p, self.kl_weight * log_q, self.kl_weight * entropy_term, weights

    @property
    def _takes_graph(self) -> bool:
        return self.kl_weight == 1.0 and self.num_steps >= FEW_STEPS

    def _log_p(
        self,
        guide: Draws,
        latent: Tensor,
        found: tuple[Tensor, Tensor] | None,
        args: tuple,
        kwargs: dict,
    ) -> Tensor:
        """log p at draws, ``(num_particles,)``, with what a graph has found of it and of its derivative."""
        if found is not None:
            return cast(Tensor, _Given.apply(latent, *found))
        values, ladj = unpack(guide, latent)
        total = self.kl_weight * ladj
        for name, log_prob in self.program.log_probs(values, args, kwargs).items():
            weight = self.kl_weight if name in self.program.latents else 1.0
            total = total + weight * log_prob.reshape(len(log_prob), -1).sum(-1)
        return total


class _Given(torch.autograd.Function):
    """Values at draws whose derivatives by them are known."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * derivative, None, None


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (weights * values).sum()
