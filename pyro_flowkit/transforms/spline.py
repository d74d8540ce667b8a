"""Element-wise splines: every dimension through a rational-quadratic spline of its own.

``Spline`` learns the parameters themselves; ``ConditionalSpline`` reads them from a context. Both have ``event_dim`` 0,
as in Pyro: over ``Normal(zeros(D), ones(D))`` they make D independent elements, over that ``.to_event(1)`` one vector.

Reference:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.
"""

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_flowkit.nn import MLP, default_hidden_dims, make_conditioner
from pyro_flowkit.ops import (
    Columns,
    SplineSettings,
    Tails,
    coupling,
    spline_columns,
    spline_elements,
)
from pyro_flowkit.transforms.base import FlowTransformModule, VectorMap
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule


def domain_of(settings: SplineSettings) -> constraints.Constraint:
    """Where one spline of these settings is defined, and where its values are."""
    if settings.tails is None:
        return constraints.interval(-settings.bound, settings.bound)
    return constraints.real


def check_inside(inputs: Tensor, settings: SplineSettings, owner: str) -> None:
    """Without tails, refuse what lies outside the box while validation is on; NaN says it otherwise."""
    if settings.tails is not None or not Distribution._validate_args:
        return
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    bound = settings.bound
    try:
        outside = bool((inputs.detach().abs() > bound).any())
    except RuntimeError:  # under vmap no value can be looked at
        return
    if outside:
        raise ValueError(
            f"Expected values within [-{bound:g}, {bound:g}] for {owner} with tails=None, got "
            f"values up to {inputs.detach().abs().max():g}."
        )


def describe(settings: SplineSettings) -> str:
    """The settings in the ``repr`` of a module."""
    return f"count_bins={settings.count_bins}, bound={settings.bound:g}, tails={settings.tails!r}"


def conditioned_splines(
    x: Tensor,
    context: Tensor | None,
    conditioner: nn.Module,
    features: Callable[[Tensor], Tensor],
    shared_params: Tensor | None,
    passed: tuple[int, int] | None,
    columns: Columns,
    settings: SplineSettings,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Splines whose raw parameters are the output of a conditioner; one call of the kernel where it can run that.

    Args:
        features: from x to what the conditioner reads of it.
        passed: first column that it reads, and the column after the last; None where they are no neighbours.
        x, context, shared_params, columns, settings, inverse: as for the kernel's
            :func:`~pyro_flowkit.ops.coupling.spline_coupling`.
    """
    if (
        passed is not None
        and settings.tails != "circular"
        and isinstance(conditioner, MLP)
        and conditioner.is_plain()
    ):
        layout = conditioner.layout
        context = coupling.for_every_row(context, x)
        if coupling.applies(x, context, conditioner.packed, shared_params, layout):
            packed = conditioner.weights()
            return coupling.spline_coupling(
                x,
                context,
                packed,
                shared_params,
                layout,
                passed,
                columns,
                settings,
                inverse=inverse,
            )
    params = conditioner(features(x), context)
    return spline_columns(x, params, shared_params, columns, settings, inverse=inverse)


class _ElementWise(VectorMap, nn.Module):
    """What the two element-wise splines share: the map itself, with or without a context."""

    event_dim = 0
    settings: SplineSettings
    columns: Columns

    def _setup(self, settings: SplineSettings, columns: Columns) -> None:
        self.settings = settings
        self.columns = columns
        self.domain = domain_of(settings)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, inverse=True)

    def call_and_event_ladj(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._map_elements(x, context, inverse=False)

    def inverse_and_event_ladj(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._map_elements(y, context, inverse=True)

    def _map(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        params = self._checked_params(x, context)
        own, shared = (None, params) if context is None else (params, None)
        return spline_columns(x, own, shared, self.columns, self.settings, inverse=inverse)

    def _map_elements(
        self, x: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        params = self._checked_params(x, context)
        params = params.unflatten(-1, (self.input_dim, self.settings.num_params))
        return spline_elements(x, params, self.settings, inverse=inverse)

    def _checked_params(self, x: Tensor, context: Tensor | None) -> Tensor:
        self._check_input(x, context)
        check_inside(x, self.settings, type(self).__name__)
        return self._params(x, context)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError


class Spline(_ElementWise, FlowTransformModule):
    """Element-wise spline with free parameters, the identity at first.

    Args:
        input_dim: size D of the event.
        count_bins: number of bins.
        bound: the spline lives on ``[-bound, bound]``.
        tails: "linear", "circular" or None; see :func:`~pyro_flowkit.ops.rational_quadratic_forward`.
        order: "quadratic", the only one there is; Pyro's "linear" is refused.

    Shapes: ``(*batch, D)`` to ``(*batch, D)``; ``log_abs_det_jacobian`` has shape ``(*batch, D)``, the log-det of
    ``call_and_ladj``, which is that of the whole vector, ``(*batch,)``; in nats.

    Raises:
        ValueError: for settings that make no spline, with the numbers.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> y, log_det = T.Spline(3).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        input_dim: int,
        count_bins: int = 8,
        bound: float = 3.0,
        *,
        tails: Tails = "linear",
        order: str = "quadratic",
    ):
        super().__init__(input_dim)
        settings = checked_settings(count_bins, bound, tails, order)
        self._setup(settings, Columns(input_dim, own=(), shared=tuple(range(input_dim))))
        self.params = nn.Parameter(torch.zeros(input_dim * settings.num_params))

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.params

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, {describe(self.settings)}"


class ConditionalSpline(_ElementWise, ConditionalFlowTransformModule):
    """Element-wise spline whose parameters are the output of a conditioner of the context.

    Args:
        input_dim: size D of the event.
        context_dim: size of the context.
        conditioner: module ``(inputs of size 0, context) -> (*batch, D * num_spline_params)``.
        count_bins, bound, tails: as for :class:`Spline`.

    Shapes: as for :class:`Spline`. A batch of contexts does not become part of a distribution's batch shape, as it does
    under transforms of vectors; see :class:`~pyro_flowkit.transforms.conditional.ConditionedTransform`.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline(3, 2)  # a ConditionalSpline with its conditioner
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> transform.condition(context)(x).shape
        torch.Size([5, 3])
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
        settings = SplineSettings(count_bins, float(bound), tails)
        self._setup(settings, Columns(input_dim, own=tuple(range(input_dim))))
        self.conditioner = conditioner

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.conditioner(x[..., :0], context)

    def extra_repr(self) -> str:
        return (
            f"input_dim={self.input_dim}, context_dim={self.context_dim}, {describe(self.settings)}"
        )


def spline(
    input_dim: int,
    count_bins: int = 8,
    bound: float = 3.0,
    *,
    tails: Tails = "linear",
    order: str = "quadratic",
) -> Spline:
    """An element-wise :class:`Spline`; Pyro's helper of the same name.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.spline(3)
        >>> x = torch.randn(5, 3)
        >>> y, log_det = transform.call_and_ladj(x)
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    return Spline(input_dim, count_bins, bound, tails=tails, order=order)


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

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline(3, 2)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> transform.condition(context)(x).shape
        torch.Size([5, 3])
    """
    settings = checked_settings(count_bins, bound, tails, order)
    conditioner = make_conditioner(
        0,
        input_dim * settings.num_params,
        default_hidden_dims(input_dim) if hidden_dims is None else hidden_dims,
        context_dim=context_dim,
    )
    return ConditionalSpline(input_dim, context_dim, conditioner, count_bins, bound, tails=tails)


def checked_settings(count_bins: int, bound: float, tails: Tails, order: str) -> SplineSettings:
    """The settings of a helper that Pyro has, too: ``order="quadratic"`` is accepted, "linear" refused with advice."""
    if order != "quadratic":
        raise ValueError(
            f'Expected order="quadratic", got {order!r}: pyro_flowkit has rational-quadratic splines only. Drop the '
            'argument, or keep pyro.distributions.transforms for order="linear".'
        )
    return SplineSettings(count_bins, float(bound), tails)
