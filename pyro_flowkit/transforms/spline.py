"""Element-wise splines: every dimension through a rational-quadratic spline of its own.

``Spline`` learns the parameters themselves; ``ConditionalSpline`` reads them from a context.

Reference:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.
"""

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_flowkit.nn import default_hidden_dims, make_conditioner
from pyro_flowkit.ops.rational_quadratic import (
    Tails,
    num_spline_params,
    rational_quadratic_forward,
    rational_quadratic_inverse,
    validate_spline,
)
from pyro_flowkit.transforms.base import ConditionalFlowTransformModule, FlowTransformModule

SplineFunction = Callable[..., tuple[Tensor, Tensor]]


class SplineSettings:
    """What the splines of one transform have in common: bins, bound, tails."""

    def __init__(self, count_bins: int, bound: float, tails: Tails):
        validate_spline(count_bins, bound, tails)
        self.count_bins = count_bins
        self.bound = float(bound)
        self.tails = tails
        self.num_params = num_spline_params(count_bins, tails)

    @property
    def domain(self) -> constraints.Constraint:
        if self.tails is None:
            return constraints.independent(constraints.interval(-self.bound, self.bound), 1)
        return constraints.real_vector

    def apply(
        self, function: SplineFunction, inputs: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply forward or inverse to ``(*batch, D)`` with raw parameters ``(*batch, D * num_params)``."""
        params = params.reshape(*params.shape[:-1], inputs.shape[-1], self.num_params)
        return function(
            inputs, params, count_bins=self.count_bins, bound=self.bound, tails=self.tails
        )

    def check_inside(self, inputs: Tensor, owner: str) -> None:
        """Without tails, refuse what lies outside the box while validation is on; NaN says it otherwise."""
        if self.tails is not None or not Distribution._validate_args:
            return
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        try:
            outside = bool((inputs.detach().abs() > self.bound).any())
        except RuntimeError:  # under vmap no value can be looked at
            return
        if outside:
            raise ValueError(
                f"Expected values within [-{self.bound:g}, {self.bound:g}] for {owner} with tails=None, got "
                f"values up to {inputs.detach().abs().max():g}."
            )

    def __repr__(self) -> str:
        return f"count_bins={self.count_bins}, bound={self.bound:g}, tails={self.tails!r}"


class Spline(FlowTransformModule):
    """Element-wise spline with free parameters, the identity at first.

    Args:
        input_dim: size D of the event.
        count_bins: number of bins.
        bound: the spline lives on ``[-bound, bound]``.
        tails: "linear", "circular" or None; see :func:`~pyro_flowkit.ops.rational_quadratic_forward`.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats.

    Raises:
        ValueError: for settings that make no spline, with the numbers.
    """

    def __init__(
        self, input_dim: int, count_bins: int = 8, bound: float = 3.0, *, tails: Tails = "linear"
    ):
        super().__init__(input_dim)
        self.settings = SplineSettings(count_bins, bound, tails)
        self.params = nn.Parameter(torch.zeros(input_dim * self.settings.num_params))

    @property
    def domain(self) -> constraints.Constraint:
        return self.settings.domain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(rational_quadratic_forward, x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(rational_quadratic_inverse, y)

    def _map(self, function: SplineFunction, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        self.settings.check_inside(x, type(self).__name__)
        value, ladj = self.settings.apply(function, x, self.params)
        return value, ladj.sum(-1)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, {self.settings}"


class ConditionalSpline(ConditionalFlowTransformModule):
    """Element-wise spline whose parameters are the output of a conditioner of the context.

    Args:
        input_dim: size D of the event.
        context_dim: size of the context.
        conditioner: module ``(inputs of size 0, context) -> (*batch, D * num_spline_params)``.
        count_bins, bound, tails: as for :class:`Spline`.
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        conditioner: nn.Module,
        count_bins: int = 8,
        bound: float = 3.0,
        *,
        tails: Tails = "linear",
    ):
        super().__init__(input_dim, context_dim)
        self.settings = SplineSettings(count_bins, bound, tails)
        self.conditioner = conditioner

    @property
    def domain(self) -> constraints.Constraint:
        return self.settings.domain

    def call_and_ladj(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(rational_quadratic_forward, x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(rational_quadratic_inverse, y, context)

    def _map(self, function: SplineFunction, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self._check_inputs(x, context)
        self.settings.check_inside(x, type(self).__name__)
        value, ladj = self.settings.apply(function, x, self.conditioner(x[..., :0], context))
        return value, ladj.sum(-1)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, context_dim={self.context_dim}, {self.settings}"


def spline(
    input_dim: int,
    count_bins: int = 8,
    bound: float = 3.0,
    *,
    tails: Tails = "linear",
    order: str = "quadratic",
) -> Spline:
    """An element-wise :class:`Spline`; Pyro's helper of the same name."""
    check_order(order)
    return Spline(input_dim, count_bins, bound, tails=tails)


def conditional_spline(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    *,
    tails: Tails = "linear",
    order: str = "quadratic",
) -> ConditionalSpline:
    """An element-wise :class:`ConditionalSpline` with a multilayer perceptron as its conditioner.

    Args:
        hidden_dims: widths of the hidden layers; None is ``[10 * input_dim, 10 * input_dim]``, at most 128 each.
        order: "quadratic", the only one there is; Pyro's "linear" is refused.
    """
    check_order(order)
    settings = SplineSettings(count_bins, bound, tails)
    conditioner = make_conditioner(
        0,
        input_dim * settings.num_params,
        default_hidden_dims(input_dim) if hidden_dims is None else hidden_dims,
        context_dim=context_dim,
    )
    return ConditionalSpline(input_dim, context_dim, conditioner, count_bins, bound, tails=tails)


def check_order(order: str) -> None:
    """Accept Pyro's ``order="quadratic"``; refuse "linear" with advice."""
    if order != "quadratic":
        raise ValueError(
            f'Expected order="quadratic", got {order!r}: pyro_flowkit has rational-quadratic splines only. Drop the '
            'argument, or keep pyro.distributions.transforms for order="linear".'
        )
