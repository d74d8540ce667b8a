"""Conditioners: the networks that turn one half of a vector, and a context, into spline parameters.

All of them end in a layer of zeros, so that a fresh coupling is the identity, and take ``(inputs, context=None)`` with
shapes ``(*batch, input_dim)`` and ``(*batch, context_dim)``, which broadcast against each other.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

MAX_DEFAULT_WIDTH = 128


def default_hidden_dims(input_dim: int) -> list[int]:
    """Pyro's rule, ``[10 * input_dim, 10 * input_dim]``, capped at 128 units a layer."""
    return [min(10 * input_dim, MAX_DEFAULT_WIDTH)] * 2


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


class MLP(nn.Module):
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
        super().__init__()
        hidden_dims = _validated_widths(hidden_dims)
        self.input_dim = input_dim
        self.activation = _instance(activation)
        self.dropout = _validated_dropout(dropout)
        dims = [input_dim + context_dim, *hidden_dims]
        self.hidden = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True)
        )
        self.output = _zero_linear(dims[-1], output_dim)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        h = _join(inputs if self.input_dim else None, context, self.output.weight.dtype)
        for layer in self.hidden:
            h = _drop(self.activation(layer(h)), self.dropout, self.training)
        return self.output(h)

    def plain_layers(self) -> list[Tensor] | None:
        """Weight and bias of every layer, one after the other, if that and ReLU is all that a call of this network is:
        no dropout, no hooks, no layer or method that somebody replaced; None otherwise."""
        layers = (*self.hidden, self.output)
        if type(self.activation) is not nn.ReLU or (self.dropout and self.training):
            return None
        if type(self).forward is not _MLP_FORWARD or "forward" in self.__dict__:
            return None
        if _is_hooked(self) or any(
            type(layer) is not nn.Linear or _is_hooked(layer) for layer in layers
        ):
            return None
        return [parameter for layer in layers for parameter in layer._parameters.values()]


_MLP_FORWARD = MLP.forward


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class ResidualNetwork(nn.Module):
    """Pre-activation residual blocks of two layers, with the context gating each block (He et al. 2016; Durkan et al.
    2019, appendix B). ``hidden_dims`` gives one block per entry; all entries must be equal.
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
        super().__init__()
        hidden_dims = _validated_widths(hidden_dims)
        if len(set(hidden_dims)) != 1:
            raise ValueError(
                f"Expected a residual network's hidden_dims to be one width, repeated, got {hidden_dims}."
            )
        width = hidden_dims[0]
        self.input_dim = input_dim
        self.activation = _instance(activation)
        self.dropout = _validated_dropout(dropout)
        self.input = nn.Linear(input_dim + context_dim, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in hidden_dims)
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in hidden_dims)
        gates = hidden_dims if context_dim else []
        self.gates = nn.ModuleList(nn.Linear(context_dim, width) for _ in gates)
        self.output = _zero_linear(width, output_dim)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        dtype = self.output.weight.dtype
        h = self.input(_join(inputs if self.input_dim else None, context, dtype))
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            step = first(self.activation(h))
            step = second(_drop(self.activation(step), self.dropout, self.training))
            if context is not None:
                step = step * torch.sigmoid(self.gates[i](context.to(dtype)))
            h = h + step
        return self.output(self.activation(h))


def _join(inputs: Tensor | None, context: Tensor | None, dtype: torch.dtype) -> Tensor:
    present = [t.to(dtype) for t in (inputs, context) if t is not None]
    if len(present) == 1:
        return present[0]
    batch_shape = torch.broadcast_shapes(*(t.shape[:-1] for t in present))
    return torch.cat([t.expand(*batch_shape, t.shape[-1]) for t in present], dim=-1)


def _drop(h: Tensor, probability: float, training: bool) -> Tensor:
    # jit's dropout draws random numbers even for a probability of 0
    return F.dropout(h, probability, training) if probability else h


def _zero_linear(input_dim: int, output_dim: int) -> nn.Linear:
    layer = nn.Linear(input_dim, output_dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


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
