r"""A flow as a distribution: exact density, one run of each conditioner, and the path gradient.

With z = base sample and x = f_K(... f_1(z)):

.. math:: \log p(x) = \log p(z) + \sum_k \log |\det \partial f_k^{-1}|
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import sum_rightmost
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flowkit.moments import fixed_draws, reached_by_tail
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.path_gradient import (
    Derivatives,
    Step,
    count_bent,
    derivatives_of,
    flow_held_fixed,
    guarded_path_term,
    held_fixed,
    pushed_derivatives,
    unit_of,
)
from pyro_flowkit.transforms.base import Bijection
from pyro_flowkit.transforms.chained import chained
from pyro_flowkit.transforms.conditional import with_batch_of_contexts
from pyro_flowkit.transforms.tensors import stamp, tensors_of


class Draw(NamedTuple):
    """The last draw of a distribution.

    Attributes:
        value: the draw.
        log_prob: its log-density.
        stamp: what the two depend on.
        copies: of these tensors and the value, as writing to ``.data`` leaves no trace; None where they cannot be
            read, and for a draw in a Pyro program, which asks for the log-density in the same call.
        steps: from the base to it, where a path gradient may be asked for.
    """

    value: "weakref.ref[Tensor]"
    log_prob: Tensor
    stamp: tuple
    copies: list[Tensor] | None
    steps: list[Step]


class FlowDistribution(dist.TransformedDistribution):
    """A ``TransformedDistribution`` that runs each conditioner once.

    Args:
        base_dist: distribution of z.
        transforms: a transform or a list of them, applied in order; transforms of this package, or any of
            ``torch.distributions``.
        path_gradient: let ``score_parts`` give the sticking-the-landing estimator (Roeder et al. 2017): the entropy
            term with parameters, context and base parameters held fixed, but the ordinary one in every row where log q
            is rough (:mod:`pyro_flowkit.path_gradient`). Pyro's ``Trace_ELBO``, ``JitTrace_ELBO`` and
            ``TraceGraph_ELBO`` use it as they are; other objectives ignore it. It has a first derivative only, which is
            carried along with a draw of its own; for other values, without the fused kernel, in
            traces or among transforms of others, it costs one extra pass through the conditioners. Both only while
            gradients are recorded.

    Shapes: with batch shape B and event shape (D,), ``rsample(S)`` is ``S + B + (D,)`` and ``log_prob`` of it
    ``S + B``, in nats.

    The last draw is remembered with its log-density, which ``log_prob`` uses once, for that very tensor, if neither it
    nor a parameter, a buffer or the context was written to since, ``.data`` included, and the grad mode is the same.
    Outside of Pyro programs it takes a copy of these along, to be sure. Copies and pickles of the distribution do not
    carry it.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> from pyro_flowkit import FlowDistribution
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> value, log_prob = FlowDistribution(base, [T.spline_coupling(2)]).rsample_and_log_prob((5,))
        >>> value.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    _held: Sequence[tuple[list[nn.Module], Tensor | None]] = ()
    """Modules that get no gradient from its draws; with a boolean tensor only while it is False."""
    _on_draw: Callable[[], None] | None = None  # at draws that gradients may come through

    def __init__(
        self,
        base_dist: torch.distributions.Distribution,
        transforms: Transform | list[Transform],
        *,
        path_gradient: bool = False,
        validate_args: bool | None = None,
    ):
        base_dist = with_batch_of_contexts(base_dist, transforms)
        super().__init__(base_dist, transforms, validate_args=validate_args)
        self.path_gradient = path_gradient
        self._draw: Draw | None = None

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw, and give the log-density of the draws (nats), in one pass through the layers.

        Returns:
            Draws of shape ``sample_shape + batch_shape + event_shape`` and log-densities without the event shape.
        """
        return self._push(self.base_dist.rsample(torch.Size(sample_shape)))

    def _push(self, value: Tensor, steps: list[Step] | None = None) -> tuple[Tensor, Tensor]:
        """The draw and its log-density; the steps on the way are added to a list, where one is given."""
        if self._on_draw is not None and torch.is_grad_enabled():
            self._on_draw()
        with ExitStack() as stack:
            for modules, until in self._held:
                stack.enter_context(held_fixed(modules, until))
            return self._pushed(value, steps)

    def _pushed(self, value: Tensor, steps: list[Step] | None) -> tuple[Tensor, Tensor]:
        event_dim = len(self.base_dist.event_shape)
        if _is_empty(value):
            log_prob = self._with_graph(
                value.new_zeros(value.shape[: value.dim() - event_dim]), value
            )
        else:
            log_prob = self.base_dist.log_prob(value)
        if steps is None:
            parts = chained(self.transforms, value)
        else:  # the derivative before the affine maps is asked for
            cut = count_bent(self.transforms)
            parts = chained(self.transforms[:cut], value) + chained(self.transforms[cut:], value)
        for transform in parts:
            if steps is not None:
                steps.append(Step(transform, value))
            if isinstance(transform, Bijection):
                value, ladj = transform.call_and_event_ladj(value)
                own_event_dim = transform.event_dim
            else:
                x, value = value, transform(value)
                ladj = transform.log_abs_det_jacobian(x, value)
                own_event_dim = transform.codomain.event_dim
                event_dim += own_event_dim - transform.domain.event_dim
            log_prob = log_prob - sum_rightmost(ladj, event_dim - own_event_dim)
        return value, log_prob

    def _pull(
        self, value: Tensor, base: torch.distributions.Distribution, transforms: list[Transform]
    ) -> Tensor:
        value, inverse_ladj = self._pull_back(value, transforms)
        return inverse_ladj + base.log_prob(value)

    def _pull_back(
        self, value: Tensor, transforms: list[Transform]
    ) -> tuple[Tensor, Tensor | float]:
        """The value before these transforms, the last of the flow's or some of them, and the log-det of the way."""
        event_dim = len(self.event_shape)
        total: Tensor | float = 0.0
        for transform in reversed(chained(transforms, value, back=True)):
            if isinstance(transform, Bijection):
                value, inverse_ladj = transform.inverse_and_event_ladj(value)
                own_event_dim = transform.event_dim
            else:
                y, value = value, transform.inv(value)
                inverse_ladj = -transform.log_abs_det_jacobian(value, y)
                own_event_dim = transform.domain.event_dim
                event_dim += own_event_dim - transform.codomain.event_dim
            total = total + sum_rightmost(inverse_ladj, event_dim - own_event_dim)
        return value, total

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        steps: list[Step] = []
        value = self.base_dist.rsample(torch.Size(sample_shape))
        pushed = self._push(value, steps if self._pushes_derivatives else None)
        return self._remembered(*pushed, steps)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():  # the base may have no rsample, a mixture for one
            drawn = self._push(self.base_dist.sample(torch.Size(sample_shape)))
            return self._remembered(*drawn, [])

    def _remembered(self, value: Tensor, log_prob: Tensor, steps: list[Step]) -> Tensor:
        if torch.compiler.is_compiling():  # a graph has no memory
            return value
        tensors = self._tracked_tensors()
        copies = None
        if not (am_i_wrapped() or is_transformed()):
            copies = [tensor.detach().clone() for tensor in (*tensors, value)]
        self._draw = Draw(weakref.ref(value), log_prob, stamp(tensors, value), copies, steps)
        return value

    def _is_unchanged(self, draw: Draw, value: Tensor) -> bool:
        """Whether neither value nor parameters were written to since a draw."""
        tensors = self._tracked_tensors()
        if draw.stamp != stamp(tensors, value):
            return False
        if draw.copies is None:
            return True
        return not is_transformed() and all(map(torch.equal, draw.copies, (*tensors, value)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log-density (nats) of values of shape ``(*, D)``, shape ``(*,)``.

        Integers and booleans are taken for numbers in the flow's dtype. At a value that is infinite it is -inf (while
        validation is on, as it is by default).
        """
        if not value.is_floating_point():
            value = value.to(self._dtype)
        draw, self._draw = self._draw, None
        if draw is not None and draw.value() is value and self._is_unchanged(draw, value):
            return draw.log_prob
        cut = value.dim() - len(self.event_shape)
        if _is_empty(value) and value.shape[cut:] == self.event_shape:
            shape = broadcast_shapes(value.shape[:cut], self.batch_shape)
            return self._with_graph(value.new_zeros(shape), value)
        if self._validate_args:
            if torch.compiler.is_compiling():  # a graph has no branches
                return self._with_infinite_rows(value)
            self._validate_sample(value)
            if not is_transformed() and not bool(value.sum().isfinite()):
                return self._with_infinite_rows(value)
        return self._pull(value, self.base_dist, self.transforms)

    def _with_graph(self, empty: Tensor, value: Tensor) -> Tensor:
        """The same, with gradients of zero for all that it would depend on if there were any rows."""
        for tensor in (value, *self._tracked_tensors()):
            if tensor.requires_grad:
                empty = empty + tensor.flatten()[:0].sum().to(empty)
        return empty

    def _with_infinite_rows(self, value: Tensor) -> Tensor:
        """The log-density where some values may be infinite, which mixing layers would make NaN of."""
        event = tuple(range(-len(self.event_shape), 0))
        is_infinite = value.isinf().any(event) if event else value.isinf()
        shape = is_infinite.shape + (1,) * len(event)
        inside = value.masked_fill(is_infinite.reshape(shape), 0.0)
        log_prob = self._pull(inside, self.base_dist, self.transforms)
        return log_prob.masked_fill(is_infinite, -torch.inf)

    @property
    def _dtype(self) -> torch.dtype:
        dtypes = [t.dtype for t in tensors_of(self.base_dist) if t.is_floating_point()]
        return dtypes[0] if dtypes else torch.get_default_dtype()

    @property
    def _takes_path_gradient(self) -> bool:
        return self.path_gradient and self.has_rsample and torch.is_grad_enabled()

    @property
    def _pushes_derivatives(self) -> bool:
        return (
            self._takes_path_gradient
            and not is_transformed()  # torch.jit and torch.func must see every operation
            and len(self.base_dist.event_shape) == 1
            and all(isinstance(transform, Bijection) for transform in self.transforms)
        )

    def score_parts(self, value: Tensor) -> ScoreParts:
        log_prob, derivatives = self._with_derivatives(value)
        if not self.has_rsample:
            return ScoreParts(log_prob=log_prob, score_function=log_prob, entropy_term=0)
        if not self._takes_path_gradient or _is_empty(value):
            return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=log_prob)
        if derivatives is not None:
            u = derivatives.before_affine * unit_of(self.base_dist)
            paths, along = [value], [derivatives.at_value]
        else:
            paths, along, u = self._pulled_derivatives(value, log_prob.shape)
        entropy_term = guarded_path_term(log_prob, paths, along, u)
        return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=entropy_term)

    def _pulled_derivatives(
        self, value: Tensor, shape: torch.Size
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What the gradient goes through, the derivatives of log q along it, and u, by autograd and at any value."""
        cut = count_bent(self.transforms)
        path = value.expand(shape + self.event_shape)
        with flow_held_fixed(self.base_dist, self.transforms) as (base, transforms):
            bent, affine = transforms[:cut], transforms[cut:]
            whitened, _ = self._pull_back(path, affine)
            (u,) = derivatives_of(lambda point: self._pull(point, base, bent), whitened)

            def through_affine(point: Tensor) -> Tensor:
                back, ladj = self._pull_back(point, affine)
                return (back * u).sum() + torch.as_tensor(ladj).sum()

            (derivative,) = derivatives_of(through_affine, path)
        u = u * unit_of(self.base_dist)
        path, derivative, u = (part.reshape(*shape, -1) for part in (path, derivative, u))
        return [path], [derivative], u

    def _with_derivatives(self, value: Tensor) -> tuple[Tensor, Derivatives | None]:
        """The log-density, and its derivatives on the way to the value.

        The derivatives are there for the last draw, where a path gradient may be asked for and every transform is a
        :class:`Bijection`, and None for other values.
        """
        draw = self._draw
        log_prob = self.log_prob(value)
        if draw is None or log_prob is not draw.log_prob or not draw.steps:
            return log_prob, None
        return log_prob, pushed_derivatives(self.base_dist, draw.steps, value)

    def fixed_draws(self, num_pairs: int = 5000) -> Tensor:
        """The same draws at every call, for summaries that shall not jump: shape ``(2 * num_pairs + 1, *B, D)``.

        The global random state is neither read nor changed. Where the base is normal or Student's t they are
        quasi-random and antithetic, the same for every row of a batch, and one is the image of the base's centre, so
        that the marginal medians of a flow that is still affine are exact. Others come from one fixed seed.
        """
        return fixed_draws(self.base_dist, self.transforms, num_pairs)

    @property
    def mean(self) -> Tensor:
        """Mean of :meth:`fixed_draws`, an estimate, shape ``(*B, D)``; NaN where the base's tail has none."""
        return self.fixed_draws().mean(0).masked_fill(reached_by_tail(self, 1.0), torch.nan)

    @property
    def variance(self) -> Tensor:
        """Variance of :meth:`fixed_draws`, an estimate, shape ``(*B, D)``; infinite where the base's tail has none."""
        variance = self.fixed_draws().var(0).masked_fill(reached_by_tail(self, 2.0), torch.inf)
        return variance.masked_fill(reached_by_tail(self, 1.0), torch.nan)

    def _tracked_tensors(self) -> list[Tensor]:
        return tensors_of(self.base_dist, self.transforms)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        """A new distribution of this batch shape, with the same ``path_gradient`` and nothing remembered."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.path_gradient = self.path_gradient
        new._draw, new._held, new._on_draw = None, self._held, self._on_draw
        return super().expand(batch_shape, _instance=new)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draw": None, "_held": (), "_on_draw": None}


def _is_empty(value: Tensor) -> bool:
    """Whether there is nothing in it: torch's distributions and constraints fail on an empty batch."""
    return not torch.jit.is_tracing() and value.numel() == 0
