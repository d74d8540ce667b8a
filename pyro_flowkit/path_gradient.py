r"""The path gradient of a log-density, and the guard that it needs.

The ELBO's gradient goes through log q in two ways, along the draw x and by the parameters that log q is a function of.
The second, the score, is zero in the mean; the path gradient (Roeder et al. 2017) leaves it out. What then reaches the
parameters is proportional to d log q / dx, which has little noise near the posterior, and no bound where a flow has
been squeezed into spikes.

So a row takes the path gradient only where log q is smooth at its draw, and otherwise the ordinary gradient. With u the
derivative of log q in whitened units, before the affine maps at the flow's end, the mean of u^2 over the dimensions is
1 for every Gaussian; a draw is rough where it is not below :data:`MAX_ROUGHNESS`.

A choice that depends on the draw has a price. With R the set of rough draws, as it is now, the mean of the gradient is

.. math::

    \nabla \mathrm{E}[\log q - \log p] + \mathrm{E}[1_R \nabla \log q]
        = \nabla (\mathrm{E}[\log q - \log p] + q(R)),

that of a loss with the probability of a rough draw added, in nats: it is exact where no draw is rough, as under every
flow near a Gaussian, and pulls a flow away from its spikes elsewhere.

References:
    Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
    Variational Inference. NeurIPS 2017.

    Lorenz Vaitl, Ludwig Winkler, Lorenz Richter, Pan Kessel. Fast and Unified Path Gradient Estimators for Normalizing
    Flows. ICLR 2024.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import detach
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, Independent, Transform

from pyro_flowkit.transforms.conditional import ConditionedTransform
from pyro_flowkit.transforms.tensors import modules_in, tensors_of

MAX_ROUGHNESS = 100.0


class Step(NamedTuple):
    """A transform, or neighbours as one, and its input."""

    transform: Any
    x: Tensor


class Derivatives(NamedTuple):
    """Of the log-density of a draw, without a graph.

    Attributes:
        before_affine: with respect to what the affine maps at the end have as input.
        at_value: with respect to the draw.
    """

    before_affine: Tensor
    at_value: Tensor


def path_term(log_prob: Tensor, paths: Sequence[Tensor], derivatives: Sequence[Tensor]) -> Tensor:
    """The value of log q, and its derivatives along the paths, without a graph through the flow."""
    term = log_prob.detach()
    for path, derivative in zip(paths, derivatives, strict=True):
        term = term + ((path - path.detach()) * derivative).sum(-1)
    return term


def guarded_path_term(
    log_prob: Tensor, paths: Sequence[Tensor], derivatives: Sequence[Tensor], u: Tensor
) -> Tensor:
    """:func:`path_term` in the rows whose draw is smooth, log q itself in the others.

    Args:
        log_prob: log q, shape ``(*batch,)``.
        paths: what the gradient goes through, shapes ``(*batch, D_i)``.
        derivatives: of log q along each of them, without a graph.
        u: the derivative in whitened units, shape ``(*batch, D)``.
    """
    is_smooth = u.square().mean(-1) < MAX_ROUGHNESS  # not so where it is NaN
    for derivative in derivatives:
        is_smooth = is_smooth & derivative.isfinite().all(-1)
    # a derivative that is no number would reach the gradient even from the branch that is not taken
    kept = [torch.where(is_smooth.unsqueeze(-1), derivative, 0.0) for derivative in derivatives]
    return torch.where(is_smooth, path_term(log_prob, paths, kept), log_prob)


def derivatives_of(function: Callable[..., Tensor], *points: Tensor) -> list[Tensor]:
    """Derivatives of the sum of a function's values, without a graph; in traces and under ``torch.func``, too."""
    points = tuple(point.detach() for point in points)
    if torch.jit.is_tracing():
        points = tuple(_scripted(_leaf)(point) for point in points)
        return list(_scripted(_differentiate)(function(*points), list(points)))
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        every = tuple(range(len(points)))
        found = torch.func.grad(lambda *points: function(*points).sum(), every)(*points)
        return [derivative.detach() for derivative in found]
    with torch.enable_grad():
        for point in points:
            point.requires_grad_()
        total = function(*points).sum()
        return list(torch.autograd.grad(total, points, materialize_grads=True))


# A tracer does not see what happens in a backward pass: in a trace it has to be one operation, which a script has.
def _leaf(point: Tensor) -> Tensor:
    return point.detach().requires_grad_()


def _differentiate(values: Tensor, points: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for derivative in torch.autograd.grad([values.sum()], points):
        assert derivative is not None  # noqa: S101  (TorchScript's way to say so)
        found.append(derivative.detach())
    return found


@cache
def _scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def pushed_derivatives(
    base: torch.distributions.Distribution, steps: Sequence[Step], value: Tensor
) -> Derivatives:
    """The derivatives, carried along from the base through the layers that made the draw (Vaitl et al. 2024).

    Each of them solves with the transpose of its own Jacobian: no layer is inverted, no conditioner run twice.
    """
    point = steps[0].x.detach().requires_grad_()
    derivative = torch.autograd.grad(base.log_prob(point).sum(), point)[0]
    before_affine: Tensor | None = None
    for (transform, x), y in zip(steps, [*(step.x for step in steps[1:]), value], strict=True):
        if not is_affine(transform):
            before_affine = None
        elif before_affine is None:
            before_affine = derivative
        derivative = transform.pushed_derivative(x, y, derivative)
    return Derivatives(derivative if before_affine is None else before_affine, derivative)


def is_affine(transform: Transform) -> bool:
    """Whether a Gaussian stays a Gaussian under the transform, as far as it is known."""
    return isinstance(transform, AffineTransform) or getattr(transform, "is_affine", False)


def count_bent(transforms: Sequence[Any]) -> int:
    """The number of transforms before the affine ones at the end."""
    count = len(transforms)
    while count and is_affine(transforms[count - 1]):
        count -= 1
    return count


def unit_of(base: Distribution) -> Tensor | float:
    """The scale of a base's noise, where it has one: a unit of what the transforms before the affine ones see."""
    while isinstance(base, Independent):
        base = base.base_dist
    scale = getattr(base, "scale", 1.0)
    return scale.detach() if isinstance(scale, Tensor) else scale


@contextmanager
def held_fixed(transforms: Sequence[Any], until: Tensor | None = None) -> Iterator[list[Transform]]:
    """The transforms, computing with detached parameters and contexts for a while.

    Args:
        transforms: modules may be among them, too.
        until: a boolean, without dimensions; where it is True the parameters are not detached.
    """
    owners = [t.transform if isinstance(t, ConditionedTransform) else t for t in transforms]
    swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for owner in owners:  # jit cannot trace functional_call
            for module in modules_in(owner) if isinstance(owner, nn.Module) else ():
                parameters: dict[str, Any] = module._parameters
                for name, parameter in parameters.items():
                    if parameter is not None and parameter.requires_grad:
                        swapped.append((parameters, name, parameter))
                        held = parameter.detach()
                        parameters[name] = (
                            held if until is None else torch.where(until, parameter, held)
                        )
        yield [_with_fixed_context(transform) for transform in transforms]
    finally:
        for parameters, name, parameter in swapped:
            parameters[name] = parameter


@contextmanager
def flow_held_fixed(
    base: Distribution, transforms: Sequence[Transform]
) -> Iterator[tuple[Distribution, list[Transform]]]:
    """Base and transforms with parameters and contexts held fixed, for a while."""
    if any(tensor.requires_grad for tensor in tensors_of(base)):
        base = detach(base)
    with held_fixed(transforms) as fixed:
        yield base, fixed


def _with_fixed_context(transform: Transform) -> Transform:
    if isinstance(transform, ConditionedTransform):
        return ConditionedTransform(transform.transform, transform.context.detach())
    return transform if isinstance(transform, nn.Module) else detach(transform)
