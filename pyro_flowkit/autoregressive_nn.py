r"""The conditioner of an autoregressive transform: outputs for dimension i are functions of the dimensions before it.

Every unit of the network has a degree, the number of dimensions that it may depend on: input i has degree i, a hidden
unit one of 1 to D - 1 (or 0, where a context gives it something to depend on), and

.. math:: W_{jk} = 0 \quad \text{unless} \quad \deg(j) \ge \deg(k),

where outputs for dimension i count as of degree i - 1.

Units are in the order of their degrees. So each weight is zero to the right of a staircase, and what belongs to a
dimension is a block of neighbours: taken dimension by dimension, as the inverse of a transform has to, the network
computes every unit once.

Reference:
    Mathieu Germain, Karol Gregor, Iain Murray, Hugo Larochelle. MADE: Masked Autoencoder for Distribution Estimation.
    ICML 2015.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit.nn import MLP, Activation, drop


class MaskedMLP(MLP):
    """A multilayer perceptron whose outputs for dimension i depend on the dimensions before i, and on the context.

    Args:
        input_dim: number D of dimensions.
        num_features: inputs of each dimension, side by side.
        num_params: outputs of each dimension, side by side.
        hidden_dims: widths of the hidden layers. Below D - 1 a layer has no units for some of the degrees.
        context_dim: size of the context, 0 for none; without one D must be 2 at least.
        activation, dropout: as in :func:`~pyro_flowkit.nn.make_conditioner`.

    Shapes: ``(*batch, D * num_features)`` and a context ``(*batch, context_dim)`` to ``(*batch, D * num_params)``.
    """

    mask: Tensor

    def __init__(
        self,
        input_dim: int,
        num_features: int,
        num_params: int,
        hidden_dims: Sequence[int],
        *,
        context_dim: int = 0,
        activation: Activation | type[nn.Module] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(
            input_dim * num_features,
            input_dim * num_params,
            hidden_dims,
            context_dim=context_dim,
            activation=activation,
            dropout=dropout,
        )
        self.num_features, self.num_params = num_features, num_params
        dimensions = range(1, input_dim + 1)
        lowest = 0 if context_dim else 1
        degrees = [
            [i for i in dimensions for _ in range(num_features)],
            *(_spread(width, lowest, input_dim - 1) for width in self.layout.sizes[1:-1]),
            [i - 1 for i in dimensions for _ in range(num_params)],
        ]
        # of every hidden layer and degree, the first unit and the one after the last
        self._blocks = [
            [(bisect_left(own, degree), bisect_right(own, degree)) for degree in range(input_dim)]
            for own in degrees[1:-1]
        ]
        before = torch.tensor(degrees[0] + [0] * context_dim)
        parts = []
        for own in map(torch.tensor, degrees[1:]):
            parts += [own[:, None] >= before, torch.ones(len(own), dtype=torch.bool)]
            before = own
        self.register_buffer("mask", torch.cat([part.flatten() for part in parts]))

    def weights(self) -> Tensor:
        return self.packed * self.mask

    def start(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> "PartialPass":
        """A pass that goes on by :meth:`advance`, one dimension at a time.

        Args:
            batch_shape: of the features to come.
            context: shape ``(*batch, context_dim)``, which broadcasts to it.
        """
        layers = self.layers()
        weight, first = layers[0]
        if context is not None:
            first = F.linear(context.to(weight.dtype), weight[:, self.input_dim :], first)
            first = first.expand(*batch_shape, -1)
        return PartialPass(layers, first, [None] * len(layers))

    def advance(self, made: "PartialPass", features: Tensor | None = None) -> Tensor:
        """The outputs for the next dimension, shape ``(*batch, num_params)``.

        Args:
            made: the pass so far, which goes on.
            features: of the dimension before, shape ``(*batch, num_features)``; None for the first dimension.
        """
        degree = made.count
        made.count += 1
        if features is not None:
            made.extend(0, features.to(self.packed.dtype))
        for i, (weight, bias) in enumerate(made.layers[:-1]):
            start, stop = self._blocks[i][degree]
            if start == stop:
                continue
            if i == 0:
                h = made.first[..., start:stop]
                if made.known[0] is not None:
                    h = h + F.linear(
                        made.known[0], weight[start:stop, : degree * self.num_features]
                    )
            else:
                inputs = cast(Tensor, made.known[i])  # every layer has units of the lowest degree
                h = F.linear(inputs, weight[start:stop, : inputs.shape[-1]], bias[start:stop])
            made.extend(i + 1, drop(self.activation(h), self.dropout, self.training))
        weight, bias = made.layers[-1]
        own = slice(degree * self.num_params, (degree + 1) * self.num_params)
        known = made.known[-1]
        if known is None:
            return bias[own]
        return F.linear(known, weight[own, : known.shape[-1]], bias[own])


@dataclass
class PartialPass:
    """What a pass has computed for the dimensions so far.

    Attributes:
        layers: weight and bias of every layer.
        first: what the first layer adds for the context, and its bias.
        known: inputs of every layer, as far as they are known.
        count: number of dimensions that have their outputs.
    """

    layers: list[tuple[Tensor, Tensor]]
    first: Tensor
    known: list[Tensor | None]
    count: int = 0

    def extend(self, layer: int, block: Tensor) -> None:
        known = self.known[layer]
        self.known[layer] = block if known is None else torch.cat([known, block], dim=-1)


def _spread(width: int, lowest: int, highest: int) -> list[int]:
    """Degrees of a layer's units, in order and even: all of them, or as many as there are units for, ends included."""
    count = highest - lowest + 1
    if width >= count:
        return [lowest + j * count // width for j in range(width)]
    return [lowest + j * (count - 1) // max(width - 1, 1) for j in range(width)]
