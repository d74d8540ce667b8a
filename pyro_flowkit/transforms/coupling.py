r"""Spline coupling: one part of the vector passes through, and conditions the splines of the other.

With the vector split by a mask into x_p (passed through to the conditioner) and x_t (transformed):

.. math::

    y_p &= S(x_p), \qquad y_t = R(x_t;\, c(x_p)) \\
    \log|\det dy/dx| &= \textstyle\sum \log S'(x_p) + \sum \log R'(x_t;\, c(x_p)) \\
    x_p &= S^{-1}(y_p), \qquad x_t = R^{-1}(y_t;\, c(x_p)) \\
    \log|\det dx/dy| &= -\log|\det dy/dx|

S is an element-wise spline with free parameters (the identity with ``identity=True``), R are element-wise splines whose
parameters are the output of the conditioner c. Both directions cost the same: one run of c.

Reference:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019, section 3.1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_flowkit.nn import MLP, Activation, compressed
from pyro_flowkit.ops import Columns, SplineSettings, Tails, chain, coupling, fused, spline_columns
from pyro_flowkit.ops.chain import Link
from pyro_flowkit.ops.columns import take
from pyro_flowkit.ops.coupling import CONDITIONER_LIMIT
from pyro_flowkit.transforms.base import FlowTransformModule, VectorMap, given
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule
from pyro_flowkit.transforms.masks import Split, conditioner_of, make_mask
from pyro_flowkit.transforms.spline import (
    check_inside,
    checked_settings,
    conditioned_splines,
    describe,
    domain_of,
)


class _Coupling(VectorMap, nn.Module):
    """What the two couplings share: the split, the splines and the map itself, with or without a context."""

    settings: SplineSettings
    conditioner: nn.Module
    passed_params: nn.Parameter | None
    mask: Tensor
    compresses_context = False
    """Whether the conditioner reads the :func:`~pyro_flowkit.nn.compressed` context, in its place."""

    def _setup(
        self, conditioner: nn.Module, mask: Tensor, settings: SplineSettings, identity: bool
    ) -> None:
        self.settings = settings
        self.domain = constraints.independent(domain_of(settings), 1)
        self.conditioner = conditioner
        self.register_buffer("mask", mask)
        self._split = Split(mask)
        passed = int(mask.sum())
        if identity or passed == 0:
            self.register_parameter("passed_params", None)
        else:
            self.passed_params = nn.Parameter(torch.zeros(passed * settings.num_params))

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        columns = self._split.transformed if self.passed_params is None else self._split.both
        return self._map(x, context, self.passed_params, columns, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y, context)
        split, ladj = self._split, None
        if self.passed_params is not None:  # the conditioner sees the inverse of this part
            y, ladj = spline_columns(
                y, None, self.passed_params, split.only_passed, self.settings, inverse=True
            )
        x, own_ladj = self._map(y, context, None, split.transformed, inverse=True)
        return x, own_ladj if ladj is None else own_ladj + ladj

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        self._check_input(x, context)
        check_inside(x, self.settings, type(self).__name__)

    def _map(
        self,
        x: Tensor,
        context: Tensor | None,
        shared_params: Tensor | None,
        columns: Columns,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        if context is not None and self.compresses_context:
            context = compressed(context)
        return conditioned_splines(
            x,
            context,
            self.conditioner,
            self._features,
            shared_params,
            self._split.passed_range,
            columns,
            self.settings,
            inverse=inverse,
        )

    def _features(self, x: Tensor) -> Tensor:
        features = take(x, self._split.passed, self._split.dim)
        features = F.hardtanh(features, -CONDITIONER_LIMIT, CONDITIONER_LIMIT)  # a cheap clamp
        if self.settings.tails == "circular":  # the same point after a whole turn
            angle = features * (math.pi / self.settings.bound)
            features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return features

    def pushed_derivative(
        self, x: Tensor, y: Tensor, derivative: Tensor, context: Tensor | None = None
    ) -> Tensor:
        split, settings = self._split, self.settings
        found = coupling.pushed_derivative(y, derivative, split.transformed, settings)
        if found is None:
            return super().pushed_derivative(x, y, derivative, *given(context))
        if self.passed_params is None:
            return found
        plan = (split.only_passed, settings, True, True)
        ones = y.new_ones(y.shape[:-1])
        return fused.backward(y.detach(), None, self.passed_params.detach(), found, ones, plan)[0]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._split = Split(self.mask)

    def extra_repr(self) -> str:
        return f"{describe(self.settings)}, identity={self.passed_params is None}"


class SplineCoupling(_Coupling, FlowTransformModule):
    """Spline coupling without a context; see the module's docstring for its equations.

    Args:
        input_dim: size D of the event. With D = 1 there is nothing to condition on: an element-wise spline.
        conditioner: module ``(x_passed, context) -> (*batch, num_transformed * num_spline_params)``; with circular
            tails it reads the cosine and the sine of every angle that passes through instead.
        mask: bool tensor of shape ``(D,)``; True = passed through to the conditioner.
        settings: bins, bound and tails.
        identity: leave the passed-through part as it is.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> from pyro_flowkit.ops import SplineSettings
        >>> settings, mask = SplineSettings(count_bins=8, bound=3.0), torch.tensor([True, False, False])
        >>> class Conditioner(torch.nn.Module):  # one of your own; spline_coupling makes one
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 2 * settings.num_params)
        ...     def forward(self, passed, context):
        ...         return self.layer(passed)
        >>> transform = T.SplineCoupling(3, Conditioner(), mask=mask, settings=settings)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(transform.inv(transform(x)), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        input_dim: int,
        conditioner: nn.Module,
        *,
        mask: Tensor,
        settings: SplineSettings,
        identity: bool = False,
    ):
        super().__init__(input_dim)
        self._setup(conditioner, mask, settings, identity)

    def link(self) -> Link | None:
        split, conditioner = self._split, self.conditioner
        if (
            type(self) is not SplineCoupling
            or split.passed_range is None
            or self.settings.tails != "linear"
            or not (isinstance(conditioner, MLP) and conditioner.is_plain())
            or "parametrizations" in conditioner._modules  # its parameters are functions of others
        ):
            return None
        link = chain.coupling(
            conditioner.packed,
            self.passed_params,
            conditioner.layout,
            split.passed_range,
            split.transformed if self.passed_params is None else split.both,
            self.settings,
        )
        return link and link._replace(names=("conditioner.packed", "passed_params"))


class ConditionalSplineCoupling(_Coupling, ConditionalFlowTransformModule):
    """Spline coupling whose conditioner also reads a context of shape ``(*batch, context_dim)``.

    Arguments as for :class:`SplineCoupling`; the spline of the passed-through part does not see the context.

    Example:
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline_coupling(3, 2)  # with its conditioner
        >>> isinstance(transform, T.ConditionalSplineCoupling), transform.context_dim
        (True, 2)
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        conditioner: nn.Module,
        *,
        mask: Tensor,
        settings: SplineSettings,
        identity: bool = False,
    ):
        super().__init__(input_dim, context_dim)
        self._setup(conditioner, mask, settings, identity)


def spline_coupling(
    input_dim: int,
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    *,
    mask: Tensor | None = None,
    identity: bool = False,
    tails: Tails = "linear",
    activation: Activation | type[nn.Module] | None = None,
    residual: bool = False,
    dropout: float = 0.0,
    order: str = "quadratic",
) -> SplineCoupling:
    """A :class:`SplineCoupling` with its conditioner; Pyro's helper of the same name, the identity at first.

    Args:
        input_dim: size D of the event, at least 1.
        split_dim: the first ``split_dim`` dimensions pass through; None is ``D // 2``.
        hidden_dims: widths of the conditioner's hidden layers; None is ``[10 * D, 10 * D]``, at most 128 each.
        count_bins: number of bins.
        bound: the splines live on ``[-bound, bound]``.
        mask: bool tensor of shape ``(D,)``, True = passed through to the conditioner; overrides ``split_dim``.
        identity: leave the passed-through part as it is, instead of giving it an element-wise spline.
        tails: "linear", "circular" or None; see :func:`~pyro_flowkit.ops.rational_quadratic_forward`.
        activation: of the conditioner; None is ReLU.
        residual: a residual network as the conditioner, instead of a multilayer perceptron.
        dropout: probability of dropping a hidden unit while training.
        order: "quadratic", the only one there is; Pyro's "linear" is refused.

    Raises:
        ValueError: for settings that make no coupling, saying what was expected and what came.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.spline_coupling(3)
        >>> x = torch.randn(5, 3)
        >>> y, log_det = transform.call_and_ladj(x)
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    settings = checked_settings(count_bins, bound, tails, order)
    mask = make_mask(input_dim, split_dim, mask)
    network = {"activation": activation, "residual": residual, "dropout": dropout}
    conditioner = conditioner_of(mask, hidden_dims, settings, 0, network)
    return SplineCoupling(input_dim, conditioner, mask=mask, settings=settings, identity=identity)


def conditional_spline_coupling(
    input_dim: int,
    context_dim: int,
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    *,
    mask: Tensor | None = None,
    identity: bool = False,
    tails: Tails = "linear",
    activation: Activation | type[nn.Module] | None = None,
    residual: bool = False,
    dropout: float = 0.0,
    order: str = "quadratic",
) -> ConditionalSplineCoupling:
    """A :class:`ConditionalSplineCoupling` with its conditioner; arguments as for :func:`spline_coupling`.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline_coupling(3, 2)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> transform.condition(context)(x).shape
        torch.Size([5, 3])
    """
    settings = checked_settings(count_bins, bound, tails, order)
    mask = make_mask(input_dim, split_dim, mask)
    network = {"activation": activation, "residual": residual, "dropout": dropout}
    conditioner = conditioner_of(mask, hidden_dims, settings, context_dim, network)
    return ConditionalSplineCoupling(
        input_dim, context_dim, conditioner, mask=mask, settings=settings, identity=identity
    )
