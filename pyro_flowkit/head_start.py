"""The head start that the affine map of a conditional flow has over everything else in it.

A flow that ends in an affine map of its context starts as a Gaussian, and the posterior may be narrow and far away, in
other places for other contexts. All draws are pulled into one direction then, hundreds of times as hard as they are
bent near the posterior, and whatever can follow does. In thirty steps of Adam the splines have squeezed themselves and
taken over what a location and a scale should do; the network of the affine map has made the scale depend on contexts
that it does not depend on; and thousands of steps do not undo it. So at first no gradient reaches them through a draw
(not even zeros, which Adam would count as steps): the constants and the linear part of the map move alone for
:data:`NETWORK_STEPS` steps of the optimizer, with its network up to :data:`SPLINE_STEPS`, and then all together.

Densities of given values, as in maximum likelihood, have nothing to wait for: there everything learns from the first
step on. Neither does a flow whose map was set before it was trained, from a saved state for one.

A call at which the constants are where they were at the last one is no step: several draws may belong to one. As the
constants may be frozen, it counts as :data:`IDLE` of one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine

NETWORK_STEPS = 20
SPLINE_STEPS = 100
IDLE = 0.05


class HeadStart(nn.Module):
    """Counts the steps of a :class:`ConditionalAffine`, and has the rest of its flow wait.

    It holds no parameters. Its buffers say how training went, not what was learned: they are no part of a
    ``state_dict``, but of checkpoints.

    Args:
        affine: the flow's last layer.
    """

    seen: Tensor
    steps: Tensor

    def __init__(self, affine: ConditionalAffine):
        super().__init__()
        constant = affine.raw_constant.detach()
        self.register_buffer("seen", constant.clone(), persistent=False)
        self.register_buffer("steps", constant.new_zeros(()), persistent=False)

    def give(
        self,
        distribution: FlowDistribution,
        splines: Iterable[nn.Module],
        affine: ConditionalAffine,
    ) -> None:
        """Have draws of the conditioned flow give no gradient to what waits; at every call of the flow.

        In a trace, which keeps its operations, a tensor decides; under ``torch.compile`` and ``torch.func`` nothing
        waits.

        Args:
            distribution: of the flow.
            splines: its layers before the affine map.
            affine: the map.
        """
        is_tracing = torch.jit.is_tracing()
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if is_transformed() and not is_tracing:
            return
        if not is_tracing and bool(self.steps >= SPLINE_STEPS):
            return
        self._count(affine)
        waiting: list[tuple[list[nn.Module], int]] = [
            ([affine.network], NETWORK_STEPS),
            ([*splines], SPLINE_STEPS),
        ]
        if is_tracing:
            distribution._held = [(modules, self.steps >= end) for modules, end in waiting]
        else:
            steps = float(self.steps)
            distribution._held = [(modules, None) for modules, end in waiting if steps < end]

    @torch.no_grad()
    def _count(self, affine: ConditionalAffine) -> None:
        constant = affine.raw_constant.detach()
        was_set = (self.steps == 0.0) & affine.weight.any()
        self.steps.add_((constant != self.seen).any().to(constant.dtype).clamp(min=IDLE))
        self.steps.add_(SPLINE_STEPS * was_set)
        self.seen.copy_(constant)
