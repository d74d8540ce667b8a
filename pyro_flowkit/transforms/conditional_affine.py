r"""An affine map whose location and scale are functions of the context: the last layer of a conditional flow.

.. math:: y = m(c) + \mathrm{diag}(s(c)) (I + N(c)) x

with N strictly lower triangular. Each of m, log s and N is a constant, plus a linear function of the context, plus a
network of it; the last two are zero at first. The linear part makes the posterior of a linear-Gaussian model exact; the
network is for the rest. As in :mod:`pyro_flowkit.transforms.affine` the constants are multiplied by ``rate``: under
Adam they move ``rate`` times faster than the other parameters. So does the linear part of m and N where the context is
one number; of more each moves :data:`SLOPE_RATE` times faster, as their moves add up, and so does the linear part of
log s: a posterior does not bear its jitter at a large learning rate.

Slopes of zero give no gradient to a context, which is the end of an encoder that shall be learned: at first every draw
is noise, whatever the datum, and a decoder that is trained with such codes learns to do without them (posterior
collapse). So the first batch of contexts that have a gradient gives m its slopes when it is drawn with: random
directions, a hundredth (:data:`START_SHARE`) of the variance of y over the batch, and the noise has the rest of what
was its own. More would fix where in a code of few numbers which datum has its place, before the decoder has a say.
Contexts that are data have nothing to learn, and in maximum likelihood there are no draws: slopes of zero are a good
start for both.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_flowkit.nn import MLP, compressed
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule
from pyro_flowkit.transforms.first_batch import StartsByBatch, moments

SLOPE_RATE = 2.5
START_SHARE = 0.01


class ConditionalAffine(StartsByBatch, ConditionalFlowTransformModule):
    """``y = loc + S x`` with location and scale conditioned on a context; constant at first.

    The location follows the context from the first draw on that trains an encoder: a forward call with gradients, in
    training mode, of at least two different contexts that have a gradient. A map that was trained otherwise before
    keeps what it has; so does one in a trace, under ``torch.func`` and under ``torch.compile``: make one draw before
    these. In several processes (a ``torch.distributed`` group) every one of them must make that call.

    Args:
        loc: initial location, shape ``(D,)``.
        scale: initial scale of every dimension, positive.
        context_dim: size of the context.
        kind: "full" (lower triangular) or "diagonal" scale.
        hidden_dims: widths of the network's hidden layers.

    Attributes:
        rate: how much faster than other parameters the constants move; the linear part 2.5 times at most, but those of
            location and N for a context of one number, which move as the constants.
        starts_by_draws: whether forward calls :meth:`start`; True.
        weight_rate: how much faster the rows of the linear part move, shape ``(rows, 1)``.

    Shapes: ``(*batch, D)`` and a context ``(*batch, context_dim)`` to ``(*batch, D)``, with log-det ``(*batch,)`` in
    nats.
    """

    is_affine = True
    rate = 10.0

    def __init__(
        self,
        loc: Tensor,
        scale: float,
        context_dim: int,
        kind: Literal["full", "diagonal"] = "full",
        *,
        hidden_dims: Sequence[int],
    ):
        size = loc.shape[-1]
        super().__init__(size, context_dim)
        self.kind = kind if size > 1 else "diagonal"
        below = size * (size - 1) // 2 if self.kind == "full" else 0
        initial = [loc.detach(), torch.full_like(loc.detach(), scale).log(), loc.new_zeros(below)]
        self.raw_constant = nn.Parameter(torch.cat(initial) / self.rate)
        self.weight = nn.Parameter(loc.new_zeros(2 * size + below, context_dim))
        self.network = MLP(context_dim, 2 * size + below, hidden_dims).to(loc)
        slope_rate = self.rate if context_dim == 1 else SLOPE_RATE
        weight_rate = torch.full((2 * size + below, 1), slope_rate)
        weight_rate[size : 2 * size].clamp_(max=SLOPE_RATE)
        self.weight_rate: Tensor
        self.register_buffer("weight_rate", weight_rate.to(loc), persistent=False)
        rows, columns = torch.tril_indices(size, size, -1)
        self._below: Tensor
        self.register_buffer("_below", rows * size + columns, persistent=False)
        self.starts_by_draws = True

    def call_and_ladj(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x, context)
        if self.starts_by_draws:
            self.start(context)
        loc, log_scale, lower = self._parameters_for(context)
        y = x.to(loc.dtype)
        if lower is not None:
            y = y + (lower @ y.unsqueeze(-1)).squeeze(-1)
        y = loc + y * log_scale.exp()
        return y.to(x.dtype), log_scale.sum(-1).to(x.dtype).expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y, context)
        if self._may_start and self._is_trained_by(context):
            self._may_start = False
        loc, log_scale, lower = self._parameters_for(context)
        x = (y.to(loc.dtype) - loc) * (-log_scale).exp()
        if lower is not None:
            x = torch.linalg.solve_triangular(
                lower, x.unsqueeze(-1), upper=False, unitriangular=True
            ).squeeze(-1)
        return x.to(y.dtype), (-log_scale.sum(-1)).to(y.dtype).expand(x.shape[:-1])

    @torch.no_grad()
    def pushed_derivative(
        self, x: Tensor, y: Tensor, derivative: Tensor, context: Tensor
    ) -> Tensor:
        _, log_scale, lower = self._parameters_for(context)
        pushed = derivative.to(log_scale.dtype)
        if lower is not None:
            pushed = torch.linalg.solve_triangular(
                lower.mT, pushed.unsqueeze(-1), upper=True, unitriangular=True
            ).squeeze(-1)
        return (pushed * (-log_scale).exp()).to(derivative.dtype)

    def start(self, context: Tensor) -> None:
        """Give the location its first slopes by a batch of contexts, where it has none and they are to be learned.

        Args:
            context: shape ``(*batch, C)``, the first C columns of the map's contexts. It does nothing without a
                gradient.
        """
        if not (self._may_start and context.requires_grad and self._is_trained_by(context)):
            return
        if not bool(self.weight.any()):
            self._give_slopes(context.detach())
        self._may_start = not bool(self.weight.any())

    def _is_trained_by(self, context: Tensor) -> bool:
        return self._trains(context, self.weight, self.raw_constant)

    @torch.no_grad()
    def _give_slopes(self, context: Tensor) -> None:
        size = self.input_dim
        context_dim = context.shape[-1]
        directions = torch.randn(size, context_dim, generator=torch.Generator().manual_seed(0))
        directions = directions.to(context.device, torch.float64)
        rows = context.reshape(-1, context_dim).to(torch.float64)
        count, mean, squares = moments(torch.cat([rows, rows @ directions.mT], -1))
        deviation = (squares / max(count, 1.0)).sqrt()
        own, along = deviation.tensor_split([context_dim])
        if not bool((along.isfinite() & (along > 0)).all()):
            return
        directions = directions * (own > 1e-6 * own.max())  # how far others will vary is not known
        constant = self.rate * self.raw_constant.to(torch.float64)
        loc, log_scale, below = constant.tensor_split([size, 2 * size])
        unit = START_SHARE**0.5 * log_scale.exp() / along
        slopes = unit.unsqueeze(-1) * directions
        loc = loc - slopes @ mean[:context_dim]
        self.weight[:size, :context_dim] = slopes / self.weight_rate[:size]
        log_scale = log_scale + 0.5 * math.log1p(-START_SHARE)
        self.raw_constant.copy_(torch.cat([loc, log_scale, below]) / self.rate)

    def _parameters_for(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Location and logarithm of the scale ``(*batch, D)``, and N ``(*batch, D, D)`` where it is not zero."""
        context = context.to(self.weight.dtype)
        constant = self.rate * self.raw_constant
        output = torch.nn.functional.linear(context, self.weight_rate * self.weight, constant)
        output = output + self.network(compressed(context))
        size = self.input_dim
        loc, log_scale, below = output.tensor_split([size, 2 * size], dim=-1)
        if self.kind == "diagonal":
            return loc, log_scale, None
        flat = below.new_zeros((*below.shape[:-1], size * size))
        lower = flat.index_copy(-1, self._below, below)
        return loc, log_scale, lower.unflatten(-1, (size, size))

    def extra_repr(self) -> str:
        return (
            f"input_dim={self.input_dim}, context_dim={self.context_dim}, kind={self.kind!r}, "
            f"rate={self.rate:g}"
        )
