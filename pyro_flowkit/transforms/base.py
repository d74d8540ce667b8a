r"""The shape that every transform of this package shares.

A transform maps the base to the sample (forward). It is written once, as a pair of functions that return value and
log-det together, each running its conditioner once:

.. math::

    \mathrm{call\_and\_ladj}(x) &= (y, \log|\det dy/dx|) \\
    \mathrm{inverse\_and\_ladj}(y) &= (x, \log|\det dx/dy|)

Everything that ``torch.distributions`` and Pyro ask of a transform follows from these two. Nothing is kept between
calls: the log-det that an inverse computed travels with the tensor that it returned, is used once by
``log_abs_det_jacobian``, and is neither copied nor pickled.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TransformModule, constraints
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flowkit.ops.chain import Link
from pyro_flowkit.ops.checks import check_floating
from pyro_flowkit.transforms.tensors import forget_unconstrained, stamp, tensors_in

# under which attribute of an inverse's result its log-det travels
_HINT = "_inverse_ladj"


class VectorMap:
    """A map of vectors, whether or not it depends on a context: what both kinds of transforms share.

    Where ``context_dim`` is not 0, every method takes a context ``(*batch, context_dim)`` after its values.
    """

    event_dim = 1
    is_affine = False
    input_dim: int
    context_dim = 0
    domain = constraints.real_vector
    call_and_ladj: Callable[..., tuple[Tensor, Tensor]]
    inverse_and_ladj: Callable[..., tuple[Tensor, Tensor]]
    pushed_derivative: Callable[..., Tensor]

    @property
    def codomain(self) -> constraints.Constraint:
        return self.domain

    def call_and_event_ladj(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``call_and_ladj``, with a log-det for every event of the domain.

        That is the same, shape ``(*batch,)``, but for element-wise transforms (``event_dim`` 0), which give one for
        every element, shape ``(*batch, input_dim)``.
        """
        return self.call_and_ladj(x, *given(context))

    def inverse_and_event_ladj(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``inverse_and_ladj``, with a log-det for every event of the domain."""
        return self.inverse_and_ladj(y, *given(context))

    def _check_input(self, x: Tensor, context: Tensor | None = None) -> None:
        owner = type(self).__name__
        check_vector(x, self.input_dim, owner)
        check_context(context, self.context_dim, owner)


def given(context: Tensor | None) -> tuple[Tensor, ...]:
    """The context as further arguments of a method; none for a transform that has no use for one."""
    return () if context is None else (context,)


class Bijection(VectorMap, Transform):
    """A transform of vectors given by ``call_and_ladj`` and ``inverse_and_ladj``.

    ``sign``, the sign of the Jacobian's determinant, is +1 unless a subclass says otherwise. ``event_dim`` is that of
    domain and codomain: 1, or 0 for an element-wise transform, whose ``log_abs_det_jacobian`` then has one log-det for
    every element, as Pyro and ``torch.distributions`` have it. ``is_affine`` says that the map only shifts, scales and
    mixes: what comes before it is in whitened units.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> isinstance(T.spline(2), T.Bijection)
        True
    """

    bijective = True
    sign = 1

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(*batch, input_dim)`` forward; the log-det has shape ``(*batch,)`` and is in nats."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(*batch, input_dim)`` back; the log-det is that of the inverse map."""
        raise NotImplementedError

    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        r"""The derivative of a log-density, carried through the map, whose parameters are held fixed.

        .. math:: \frac{d \log q_Y}{d y} = J^{-T} \left(\frac{d \log q_X}{d x} - \frac{d \log|\det J|}{d x}\right)

        Args:
            x: where, shape ``(*batch, input_dim)``.
            y: what ``call_and_ladj(x)`` returned for it.
            derivative: of log q_X with respect to x.

        Returns:
            The derivative of log q_Y with respect to y, without a graph.
        """
        return pushed_by_inverse(self.inverse_and_ladj, y, derivative)

    def link(self) -> Link | None:
        """The map as the kernel takes it along with its neighbours; None where it does not."""
        return None

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x, inverse_ladj = self.inverse_and_event_ladj(y)
        if x is not y and not torch.compiler.is_compiling():
            x.__dict__[_HINT] = InverseLogDet(self, y, inverse_ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| (nats) of every event of the domain; free when ``x`` has just come from ``inv(y)``."""
        if not torch.compiler.is_compiling():
            remembered = x.__dict__.get(_HINT)
            if isinstance(remembered, InverseLogDet):
                inverse_ladj = remembered.take(self, y)
                if inverse_ladj is not None:
                    return -inverse_ladj
        return self.call_and_event_ladj(x)[1]

    def with_cache(self, cache_size: int = 1) -> "Bijection":
        """Return self: nothing is cached between calls, whatever the size."""
        return self

    def tracked_tensors(self) -> list[Tensor]:
        """The tensors that the map depends on, for telling whether a remembered result still holds."""
        raise NotImplementedError


def pushed_by_inverse(
    inverse_and_ladj: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, derivative: Tensor
) -> Tensor:
    """:meth:`Bijection.pushed_derivative` of any map, by autograd through its inverse."""
    with torch.enable_grad():
        point = y.detach().requires_grad_()
        back, inverse_ladj = inverse_and_ladj(point)
        outputs, grads = [back, inverse_ladj], [derivative, torch.ones_like(inverse_ladj)]
        if not inverse_ladj.requires_grad:
            del outputs[1], grads[1]
        return torch.autograd.grad(outputs, point, grads)[0]


class InverseLogDet:
    """The log-det that an inverse computed, riding on its result; taken at most once, by the transform that made it."""

    __slots__ = ("_transform", "_y", "_ladj", "_stamp")

    def __init__(self, transform: Bijection, y: Tensor, ladj: Tensor):
        self._transform = weakref.ref(transform)
        self._y = weakref.ref(y)
        self._ladj: Tensor | None = ladj
        self._stamp = stamp(transform.tracked_tensors(), y)

    def take(self, transform: Bijection, y: Tensor) -> Tensor | None:
        ladj, self._ladj = self._ladj, None
        fits = self._transform() is transform and self._y() is y
        return ladj if fits and self._stamp == stamp(transform.tracked_tensors(), y) else None

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return OrderedDict, ()  # an empty container that every unpickler accepts, and nobody reads


class FlowTransformModule(Bijection, TransformModule):
    """A :class:`Bijection` with parameters: at once a ``torch.distributions`` transform and an ``nn.Module``.

    Example:
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.spline(2)
        >>> isinstance(transform, T.FlowTransformModule), transform.inv.inv is transform
        (True, True)
        >>> sum(p.numel() for p in transform.inv.parameters()) == sum(p.numel() for p in transform.parameters())
        True
    """

    def __init__(self, input_dim: int):
        super().__init__(cache_size=0)
        check_size("input_dim", input_dim)
        self.input_dim = input_dim

    @property
    def inv(self) -> "FlowTransformModule":
        """The inverse, which is a module and owns the same parameters; ``t.inv.inv is t``."""
        return InverseTransformModule(self)

    def tracked_tensors(self) -> list[Tensor]:
        return tensors_in(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def __getstate__(self) -> dict[str, Any]:
        forget_unconstrained(self)
        return super().__getstate__()

    __repr__ = nn.Module.__repr__
    __hash__ = nn.Module.__hash__


class Inverse(VectorMap):
    """What the inverse of a transform and that of a conditional one share."""

    transform: Any

    def _setup(self, transform: Any) -> None:
        self.transform = transform
        self.event_dim = transform.event_dim
        self.is_affine = transform.is_affine

    @property
    def domain(self) -> constraints.Constraint:
        return self.transform.codomain

    @property
    def codomain(self) -> constraints.Constraint:
        return self.transform.domain

    @property
    def inv(self) -> Any:
        return self.transform

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x, *given(context))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(y, *given(context))

    def call_and_event_ladj(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_event_ladj(x, *given(context))

    def inverse_and_event_ladj(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_event_ladj(y, *given(context))


class InverseTransformModule(Inverse, FlowTransformModule):
    """The inverse of a transform, as a module: a ``ComposeTransformModule`` finds and trains its parameters.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> from pyro_flowkit.transforms.base import InverseTransformModule
        >>> transform, x = T.spline(2), torch.randn(5, 2)
        >>> isinstance(transform.inv, InverseTransformModule)
        True
        >>> torch.allclose(transform.inv(transform(x)), x, atol=1e-5)
        True
    """

    def __init__(self, transform: FlowTransformModule):
        super().__init__(transform.input_dim)
        self._setup(transform)

    @property
    def sign(self) -> int:
        return self.transform.sign

    def _call(self, x: Tensor) -> Tensor:
        return self.transform._inverse(x)  # which sends the log-det along


def check_size(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected {name} to be an integer >= {least}, got {value!r}.")


def check_vector(x: Tensor, input_dim: int, owner: str) -> None:
    """Raise a ValueError unless ``x`` has shape ``(*batch, input_dim)`` and is in floating point."""
    check_floating(x, f"input of {owner}")
    if torch.jit.is_tracing():  # sizes are tensors there, and comparing them warns
        return
    if x.dim() < 1 or x.shape[-1] != input_dim:
        raise ValueError(
            f"Expected input of shape (*batch, {input_dim}) for {owner}, got shape {tuple(x.shape)}."
        )


def check_context(context: Tensor | None, context_dim: int, owner: str) -> None:
    """Raise a ValueError unless the context is there just when it is expected, in floating point and the right size."""
    if context is None:
        if context_dim:
            raise ValueError(
                f"Expected a context of shape (*batch, {context_dim}) for {owner}, got none."
            )
    elif not context_dim:
        raise ValueError(
            f"Expected no context for {owner} (context_dim=0), got one of shape {tuple(context.shape)}."
        )
    elif not context.is_floating_point():
        check_floating(context, f"the context of {owner}")
    elif torch.jit.is_tracing():  # as above
        return
    elif context.dim() < 1 or context.shape[-1] != context_dim:
        raise ValueError(
            f"Expected a context of shape (*batch, {context_dim}) for {owner}, got shape "
            f"{tuple(context.shape)}."
        )
