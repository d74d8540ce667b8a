"""Transforms whose map depends on a context, and what they become when the context is given."""

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.transforms.base import (
    Bijection,
    Inverse,
    VectorMap,
    check_context,
    check_size,
    pushed_by_inverse,
)
from pyro_flowkit.transforms.tensors import forget_unconstrained, tensors_in
from pyro_flowkit.warning import warn


class ConditionalFlowTransformModule(VectorMap, nn.Module):
    """A transform whose map depends on a context; ``condition(context)`` gives a transform.

    A plain module, registered as a virtual subclass of Pyro's ``ConditionalTransformModule``: the metaclass of Pyro's
    own keeps it from going through ``to_pyro_module_``. ``event_dim`` and ``is_affine`` are as for :class:`Bijection`.

    Example:
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.conditional_spline(3, 2)
        >>> isinstance(transform, T.ConditionalFlowTransformModule), transform.input_dim, transform.context_dim
        (True, 3, 2)
    """

    def __init__(self, input_dim: int, context_dim: int):
        super().__init__()
        check_size("input_dim", input_dim)
        check_size("context_dim", context_dim)
        self.input_dim = input_dim
        self.context_dim = context_dim

    def call_and_ladj(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(*batch, input_dim)`` forward under a context ``(*batch, context_dim)``; the two broadcast."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map back under a context; the log-det is that of the inverse map."""
        raise NotImplementedError

    def pushed_derivative(
        self, x: Tensor, y: Tensor, derivative: Tensor, context: Tensor
    ) -> Tensor:
        """As :meth:`Bijection.pushed_derivative`, with the context held fixed as well."""
        fixed = context.detach()
        return pushed_by_inverse(lambda y: self.inverse_and_ladj(y, fixed), y, derivative)

    def condition(self, context: Tensor) -> "ConditionedTransform":
        """The transform for this context, shape ``(*batch, context_dim)``.

        Raises:
            ValueError: if the context is missing or of another size.
        """
        check_context(context, self.context_dim, type(self).__name__)
        return ConditionedTransform(self, context)

    @property
    def inv(self) -> "ConditionalInverseTransformModule":
        return ConditionalInverseTransformModule(self)

    def __getstate__(self) -> dict[str, Any]:
        forget_unconstrained(self)
        return self.__dict__.copy()


ConditionalTransformModule.register(ConditionalFlowTransformModule)


class ConditionalInverseTransformModule(Inverse, ConditionalFlowTransformModule):
    """The inverse of a conditional transform."""

    def __init__(self, transform: ConditionalFlowTransformModule):
        super().__init__(transform.input_dim, transform.context_dim)
        self._setup(transform)


class ConditionedTransform(Bijection):
    """A conditional transform with its context filled in.

    Where a distribution calls it, it follows its ``event_dim``:

    - 1: the context's batch becomes part of the batch shape, so that ``sample()`` is one draw for each context;
    - 0: values keep their shape, as under Pyro's element-wise transforms, and the context's batch has to be part of
      theirs: ``sample((N,))``, ``expand`` or a plate draw one value for each of N contexts.

    ``call_and_ladj`` and ``inverse_and_ladj`` broadcast values and context against each other in either case.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> from pyro_flowkit.transforms.conditional import ConditionedTransform
        >>> conditioned = T.conditional_spline(2, 3).condition(torch.randn(5, 3))
        >>> isinstance(conditioned, ConditionedTransform), conditioned(torch.randn(5, 2)).shape
        (True, torch.Size([5, 2]))
    """

    def __init__(self, transform: ConditionalFlowTransformModule, context: Tensor):
        super().__init__(cache_size=0)
        self.transform = transform
        self.context = context
        self.input_dim = transform.input_dim
        self.event_dim = transform.event_dim
        self.is_affine = transform.is_affine

    @property
    def domain(self) -> constraints.Constraint:
        return self.transform.domain

    @property
    def codomain(self) -> constraints.Constraint:
        return self.transform.codomain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)

    def call_and_event_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_event_ladj(x, self.context)

    def inverse_and_event_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_event_ladj(y, self.context)

    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        return self.transform.pushed_derivative(x, y, derivative, self.context)

    def _call(self, x: Tensor) -> Tensor:
        if self.event_dim == 0:
            self._check_batch(x)
        else:
            self._warn_of_square(x)
        return super()._call(x)

    def _inverse(self, y: Tensor) -> Tensor:
        if self.event_dim == 0:
            self._check_batch(y)
        return super()._inverse(y)

    def _check_batch(self, value: Tensor) -> None:
        """Refuse to widen: one draw would serve every context, and the distribution's shapes know nothing of it."""
        if torch.jit.is_tracing():  # sizes are tensors there
            return
        batch, own = value.shape[:-1], self.context.shape[:-1]
        pairs = zip(reversed(own), reversed(batch), strict=False)
        if len(own) > len(batch) or any(size not in (1, given) for size, given in pairs):
            raise ValueError(
                f"Expected values whose batch shape contains that of the context, {tuple(own)}, got {tuple(batch)}: "
                f"the element-wise {type(self.transform).__name__} keeps the shape of its values, as Pyro's does. "
                f"Draw with sample({tuple(own)}), in a plate or after expand; call_and_ladj and inverse_and_ladj "
                "broadcast."
            )

    def _warn_of_square(self, x: Tensor) -> None:
        """N draws for each of N contexts is what Pyro's ``sample((N,))`` with N contexts turns into here."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        own = self.context.shape[:-1]
        if own.numel() > 1 and x.shape[:-1] == own + own:
            shape = tuple(own)
            warn(
                f"Mapped {shape} values for each of {shape} contexts. The batch of a context is part of the batch "
                f"shape under {type(self.transform).__name__}: for one draw for each context, as sample({shape}) "
                "gives with the transforms of pyro.distributions, call sample(). A FlowDistribution, or a SplineFlow, "
                "draws the square without this warning."
            )

    def tracked_tensors(self) -> list[Tensor]:
        return [self.context, *tensors_in(self.transform)]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return shape if self.event_dim == 0 else self.widened(shape)

    inverse_shape = forward_shape

    def widened(self, shape: torch.Size) -> torch.Size:
        """The shape of values, with the batch of the context broadcast into it."""
        return torch.Size([*broadcast_shapes(shape[:-1], self.context.shape[:-1]), *shape[-1:]])

    __hash__ = object.__hash__


def conditioned(layers: Iterable[Any], context: Tensor | None) -> list[Any]:
    """The layers as transforms: those that depend on a context with this one, the others as they are."""
    return [
        layer.condition(context)
        if isinstance(layer, ConditionalFlowTransformModule) and context is not None
        else layer
        for layer in layers
    ]


def with_batch_of_contexts(
    base: torch.distributions.Distribution, transforms: Transform | list[Transform]
) -> torch.distributions.Distribution:
    """The base, widened by the batch of each context, so that every context has noise of its own.

    Transforms of vectors have that done by torch; element-wise ones keep the shape of their values.
    """
    shape = wide = base.batch_shape + base.event_shape
    for transform in [transforms] if isinstance(transforms, Transform) else transforms:
        if isinstance(transform, ConditionedTransform) and wide:
            wide = transform.widened(wide)
    return base if wide == shape else base.expand(wide[: len(wide) - len(base.event_shape)])
