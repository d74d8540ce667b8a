r"""Spline autoregressive transforms: every dimension through a spline that the dimensions before it condition.

.. math::

    y_i &= R(x_i;\, c_i(x_1, \dots, x_{i-1})) \\
    \log|\det dy/dx| &= \textstyle\sum_i \log R'(x_i;\, c_i) \\
    x_i &= R^{-1}(y_i;\, c_i(x_1, \dots, x_{i-1})), \quad i = 1, \dots, D

R are element-wise rational-quadratic splines, c the conditioner, a masked network. Forward, all of c is one pass. The
inverse needs x_1 to x_{i-1} for x_i and goes one dimension at a time; as it computes each unit of the network once,
when what the unit depends on is there, it costs the arithmetic of one pass, in D small steps.

Pyro's direction: forward is the cheap one, draws are fast, and so is the density of draws, for variational inference.
For data, whose density goes through the inverse, take ``.inv`` of the transform, as
``SplineFlow(..., coupling=False)`` does.

References:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019, section 3.2.

    George Papamakarios, Theo Pavlakou, Iain Murray. Masked Autoregressive Flow for Density Estimation. NeurIPS 2017.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_flowkit.autoregressive_nn import MaskedMLP
from pyro_flowkit.nn import Activation, Constant, checked_hidden_dims, compressed
from pyro_flowkit.ops import (
    Columns,
    SplineSettings,
    Tails,
    spline_columns,
    spline_elements,
)
from pyro_flowkit.ops.coupling import CONDITIONER_LIMIT
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.transforms.base import FlowTransformModule, VectorMap, check_size
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule
from pyro_flowkit.transforms.permute import checked_permutation
from pyro_flowkit.transforms.spline import (
    check_inside,
    checked_settings,
    conditioned_splines,
    describe,
    domain_of,
)


class _Autoregressive(VectorMap, nn.Module):
    """What the two transforms share: the order, the splines and the map itself, with or without a context."""

    autoregressive = True  # as Pyro has it
    settings: SplineSettings
    conditioner: MaskedMLP | Constant
    permutation: Tensor
    inverse_permutation: Tensor
    compresses_context = False
    """Whether the conditioner reads the :func:`~pyro_flowkit.nn.compressed` context, in its place."""

    def _setup(
        self, conditioner: MaskedMLP | Constant, permutation: Tensor, settings: SplineSettings
    ) -> None:
        self.settings = settings
        self.domain = constraints.independent(domain_of(settings), 1)
        self.conditioner = conditioner
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", permutation.argsort())
        self._read_order()
        size = len(permutation)
        self._columns = Columns(size, own=tuple(range(size)))

    def _read_order(self) -> None:
        self._permutes = self.permutation.tolist() != list(range(len(self.permutation)))

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        y, ladj = conditioned_splines(
            self._ordered(x),
            self._seen(context),
            self.conditioner,
            self._features,
            None,
            (0, self._columns.dim),
            self._columns,
            self.settings,
            inverse=False,
        )
        return self._restored(y), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y, context)
        conditioner, context = self.conditioner, self._seen(context)
        if isinstance(conditioner, Constant):
            return spline_columns(
                y, conditioner.value, None, self._columns, self.settings, inverse=True
            )
        if context is not None:
            batch_shape = broadcast_shapes(y.shape[:-1], context.shape[:-1])
            y = y.expand(*batch_shape, y.shape[-1])
        made = conditioner.start(y.shape[:-1], context)
        found: list[Tensor] = []
        ladjs: list[Tensor] = []
        for value in self._ordered(y).unbind(-1):
            features = self._features(found[-1].unsqueeze(-1)) if found else None
            params = conditioner.advance(made, features)
            x, ladj = spline_elements(value, params, self.settings, inverse=True)
            found.append(x)
            ladjs.append(ladj)
        return self._restored(torch.stack(found, dim=-1)), torch.stack(ladjs, dim=-1).sum(-1)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        self._check_input(x, context)
        check_inside(x, self.settings, type(self).__name__)

    def _features(self, x: Tensor) -> Tensor:
        """What the conditioner sees of some dimensions, ``(*batch, n)`` to ``(*batch, n * num_features)``."""
        features = F.hardtanh(x, -CONDITIONER_LIMIT, CONDITIONER_LIMIT)  # a cheap clamp
        if self.settings.tails == "circular":  # the same point after a whole turn
            angle = features * (math.pi / self.settings.bound)
            features = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(-2)
        return features

    def _seen(self, context: Tensor | None) -> Tensor | None:
        return compressed(context) if context is not None and self.compresses_context else context

    def _ordered(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.permutation) if self._permutes else x

    def _restored(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.inverse_permutation) if self._permutes else x

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_order()

    def extra_repr(self) -> str:
        return describe(self.settings)


class SplineAutoregressive(_Autoregressive, FlowTransformModule):
    """Spline autoregressive transform without a context; see the module's docstring for its equations.

    Args:
        input_dim: size D of the event.
        conditioner: a :class:`~pyro_flowkit.autoregressive_nn.MaskedMLP`, which with circular tails reads the cosine
            and the sine of every angle; for D = 1 a :class:`~pyro_flowkit.nn.Constant`: an element-wise spline.
        permutation: integer tensor of shape ``(D,)``: the order of the dimensions, the first conditions all others.
        settings: bins, bound and tails.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.spline_autoregressive(3, permutation=torch.tensor([2, 0, 1]))  # with its conditioner
        >>> isinstance(transform, T.SplineAutoregressive)
        True
        >>> _ = [torch.nn.init.normal_(parameter) for parameter in transform.parameters()]
        >>> jacobian = torch.autograd.functional.jacobian(transform, torch.tensor([0.1, 0.2, 0.3]))
        >>> (jacobian != 0).int()  # y[2] follows x[2] alone, y[0] that and x[0], y[1] all three
        tensor([[1, 0, 1],
                [1, 1, 1],
                [0, 0, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        input_dim: int,
        conditioner: MaskedMLP | Constant,
        *,
        permutation: Tensor,
        settings: SplineSettings,
    ):
        super().__init__(input_dim)
        self._setup(conditioner, checked_permutation(permutation, input_dim), settings)


class ConditionalSplineAutoregressive(_Autoregressive, ConditionalFlowTransformModule):
    """Spline autoregressive transform whose conditioner also reads a context of shape ``(*batch, context_dim)``.

    Arguments as for :class:`SplineAutoregressive`; the spline of the first dimension depends on the context alone.

    Example:
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline_autoregressive(3, 2)  # with its conditioner
        >>> isinstance(transform, T.ConditionalSplineAutoregressive), transform.context_dim
        (True, 2)
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        conditioner: MaskedMLP,
        *,
        permutation: Tensor,
        settings: SplineSettings,
    ):
        super().__init__(input_dim, context_dim)
        self._setup(conditioner, checked_permutation(permutation, input_dim), settings)


def spline_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "quadratic",
    *,
    permutation: Tensor | None = None,
    tails: Tails = "linear",
    activation: Activation | type[nn.Module] | None = None,
    dropout: float = 0.0,
) -> SplineAutoregressive:
    """A :class:`SplineAutoregressive` with its conditioner; Pyro's helper of the same name, the identity at first.

    Forward takes one pass through the conditioner, the inverse D small steps, together of the same arithmetic. The
    density of data goes through the inverse: ``spline_autoregressive(D).inv`` has it in one pass.

    Args:
        input_dim: size D of the event, at least 1.
        hidden_dims: widths of the conditioner's hidden layers; None is ``[10 * D, 10 * D]``, at most 128 each. A layer
            narrower than D - 1 shows each dimension only some of those before it.
        count_bins: number of bins.
        bound: the splines live on ``[-bound, bound]``.
        order: "quadratic", the only one there is; Pyro's "linear" is refused.
        permutation: integer tensor of shape ``(D,)``, the order of the dimensions: ``permutation[0]`` conditions all
            others. None is their own order (Pyro's is random).
        tails: "linear", "circular" or None; see :func:`~pyro_flowkit.ops.rational_quadratic_forward`.
        activation: of the conditioner; None is ReLU.
        dropout: probability of dropping a hidden unit while training.

    Raises:
        ValueError: for settings that make no transform, saying what was expected and what came.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.spline_autoregressive(3)
        >>> x = torch.randn(5, 3)
        >>> y, log_det = transform.call_and_ladj(x)
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    settings = checked_settings(count_bins, bound, tails, order)
    check_size("input_dim", input_dim)
    network = {"activation": activation, "dropout": dropout}
    conditioner = _make_conditioner(input_dim, hidden_dims, settings, 0, network)
    return SplineAutoregressive(
        input_dim, conditioner, permutation=_order(input_dim, permutation), settings=settings
    )


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "quadratic",
    *,
    permutation: Tensor | None = None,
    tails: Tails = "linear",
    activation: Activation | type[nn.Module] | None = None,
    dropout: float = 0.0,
) -> ConditionalSplineAutoregressive:
    """A :class:`ConditionalSplineAutoregressive` with its conditioner; see :func:`spline_autoregressive`.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline_autoregressive(3, 2)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> transform.condition(context)(x).shape
        torch.Size([5, 3])
    """
    settings = checked_settings(count_bins, bound, tails, order)
    check_size("input_dim", input_dim)
    check_size("context_dim", context_dim)
    network = {"activation": activation, "dropout": dropout}
    conditioner = _make_conditioner(input_dim, hidden_dims, settings, context_dim, network)
    return ConditionalSplineAutoregressive(
        input_dim,
        context_dim,
        cast(MaskedMLP, conditioner),
        permutation=_order(input_dim, permutation),
        settings=settings,
    )


def _order(input_dim: int, permutation: Tensor | None) -> Tensor:
    return torch.arange(input_dim) if permutation is None else permutation


def _make_conditioner(
    input_dim: int,
    hidden_dims: Sequence[int] | None,
    settings: SplineSettings,
    context_dim: int,
    network: dict[str, Any],
) -> MaskedMLP | Constant:
    if input_dim == 1 and not context_dim:
        return Constant(settings.num_params)
    return MaskedMLP(
        input_dim,
        2 if settings.tails == "circular" else 1,
        settings.num_params,
        checked_hidden_dims(hidden_dims, input_dim),
        context_dim=context_dim,
        **network,
    )
