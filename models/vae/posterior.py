r"""A flow posterior that is never behind the normal one of the same encoder: a flow in whitened space, the normal last.

.. math:: z = m(x) + s(x) \odot f(\varepsilon;\, c(x)), \qquad \varepsilon \sim N(0, I)

m and s are the heads of the normal posterior, c a linear map of the same features. A fresh f is the identity. Splines
have bins of a fixed width: after m and s, rather than before, they could not resolve a posterior that is narrower.
"""

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit import SplineFlow
from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule

MIN_POSTERIOR_SCALE = 1e-4


def normal_of(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale ``(*batch, L)`` from the outputs ``(*batch, 2 L)`` of an encoder's heads."""
    loc, raw_scale = heads.chunk(2, dim=-1)
    return loc, MIN_POSTERIOR_SCALE + F.softplus(raw_scale)


class HeadsAffine(ConditionalFlowTransformModule):
    """``y = m + s x`` with the heads' outputs, of shape ``(*batch, 2 L)``, as context; it has no parameters."""

    is_affine = True

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim, 2 * latent_dim)

    def call_and_ladj(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x, context)
        loc, scale = normal_of(context)
        y = loc + scale * x
        return y, scale.log().sum(-1).expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y, context)
        loc, scale = normal_of(context)
        x = (y - loc) / scale
        return x, -scale.log().sum(-1).expand(x.shape[:-1])

    def pushed_derivative(
        self, x: Tensor, y: Tensor, derivative: Tensor, context: Tensor
    ) -> Tensor:
        return derivative / normal_of(context.detach())[1]


class NormalPosterior(nn.Module):
    """q(z | x) from the heads alone; while it is trained it is a flow of one affine map, for its path gradient.

    Args:
        latent_dim: size L of the code.
        path_gradient: see ``FlowDistribution``.
    """

    def __init__(self, latent_dim: int, *, path_gradient: bool):
        super().__init__()
        self.affine = HeadsAffine(latent_dim)
        self.path_gradient = path_gradient

    def forward(self, features: Tensor, heads: Tensor) -> dist.TorchDistribution:
        """The distribution for outputs ``(*batch, 2 L)`` of the heads."""
        loc, scale = normal_of(heads)
        if not (self.training and self.path_gradient):
            return dist.Normal(loc, scale).to_event(1)
        base = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        return FlowDistribution(base, [self.affine.condition(heads)], path_gradient=True)


class FlowPosterior(nn.Module):
    """q(z | x) from an encoder's features.

    Args:
        latent_dim: size L of the code.
        feature_dim: size H of the features.
        context_dim: size of the flow's context.
        path_gradient: see ``FlowDistribution``.
        flow: further arguments of the ``SplineFlow``.
    """

    def __init__(
        self,
        latent_dim: int,
        feature_dim: int,
        context_dim: int,
        *,
        path_gradient: bool,
        **flow: object,
    ):
        super().__init__()
        self.context = nn.Linear(feature_dim, context_dim)
        self.flow = SplineFlow(latent_dim, context_dim, **flow)  # type: ignore[arg-type]
        self.flow.affine = None  # the heads have its place, and the normal posterior's weights
        self.affine = HeadsAffine(latent_dim)
        self.path_gradient = path_gradient

    def forward(self, features: Tensor, heads: Tensor) -> dist.TorchDistribution:
        """The distribution for features ``(*batch, H)`` and outputs ``(*batch, 2 L)`` of the heads."""
        whitened = self.flow(self.context(features))
        return FlowDistribution(
            whitened.base_dist,
            [*whitened.transforms, self.affine.condition(heads)],
            path_gradient=self.path_gradient,
        )
