"""Several transforms one after the other, and the helper that repeats one kind."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_flowkit.transforms.base import FlowTransformModule, VectorMap, check_context, given
from pyro_flowkit.transforms.chained import chained
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule
from pyro_flowkit.transforms.masks import half_mask

AnyTransform = FlowTransformModule | ConditionalFlowTransformModule


class _Composition(VectorMap):
    """What the two compositions share: the parts, in the order in which forward applies them."""

    parts: nn.ModuleList

    def _setup(self, parts: Sequence["AnyTransform"]) -> None:
        self.parts = nn.ModuleList(parts)
        self.event_dim = max(part.event_dim for part in parts)  # 0 where all are element-wise

    @property
    def domain(self) -> constraints.Constraint:
        return self._of_event(self.parts[0].domain)

    @property
    def codomain(self) -> constraints.Constraint:
        return self._of_event(self.parts[-1].codomain)

    def _of_event(self, constraint: constraints.Constraint) -> constraints.Constraint:
        missing = self.event_dim - constraint.event_dim
        return constraints.independent(constraint, missing) if missing else constraint

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, "call_and_ladj")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(y, context, "inverse_and_ladj", backwards=True)

    def call_and_event_ladj(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(x, context, "call_and_ladj" if self.event_dim else "call_and_event_ladj")

    def inverse_and_event_ladj(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        method = "inverse_and_ladj" if self.event_dim else "inverse_and_event_ladj"
        return self._run(y, context, method, backwards=True)

    def _run(
        self, value: Tensor, context: Tensor | None, method: str, *, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_dim, type(self).__name__)
        total: Tensor | None = None
        parts = chained([*self.parts], value, back=backwards)
        for part in reversed(parts) if backwards else parts:
            value, ladj = getattr(part, method)(
                value, *(given(context) if part.context_dim else ())
            )
            total = ladj if total is None else total + ladj
        return value, cast(Tensor, total)  # there is at least one part


class Compose(_Composition, FlowTransformModule):
    """Transforms applied in order; the log-dets add up.

    Args:
        parts: a non-empty sequence of this package's transforms, all of the same size.

    Raises:
        ValueError: if there are none, or their sizes differ.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> y, log_det = T.Compose([T.spline(3), T.lu_linear(3)]).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, parts: Sequence[FlowTransformModule]):
        super().__init__(_common_dim(parts, FlowTransformModule))
        self._setup(parts)

    @property
    def sign(self) -> int:
        return math.prod(cast(FlowTransformModule, part).sign for part in self.parts)


class ConditionalCompose(_Composition, ConditionalFlowTransformModule):
    """Transforms applied in order, of which some read the context.

    Args:
        parts: a non-empty sequence of this package's transforms, all of the same size.
        context_dim: size of the context.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> parts = [T.conditional_spline_coupling(3, 2), T.permute(3), T.conditional_spline_coupling(3, 2)]
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> T.ConditionalCompose(parts, 2).condition(context)(x).shape
        torch.Size([5, 3])
    """

    def __init__(self, parts: Sequence[AnyTransform], context_dim: int):
        super().__init__(
            _common_dim(parts, (FlowTransformModule, ConditionalFlowTransformModule)), context_dim
        )
        self._setup(parts)


def _common_dim(parts: Sequence[AnyTransform], kinds: type | tuple[type, ...]) -> int:
    if not parts:
        raise ValueError("Expected at least one transform to compose, got none.")
    for part in parts:
        if not isinstance(part, kinds):
            raise ValueError(
                f"Expected transforms of pyro_flowkit, got {type(part).__name__}: put others into "
                "ComposeTransformModule."
            )
    dims = [part.input_dim for part in parts]
    if len(set(dims)) != 1:
        raise ValueError(f"Expected transforms of one input_dim, got {dims}.")
    return dims[0]


def iterated(repeats: int, base_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Repeat ``base_fn(*args, **kwargs)`` and compose the results in order.

    Couplings alternate their masks, so that every output comes to depend on every input: where ``base_fn`` has a
    ``mask`` argument and none (and no ``split_dim``) is given, every second layer passes the other half through.
    (Pyro's helper of the same name passes the same half through each time.)

    Args:
        repeats: number of layers, at least 1.
        base_fn: one of this module's helpers, such as ``spline_coupling``.

    Returns:
        :class:`Compose`, :class:`ConditionalCompose`, or Pyro's ``ComposeTransformModule`` for Pyro's transforms.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.iterated(2, T.spline_coupling, 3)
        >>> transform(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    from pyro.distributions.conditional import ConditionalComposeTransformModule
    from pyro.distributions.torch_transform import ComposeTransformModule

    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"Expected repeats to be an integer >= 1, got {repeats!r}.")
    bound_arguments = inspect.signature(base_fn).bind_partial(*args, **kwargs).arguments
    alternates = "mask" in inspect.signature(base_fn).parameters and not (
        {"mask", "split_dim"} & bound_arguments.keys()
    )
    parts = []
    for i in range(repeats):
        mask = (
            {"mask": half_mask(bound_arguments["input_dim"], flip=i % 2 == 1)} if alternates else {}
        )
        parts.append(base_fn(*args, **kwargs, **mask))
    if all(isinstance(part, FlowTransformModule) for part in parts):
        return Compose(parts)
    if all(isinstance(part, ConditionalFlowTransformModule) for part in parts):
        return ConditionalCompose(parts, parts[0].context_dim)
    if any(hasattr(part, "condition") for part in parts):
        return ConditionalComposeTransformModule(parts)
    return ComposeTransformModule(parts)
