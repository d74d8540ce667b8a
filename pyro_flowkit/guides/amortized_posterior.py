"""The distribution of the local latents of a minibatch, with the path gradient of the joint posterior.

The path gradient (Roeder et al. 2017) differentiates log q along the draws alone, with parameters held fixed. Where the
local latents z are conditioned on global draws t, log q(z | x, t) depends on two draws, and both paths count: the
encoder's features are held fixed, the global draws are not. At the posterior of all latents nothing is left, not even
noise. As in :mod:`pyro_flowkit.guides.posterior` a step on which the flow is too rough takes the ordinary gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn

from pyro_flowkit.flow_distribution import FlowDistribution, path_term
from pyro_flowkit.guides.posterior import MAX_ROUGHNESS
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.transforms.conditional import (
    ConditionalFlowTransformModule,
    ConditionedTransform,
)
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine


class AmortizedPosterior(FlowDistribution):
    """A conditioned flow that ends in a :class:`ConditionalAffine`; made by :func:`condition`."""

    _global_context: Tensor | None = None

    def score_parts(self, value: Tensor) -> ScoreParts:
        if not self._takes_path_gradient or is_transformed():  # a trace cannot choose
            return super().score_parts(value)
        log_prob, pushed = self._with_derivatives(value)
        if pushed:
            paths, derivatives, u = [value], [pushed[-1]], pushed[-2]
        else:
            paths, derivatives, u = self._pulled(value)
        if not bool(u.square().mean() < MAX_ROUGHNESS):
            return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=log_prob)
        entropy_term = path_term(log_prob, paths, derivatives)
        return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=entropy_term)

    @property
    def _pushes_derivatives(self) -> bool:
        # What is carried along says nothing of the derivative at the global draws.
        return super()._pushes_derivatives and self._global_context is None

    def _pulled(self, value: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What the gradient goes through, the derivatives of log q with respect to these, and u."""
        point = value.detach().requires_grad_()
        features = self.transforms[-1].context.detach()
        paths, points = [value], [point]
        if self._global_context is not None:
            global_path = self._global_context.expand(*point.shape[:-1], -1)
            global_point = global_path.detach().requires_grad_()
            features = features[..., : features.shape[-1] - global_point.shape[-1]]
            features = torch.cat([features.expand(*point.shape[:-1], -1), global_point], dim=-1)
            paths.append(global_path)
            points.append(global_point)
        with self._fixed() as (base, transforms):
            *flow, affine = [_recondition(transform, features) for transform in transforms]
            unscaled, ladj = affine.inverse_and_ladj(point)
            fixed = self._pull(unscaled, base, flow) + ladj
        u, *derivatives = torch.autograd.grad(fixed, [unscaled, *points], torch.ones_like(fixed))
        return paths, derivatives, u

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "AmortizedPosterior":
        new = super().expand(batch_shape, _instance)
        new._global_context = self._global_context
        return new


def condition(
    base: torch.distributions.Distribution,
    layers: Sequence[nn.Module],
    affine: ConditionalAffine,
    features: Tensor,
    global_context: Tensor | None,
    *,
    path_gradient: bool,
) -> AmortizedPosterior:
    """The distribution for these features and global draws.

    Args:
        base: of z, event shape ``(D,)``.
        layers: of the flow, with and without context.
        affine: the last layer.
        features: the encoder's, shape ``(*batch, context_dim)``.
        global_context: what the local latents are told of the global draws, a function of these alone, shape
            ``(*batch, G)``; broadcasts against the features.
        path_gradient: see :class:`~pyro_flowkit.FlowDistribution`.
    """
    context = features
    if global_context is not None:
        parts = (features, global_context)
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        context = torch.cat([part.expand(*batch_shape, -1) for part in parts], dim=-1)
    transforms: list[Any] = [
        layer.condition(context) if isinstance(layer, ConditionalFlowTransformModule) else layer
        for layer in (*layers, affine)
    ]
    posterior = AmortizedPosterior(base, transforms, path_gradient=path_gradient)
    posterior._global_context = global_context
    return posterior


def _recondition(transform: Any, context: Tensor) -> Any:
    if isinstance(transform, ConditionedTransform):
        return ConditionedTransform(transform.transform, context)
    return transform
