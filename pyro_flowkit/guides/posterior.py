r"""The distributions of guides' latents: the path gradient, where it is the less noisy one.

The path gradient drops the score term of the ELBO's gradient, whose mean is zero. What then reaches the parameters
through a draw x is

    with the path gradient      S^T (d log p(x) / dx - d log q(x) / dx)
    without it                  S^T d log p(x) / dx,  and the derivative of the entropy, which has little noise

in the units S of the guide's affine map. At the posterior the first is zero, noise and all. Far from it, where log q
is a poor guess of log p, and above all where a flow was squeezed on the way and has spikes, the second is the smaller
one. Which one it is follows from the draws themselves, in the backward pass: the mean squares of both are averaged
over the last steps, and the next step takes the gradient whose mean square is smaller. Spikes are too sudden for that:
with u the derivative of log q before the affine maps at the flow's end, the mean of u^2 is 1 for every Gaussian, and
above a limit the step takes the ordinary gradient at once. The means of both gradients are the same.

A trace learns nothing from one step for the next. There the path gradient is taken while the flow before the affine
maps bends little, so that log q is near a Gaussian: where the mean square of its log-determinant is below a limit.

The derivative of log q at a draw is carried along with it, see :mod:`pyro_flowkit.flow_distribution`.

Where local latents z are conditioned on global draws t, as those of an amortised guide, log q(z | x, t) depends on two
draws, and both paths count (Roeder et al. 2017): the encoder's features are held fixed, the global draws are not. At
the posterior of all latents nothing is left, not even noise. A row whose draw is rough takes the ordinary gradient,
see :mod:`pyro_flowkit.path_gradient`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.path_gradient import (
    MAX_ROUGHNESS,
    count_bent,
    derivatives_of,
    flow_held_fixed,
    path_term,
)
from pyro_flowkit.transforms.conditional import (
    ConditionedTransform,
    conditioned,
)
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine

MAX_BEND = 0.1
MEMORY = 0.9


class GradientNoise:
    """Running mean squares of what reaches the parameters through a draw, with and without the path gradient.

    Args:
        squares: where they are kept, the one with the path gradient first; shape ``(2,)``. A buffer of the guide, so
            that a training that is resumed goes on as if it had never stopped.
    """

    def __init__(self, squares: Tensor) -> None:
        self._squares = squares

    @staticmethod
    def at_first() -> Tensor:
        """The mean squares before the first step: the ordinary gradient is favoured."""
        return torch.tensor([1.0, 0.0])

    @property
    def with_path(self) -> float:
        return float(self._squares[0])

    @property
    def without_path(self) -> float:
        return float(self._squares[1])

    @property
    def favours_path(self) -> bool:
        with_path, without_path = self._squares.tolist()
        return with_path < without_path

    @torch.no_grad()
    def update(self, squares: Tensor) -> None:
        """Take in the mean squares of a step; those that are no numbers are left out."""
        if all(map(math.isfinite, squares.tolist())):
            self._squares.lerp_(squares.to(self._squares), 1 - MEMORY)


def takes_path(noise: GradientNoise, u: Tensor) -> bool:
    """Whether a step takes the path gradient; u is the derivative of log q before the affine maps at the end."""
    return noise.favours_path and bool(u.square().mean() < MAX_ROUGHNESS)


@torch.no_grad()
def corrected(
    gradient: Tensor,
    weight: Tensor,
    derivative: Tensor,
    is_path: bool,
    noise: GradientNoise,
    affine: Any,
    on_undefined: Callable[[Tensor], None],
) -> Tensor:
    """The gradient at the draws of a step, of which the noise of both gradients is learned.

    The loss is ``sum_i c_i (log q(x_i) - log p(x_i))``: what arrives at ``entropy_term`` is c, and at the draw c times
    the difference of the derivatives, or the one of log p alone. Where log p has no derivative it is taken to be that
    of log q, which leaves the mean of the gradient to the other draws.

    Args:
        gradient: what arrives at the draws, ``(*batch, D)``.
        weight: c, ``(*batch,)``.
        derivative: of log q at the draws.
        is_path: whether the step takes the path gradient.
        noise: is told of this step.
        affine: the guide's last layer.
        on_undefined: called with a gradient of which some rows, but not all, are no numbers.
    """
    weight = -weight.unsqueeze(-1)
    if not bool(gradient.sum().isfinite()):
        defined = gradient.isfinite().all(-1, keepdim=True)
        if not bool(defined.all()) and bool(defined.any()):
            on_undefined(gradient)
            agreed = torch.zeros_like(derivative) if is_path else weight * derivative
            gradient = torch.where(defined, gradient, agreed)
    found = gradient / weight
    each = [found, found + derivative] if is_path else [found - derivative, found]
    noise.update(affine.in_units(torch.stack(each)).square().flatten(1).mean(-1))
    return gradient


class GuidePosterior(FlowDistribution):
    """A :class:`FlowDistribution` ending in affine maps, with the path gradient where it is the less noisy one.

    Attributes:
        noise: the guide's, which lives longer than the distribution.
        on_undefined: called with the gradient at draws of which some, but not all, have none.
    """

    noise: GradientNoise
    on_undefined: Callable[[Tensor], None]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "GuidePosterior":
        new = super().expand(batch_shape, _instance)
        new.noise, new.on_undefined = self.noise, self.on_undefined
        return new

    def derivative(self, value: Tensor) -> Tensor:
        """d log q / d value at any values, shape ``(*batch, D)``, without a graph."""
        with flow_held_fixed(self.base_dist, self.transforms) as (base, transforms):
            (found,) = derivatives_of(lambda point: self._pull(point, base, transforms), value)
        return found

    def score_parts(self, value: Tensor) -> ScoreParts:
        if not self._takes_path_gradient:
            return super().score_parts(value)
        if is_transformed():
            return self._traced_score_parts(value)
        log_prob, derivatives = self._with_derivatives(value)
        if derivatives is not None:
            u, derivative = derivatives
        else:
            _, (derivative,), u = self._pulled_derivatives(value, log_prob.shape)
        is_path = takes_path(self.noise, u)
        entropy_term = log_prob.clone()
        if is_path:
            entropy_term = path_term(log_prob, [value], [derivative])
        self._watch(value, entropy_term, derivative, is_path)
        return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=entropy_term)

    def _traced_score_parts(self, value: Tensor) -> ScoreParts:
        parts = super().score_parts(value)
        cut = count_bent(self.transforms)
        bent, affine = self.transforms[:cut], self.transforms[cut:]
        with torch.no_grad():
            whitened, _ = self._pull_back(value, affine)
            _, ladj = self._pull_back(whitened, bent)
        is_path = torch.as_tensor(ladj).square().mean() < MAX_BEND
        return parts._replace(entropy_term=torch.where(is_path, parts.entropy_term, parts.log_prob))

    def _watch(
        self, value: Tensor, entropy_term: Tensor, derivative: Tensor, is_path: bool
    ) -> None:
        """Learn the noise of both gradients from the backward pass of this step."""
        affine: Any = self.transforms[-1]
        arrived: dict[str, Tensor] = {}

        def finish(gradient: Tensor) -> Tensor | None:
            if "entropy_term" not in arrived:
                return None
            weight, noise, say = arrived["entropy_term"], self.noise, self.on_undefined
            kept = corrected(gradient, weight, derivative, is_path, noise, affine, say)
            return None if kept is gradient else kept

        def note(gradient: Tensor) -> None:
            arrived["entropy_term"] = gradient.detach()

        if value.requires_grad:
            value.register_hook(lambda gradient: finish(gradient.detach()))
            entropy_term.register_hook(note)


class AmortizedPosterior(FlowDistribution):
    """A conditioned flow that ends in a :class:`ConditionalAffine`; made by :func:`condition`."""

    _global_context: Tensor | None = None

    @property
    def _pushes_derivatives(self) -> bool:
        # What is carried along says nothing of the derivative at the global draws.
        return super()._pushes_derivatives and self._global_context is None

    def _pulled_derivatives(
        self, value: Tensor, shape: torch.Size
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        if self._global_context is None:
            return super()._pulled_derivatives(value, shape)
        path = self._global_context.expand(*shape, -1)
        features = self.transforms[-1].context.detach()[..., : -path.shape[-1]]
        features = features.expand(*shape, -1)
        with flow_held_fixed(self.base_dist, self.transforms) as (base, transforms):

            def given(context: Tensor) -> list[Any]:
                context = torch.cat([features, context], dim=-1)
                return [_recondition(transform, context) for transform in transforms]

            def before_affine(point: Tensor, context: Tensor) -> Tensor:
                return self._pull(point, base, given(context)[:-1])

            def through_affine(point: Tensor, context: Tensor) -> Tensor:
                back, ladj = given(context)[-1].inverse_and_ladj(point)
                return (back * u).sum() + ladj.sum()

            whitened, _ = self._pull_back(value, transforms[-1:])
            u, by_flow = derivatives_of(before_affine, whitened, path)
            derivative, by_affine = derivatives_of(through_affine, value, path)
        return [value, path], [derivative, by_flow + by_affine], u

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "AmortizedPosterior":
        new = super().expand(batch_shape, _instance)
        new._global_context = self._global_context
        return new


def condition(
    base: torch.distributions.Distribution,
    layers: Sequence[nn.Module],
    affine: ConditionalAffine,
    features: Tensor,
    global_context: Tensor | None,
    *,
    path_gradient: bool,
) -> AmortizedPosterior:
    """The distribution for these features and global draws.

    Args:
        base: of z, event shape ``(D,)``.
        layers: of the flow, with and without context.
        affine: the last layer.
        features: the encoder's, shape ``(*batch, context_dim)``.
        global_context: what the local latents are told of the global draws, a function of these alone, shape
            ``(*batch, G)``; broadcasts against the features.
        path_gradient: see :class:`~pyro_flowkit.FlowDistribution`.
    """
    context = features
    if global_context is not None:
        parts = (features, global_context)
        batch_shape = broadcast_shapes(*(part.shape[:-1] for part in parts))
        context = torch.cat([part.expand(*batch_shape, -1) for part in parts], dim=-1)
    transforms = conditioned([*layers, affine], context)
    posterior = AmortizedPosterior(base, transforms, path_gradient=path_gradient)
    posterior._global_context = global_context
    return posterior


def _recondition(transform: Any, context: Tensor) -> Any:
    if isinstance(transform, ConditionedTransform):
        return ConditionedTransform(transform.transform, context)
    return transform
