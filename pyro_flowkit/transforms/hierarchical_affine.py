r"""An affine map of each block of a vector whose location and scale are functions of the blocks before it.

.. math:: y_1 = x_1, \qquad y_b = m_b(y_{<b}) + \exp(s_b(y_{<b})) \odot x_b

Hierarchical models have posteriors of this shape: latents whose scale is another latent (funnels), or whose location
is a curve of others (bananas). With s linear, Neal's funnel is all but exact; splines, which are the identity outside
of their bounds, stretch a dimension by a factor of hundreds only at great cost. m and s are a linear function plus a
network, both zero at first; s bends smoothly towards its limits of -15 and 15. Either part is divided by the square
root of the number of its terms, so that a step of Adam changes a scale by about as much whatever that number is.

It is a stack of the affine couplings of Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using
Real NVP. ICLR 2017; the blocks are what a caller knows of the structure.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit.nn import MLP
from pyro_flowkit.transforms.base import FlowTransformModule

# a scale that follows a line would overflow far outside
MAX_LOG_SCALE = 15.0
# beyond this a linear map from block to block is left out: the network, which is narrower, does what it can
MAX_LINEAR_SIZE = 20_000


class HierarchicalAffine(FlowTransformModule):
    """``y_b = m(y_before) + exp(s(y_before)) x_b`` for each block b but the first; the identity at first.

    Args:
        block_sizes: number of dimensions of each block, in order; at least two blocks.
        hidden_dims: widths of the networks' hidden layers.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats.

    Raises:
        ValueError: for fewer than two blocks, or an empty one.
    """

    def __init__(self, block_sizes: Sequence[int], *, hidden_dims: Sequence[int] = (32,)):
        sizes = list(block_sizes)
        if len(sizes) < 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"Expected at least two positive block_sizes, got {sizes}.")
        super().__init__(sum(sizes))
        self.block_sizes = sizes
        self.conditioners = nn.ModuleList(
            _LocationAndScale(sum(sizes[:i]), sizes[i], hidden_dims) for i in range(1, len(sizes))
        )

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        y, *rest = x.to(self._dtype()).split(self.block_sizes, dim=-1)
        ladj = y.new_zeros(y.shape[:-1])
        for conditioner, block in zip(self.conditioners, rest, strict=True):
            loc, log_scale = conditioner(y)
            y = torch.cat([y, torch.addcmul(loc, block, log_scale.exp())], dim=-1)
            ladj = ladj + log_scale.sum(-1)
        return y.to(x.dtype), ladj.to(x.dtype)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        outputs = y.to(self._dtype())
        first, *rest = outputs.split(self.block_sizes, dim=-1)
        blocks, ladj = [first], first.new_zeros(first.shape[:-1])
        before = 0
        for i, (conditioner, block) in enumerate(zip(self.conditioners, rest, strict=True)):
            before += self.block_sizes[i]
            loc, log_scale = conditioner(outputs[..., :before])
            blocks.append((block - loc) * (-log_scale).exp())
            ladj = ladj - log_scale.sum(-1)
        return torch.cat(blocks, dim=-1).to(y.dtype), ladj.to(y.dtype)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        return f"block_sizes={self.block_sizes}"


class _LocationAndScale(nn.Module):
    """m and s of a block, from all blocks before it."""

    weight: Tensor | None

    def __init__(self, input_dim: int, output_dim: int, hidden_dims: Sequence[int]):
        super().__init__()
        self.network = MLP(input_dim, 2 * output_dim, hidden_dims)
        self._of_network, self._of_line = hidden_dims[-1] ** -0.5, input_dim**-0.5
        kept = input_dim * 2 * output_dim <= MAX_LINEAR_SIZE
        weight = nn.Parameter(torch.zeros(2 * output_dim, input_dim)) if kept else None
        self.register_parameter("weight", weight)

    def forward(self, before: Tensor) -> tuple[Tensor, Tensor]:
        output = self._of_network * self.network(before)
        if self.weight is not None:
            output = output + self._of_line * F.linear(before, self.weight)
        loc, log_scale = output.chunk(2, dim=-1)
        return loc, MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)
