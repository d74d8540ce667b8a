r"""An affine map of each block of a vector whose location and scale are functions of the blocks before it.

.. math:: y_1 = x_1, \qquad y_b = m_b(v(y_{<b})) + \exp(s_b(v(y_{<b}))) \odot x_b

Hierarchical models have posteriors of this shape: latents whose scale is another latent (funnels), or whose location
is a curve of others (bananas), where the data say little, and which stay where they are where the data say much. So m
and exp(s) are those of the product of two Gaussians: a prior, whose location and log scale are a linear function plus a
network of v(y_before), and a likelihood, whose location and precision are numbers. With the prior's functions linear,
Neal's funnel is all but exact, and so are normal effects, given their mean and scale, of normal data; splines, which
are the identity outside of their bounds, stretch a dimension by a factor of hundreds only at great cost. All functions
are zero at first; the log scale bends smoothly towards its limits of -15 and 15. The linear part and the network are
divided by the square root of the number of their terms, so that a step of Adam changes a scale by about as much
whatever that number is. v is the identity up to 5 and a logarithm from there on, so that scales that follow scales have
tails like powers. The formulas are in :mod:`pyro_flowkit.ops.block_affine`.

It is a stack of the affine couplings of Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using
Real NVP. ICLR 2017; the blocks are what a caller knows of the structure.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowkit.nn import MLP
from pyro_flowkit.ops import block_affine, chain
from pyro_flowkit.ops.chain import Link
from pyro_flowkit.transforms.base import FlowTransformModule

# beyond this a linear map from block to block is left out: the network, which is narrower, does what it can
MAX_LINEAR_SIZE = 20_000
# half the logarithm of the likelihood's precision, in units of the prior's: little, so that a funnel is near
LIKELIHOOD_AT_FIRST = -1.0

_TENSORS = ("network.packed", "weight", "likelihood")


class HierarchicalAffine(FlowTransformModule):
    """``y_b = m(v(y_before)) + exp(s(v(y_before))) x_b`` for each block b but the first; the identity at first.

    m and exp(s) are location and scale of a Gaussian given the blocks before it, times one that is always the same.

    Args:
        block_sizes: number of dimensions of each block, in order; at least two blocks.
        hidden_dims: widths of the networks' hidden layers.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats.

    Raises:
        ValueError: for fewer than two blocks, or an empty one.

    Example:
        >>> import torch
        >>> from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine
        >>> y, log_det = HierarchicalAffine([1, 2]).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    is_affine = True

    def __init__(self, block_sizes: Sequence[int], *, hidden_dims: Sequence[int] = (32,)):
        sizes = list(block_sizes)
        if len(sizes) < 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"Expected at least two positive block_sizes, got {sizes}.")
        super().__init__(sum(sizes))
        self.block_sizes = sizes
        made = [
            _LocationAndScale(sum(sizes[:i]), sizes[i], hidden_dims) for i in range(1, len(sizes))
        ]
        self.conditioners = nn.ModuleList(made)
        places = [f"conditioners.{i}" for i in range(len(made))]
        self._names = tuple(f"{at}.{of}" for at in places for of in _TENSORS)
        self._blocks = block_affine.make_blocks(sizes, [one.network.layout for one in made])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        inputs = x.to(self._dtype())
        y, ladj = block_affine.block_affine(inputs, self._blocks, self._parameters_of_blocks())
        return y.to(x.dtype), ladj.to(x.dtype)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        outputs = y.to(self._dtype())
        first, *rest = outputs.split(self.block_sizes, dim=-1)
        parameters = self._parameters_of_blocks()
        found, ladj = [first], first.new_zeros(first.shape[:-1])
        for i, (block, own) in enumerate(zip(self._blocks, rest, strict=True)):
            loc, log_scale = block_affine.location_and_log_scale(
                outputs[..., : block.start], block, *block_affine.parameters_of_block(parameters, i)
            )
            found.append((own - loc) * (-log_scale).exp())
            ladj = ladj - log_scale.sum(-1)
        return torch.cat(found, dim=-1).to(y.dtype), ladj.to(y.dtype)

    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        found = block_affine.pushed_derivative(y, derivative)
        return super().pushed_derivative(x, y, derivative) if found is None else found

    def link(self) -> Link | None:
        if type(self) is not HierarchicalAffine:
            return None
        link = chain.blocks(self._blocks, self._parameters_of_blocks())
        return link and link._replace(names=self._names)

    def _parameters_of_blocks(self) -> list[Any]:
        found: list[Any] = []
        conditioner: Any
        for conditioner in self.conditioners:
            found += [conditioner.network.packed, conditioner.weight, conditioner.likelihood]
        return found

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        return f"block_sizes={self.block_sizes}"


class _LocationAndScale(nn.Module):
    """The parameters of m and s of a block, functions of all blocks before it.

    Those of the likelihood are its location, and half the logarithm of its precision, shape ``(2, output_dim)``.
    """

    weight: Tensor | None

    def __init__(self, input_dim: int, output_dim: int, hidden_dims: Sequence[int]):
        super().__init__()
        self.network = MLP(input_dim, 2 * output_dim, hidden_dims)
        kept = input_dim * 2 * output_dim <= MAX_LINEAR_SIZE
        weight = nn.Parameter(torch.zeros(2 * output_dim, input_dim)) if kept else None
        self.register_parameter("weight", weight)
        at_first = torch.tensor([[0.0], [LIKELIHOOD_AT_FIRST]])
        self.likelihood = nn.Parameter(at_first.repeat(1, output_dim))
