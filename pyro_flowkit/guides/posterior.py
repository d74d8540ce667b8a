"""The distribution of a guide's latents: the path gradient, where it is the less noisy one.

The path gradient drops the score term of the ELBO's gradient, whose mean is zero. At the posterior nothing is left,
not even noise. Far from it the score term is what cancels the noise of the rest: a flow that was squeezed on the way
has spikes, the derivative of its log-density is large there, and training gets stuck. With u the derivative of log q
before the affine maps at the flow's end, in their units, the mean of u^2 is 1 for every Gaussian and grows with the
spikes; above a limit the step takes the ordinary gradient, whose mean is the same.
"""

from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine

MAX_ROUGHNESS = 100.0


class GuidePosterior(FlowDistribution):
    """A :class:`FlowDistribution` ending in affine maps, with the path gradient where it is not too noisy."""

    def score_parts(self, value: Tensor) -> ScoreParts:
        usable = self.path_gradient and torch.is_grad_enabled() and self.has_rsample
        if not usable or torch.jit.is_tracing():  # a trace cannot choose
            return super().score_parts(value)
        log_prob = self.log_prob(value)
        point = value.detach().requires_grad_()
        with self._fixed() as (base, transforms):
            flow = [t for t in transforms if not isinstance(t, Affine | HierarchicalAffine)]
            unscaled, ladj = point, torch.zeros(())
            affine: Any
            for affine in reversed(transforms[len(flow) :]):
                unscaled, inverse_ladj = affine.inverse_and_ladj(unscaled)
                ladj = ladj + inverse_ladj
            fixed = self._pull(unscaled, base, flow) + ladj
        derivative, u = torch.autograd.grad(fixed, [point, unscaled], torch.ones_like(fixed))
        if not bool(u.square().mean() < MAX_ROUGHNESS):
            return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=log_prob)
        # the value of log q, and its derivative with fixed parameters, without a second pass through its graph
        entropy_term = log_prob.detach() + ((value - value.detach()) * derivative).sum(-1)
        return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=entropy_term)
