"""The distribution of the local latents of a minibatch, with the path gradient of the joint posterior.

The path gradient (Roeder et al. 2017) differentiates log q along the draws alone, with parameters held fixed. Where the
local latents z are conditioned on global draws t, log q(z | x, t) depends on two draws, and both paths count: the
encoder's features are held fixed, the global draws are not. At the posterior of all latents nothing is left, not even
noise. A row whose draw is rough takes the ordinary gradient, see :mod:`pyro_flowkit.path_gradient`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.path_gradient import derivatives_of, flow_held_fixed
from pyro_flowkit.transforms.conditional import (
    ConditionalFlowTransformModule,
    ConditionedTransform,
)
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine


class AmortizedPosterior(FlowDistribution):
    """A conditioned flow that ends in a :class:`ConditionalAffine`; made by :func:`condition`."""

    _global_context: Tensor | None = None

    @property
    def _pushes_derivatives(self) -> bool:
        # What is carried along says nothing of the derivative at the global draws.
        return super()._pushes_derivatives and self._global_context is None

    def _pulled_derivatives(
        self, value: Tensor, shape: torch.Size
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        if self._global_context is None:
            return super()._pulled_derivatives(value, shape)
        path = self._global_context.expand(*shape, -1)
        features = self.transforms[-1].context.detach()[..., : -path.shape[-1]]
        features = features.expand(*shape, -1)
        with flow_held_fixed(self.base_dist, self.transforms) as (base, transforms):

            def given(context: Tensor) -> list[Any]:
                context = torch.cat([features, context], dim=-1)
                return [_recondition(transform, context) for transform in transforms]

            def before_affine(point: Tensor, context: Tensor) -> Tensor:
                return self._pull(point, base, given(context)[:-1])

            def through_affine(point: Tensor, context: Tensor) -> Tensor:
                back, ladj = given(context)[-1].inverse_and_ladj(point)
                return (back * u).sum() + ladj.sum()

            whitened, _ = self._pull_back(value, transforms[-1:])
            u, by_flow = derivatives_of(before_affine, whitened, path)
            derivative, by_affine = derivatives_of(through_affine, value, path)
        return [value, path], [derivative, by_flow + by_affine], u

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
