"""Conditioners: the networks that turn one half of a vector, and a context, into spline parameters.

All of them end in a layer of zeros, so that a fresh coupling is the identity, and take ``(inputs, context=None)`` with
shapes ``(*batch, input_dim)`` and ``(*batch, context_dim)``, which broadcast against each other.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit.ops.layout import Layout
from pyro_flowkit.ops.shapes import broadcast_shapes

Activation = Callable[[Tensor], Tensor]

MAX_DEFAULT_WIDTH = 128
MIN_SQUARE = 1e-12


def default_hidden_dims(input_dim: int) -> list[int]:
    """Pyro's rule, ``[10 * input_dim, 10 * input_dim]``, capped at 128 units a layer."""
    return [min(10 * input_dim, MAX_DEFAULT_WIDTH)] * 2


def checked_hidden_dims(hidden_dims: Sequence[int] | None, input_dim: int) -> list[int]:
    """The widths as a list; None is :func:`default_hidden_dims`.

    Raises:
        ValueError: for a number alone.
    """
    if hidden_dims is None:
        return default_hidden_dims(input_dim)
    if isinstance(hidden_dims, int):
        raise ValueError(
            f"Expected hidden_dims to be a sequence of widths, got {hidden_dims}: [{hidden_dims}, {hidden_dims}]."
        )
    return list(hidden_dims)


def compressed(context: Tensor) -> Tensor:
    """A context of shape ``(*batch, C)`` whose root mean square r over C became asinh(r), in the same direction.

    What an encoder says may grow without limit while it learns. Networks that read it take steps in proportion; so
    small contexts stay as they are, large ones are brought near, and no two become the same.
    """
    wide = context.to(torch.promote_types(context.dtype, torch.float32))
    size = wide.square().mean(-1, keepdim=True).add(MIN_SQUARE).sqrt()
    return (wide * (size.asinh() / size)).to(context.dtype)


def make_conditioner(
    input_dim: int,
    output_dim: int,
    hidden_dims: Sequence[int],
    *,
    context_dim: int = 0,
    activation: Activation | type[nn.Module] | None = None,
    residual: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """The conditioner that fits: a network, or a bare parameter where there is nothing to condition on.

    Args:
        input_dim: size of the part that is conditioned on; may be 0.
        output_dim: number of outputs.
        hidden_dims: widths of the hidden layers; a residual network takes one width, repeated for each of its blocks.
        context_dim: size of the context; 0 for none.
        activation: a module class, a module or a function of a tensor; None is ReLU.
        residual: a :class:`ResidualNetwork` instead of an :class:`MLP`.
        dropout: probability of dropping a hidden unit while training, in [0, 1).

    Raises:
        ValueError: for widths, sizes or a dropout that make no network, saying what was expected and what came.
    """
    if input_dim + context_dim == 0:
        return Constant(output_dim)
    network = ResidualNetwork if residual else MLP
    return network(
        input_dim,
        output_dim,
        hidden_dims,
        context_dim=context_dim,
        activation=activation,
        dropout=dropout,
    )


class Constant(nn.Module):
    """A conditioner with no inputs: its output is a parameter, shape ``(output_dim,)``, zero at first."""

    def __init__(self, output_dim: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(output_dim))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.value


class _Network(nn.Module):
    """What the two networks share: ``packed``, the weights and biases of all their layers in one parameter.

    An optimizer that treats tensors one by one, as Pyro's do, takes as long for a bias as for a matrix.
    """

    packed: nn.Parameter

    def __init__(
        self,
        input_dim: int,
        shapes: Sequence[tuple[int, int]],
        activation: Activation | type[nn.Module] | None,
        dropout: float,
    ):
        super().__init__()
        self.input_dim = input_dim
        self.activation = _instance(activation)
        self.dropout = _validated_dropout(dropout)
        self.layout = Layout(tuple(shapes))
        layers = [nn.Linear(columns, rows) for rows, columns in shapes]
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)
        parameters = [p.detach().flatten() for layer in layers for p in layer.parameters()]
        self.packed = nn.Parameter(torch.cat(parameters))

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight ``(outputs, inputs)`` and bias ``(outputs,)`` of every layer, the layer of the output last.

        They are views of ``packed``: what is written into them, under ``torch.no_grad()``, is written into the network.
        """
        return self.layout.unpack(self.weights())

    def weights(self) -> Tensor:
        """All that :meth:`layers` gives, one after the other, as the network computes with it."""
        return self.packed

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{columns} -> {rows}" for rows, columns in self.layout.shapes)
        return f"layers: {shapes}; dropout={self.dropout:g}"


class MLP(_Network):
    """A multilayer perceptron on the inputs and the context, side by side. Arguments as in :func:`make_conditioner`."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int],
        *,
        context_dim: int = 0,
        activation: Activation | type[nn.Module] | None = None,
        dropout: float = 0.0,
    ):
        sizes = [input_dim + context_dim, *_validated_widths(hidden_dims), output_dim]
        super().__init__(input_dim, list(zip(sizes[1:], sizes, strict=False)), activation, dropout)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        *hidden, output = self.layers()
        h = _join(inputs if self.input_dim else None, context, self.packed.dtype)
        for layer in hidden:
            h = drop(self.activation(F.linear(h, *layer)), self.dropout, self.training)
        return F.linear(h, *output)

    def is_plain(self) -> bool:
        """Whether its layers and ReLU are all that a call of this network is: no dropout, no hooks, no method that
        somebody replaced."""
        if type(self.activation) is not nn.ReLU or (self.dropout and self.training):
            return False
        own = self.__dict__
        if (type(self).forward, type(self).layers) != _PLAIN or "forward" in own or "layers" in own:
            return False
        return not (_is_hooked(self) or _is_hooked(self.activation))


_PLAIN = (MLP.forward, MLP.layers)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class ResidualNetwork(_Network):
    """Pre-activation residual blocks of two layers, with the context gating each block (He et al. 2016; Durkan et al.
    2019, appendix B). ``hidden_dims`` gives one block per entry; all entries must be equal.

    :meth:`layers` has the layer of the inputs, the first layer of every block, the second of every block, with a
    context the gate of every block, and the layer of the output.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int],
        *,
        context_dim: int = 0,
        activation: Activation | type[nn.Module] | None = None,
        dropout: float = 0.0,
    ):
        hidden_dims = _validated_widths(hidden_dims)
        if len(set(hidden_dims)) != 1:
            raise ValueError(
                f"Expected a residual network's hidden_dims to be one width, repeated, got {hidden_dims}."
            )
        width, count = hidden_dims[0], len(hidden_dims)
        shapes = [(width, input_dim + context_dim)] + 2 * count * [(width, width)]
        if context_dim:
            shapes += count * [(width, context_dim)]
        super().__init__(input_dim, [*shapes, (output_dim, width)], activation, dropout)
        self.count_blocks = count

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        dtype, count = self.packed.dtype, self.count_blocks
        first_of_all, *blocks, output = self.layers()
        h = F.linear(_join(inputs if self.input_dim else None, context, dtype), *first_of_all)
        for i in range(count):
            step = F.linear(self.activation(h), *blocks[i])
            step = drop(self.activation(step), self.dropout, self.training)
            step = F.linear(step, *blocks[count + i])
            if context is not None:
                step = step * torch.sigmoid(F.linear(context.to(dtype), *blocks[2 * count + i]))
            h = h + step
        return F.linear(self.activation(h), *output)


def _join(inputs: Tensor | None, context: Tensor | None, dtype: torch.dtype) -> Tensor:
    present = [t.to(dtype) for t in (inputs, context) if t is not None]
    if len(present) == 1:
        return present[0]
    batch_shape = broadcast_shapes(*(t.shape[:-1] for t in present))
    return torch.cat([t.expand(*batch_shape, t.shape[-1]) for t in present], dim=-1)


def drop(h: Tensor, probability: float, training: bool) -> Tensor:
    # jit's dropout draws random numbers even for a probability of 0
    return F.dropout(h, probability, training) if probability else h


def _instance(activation: Activation | type[nn.Module] | None) -> Activation:
    if activation is None:
        return nn.ReLU()
    instance = activation() if isinstance(activation, type) else activation
    if not callable(instance):
        raise ValueError(
            f"Expected activation to be a module class, a module or a function, got {activation!r}."
        )
    return instance


def _validated_widths(hidden_dims: Sequence[int]) -> list[int]:
    widths = list(hidden_dims)
    if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(
            f"Expected hidden_dims to be a non-empty list of positive integers, got {hidden_dims!r}."
        )
    return widths


def _validated_dropout(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"Expected dropout in [0, 1), got {dropout!r}.")
    return float(dropout)
