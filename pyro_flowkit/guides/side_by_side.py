"""L-BFGS from several starts at once: every evaluation serves all of them.

What a model costs for a few draws is mostly the calls of its operations, not their size, so that ten searches side by
side take little longer than one. Each has its own curvature and its own line search, which steps back until the loss
has fallen (Armijo's rule); a pair of steps and gradients without positive curvature is left out.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flowkit.deadline import Deadline

MEMORY = 6
DECREASE = 1e-4
STEP_BACK = 0.3
SETTLED = 1e-3  # nats; accepted steps that bring less, and how many in a row end a search
IN_A_ROW = 3


@torch.no_grad()
def minimized_together(
    losses: Callable[[Tensor], Tensor], starts: Tensor, max_evaluations: int, deadline: Deadline
) -> Tensor:
    """The lowest point found from each start.

    Args:
        losses: of points ``(k, P)``, in nats, each a function of its own row; shape ``(k,)``.
        starts: shape ``(k, P)``.
        max_evaluations: of the losses, for all starts.
        deadline: after which the search ends with what it has.

    Returns:
        Shape ``(k, P)``; a start without a finite loss and gradient stays where it is.
    """
    x = starts
    value, gradient = _evaluated(losses, x)
    curvature = _Curvature(x)
    direction = -gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1.0)
    length = torch.ones_like(value)
    settled = torch.where(value.isfinite(), 0, IN_A_ROW)
    for _ in range(max_evaluations):
        if int(settled.min()) >= IN_A_ROW or deadline.is_over:
            break
        trial = x + length[:, None] * direction
        new_value, new_gradient = _evaluated(losses, trial)
        slope = (gradient * direction).sum(-1)
        falls = new_value <= value + DECREASE * length * slope
        falls &= new_value.isfinite()
        curvature.add(falls, trial - x, new_gradient - gradient)
        is_small = value - new_value < SETTLED
        settled = torch.where(falls, torch.where(is_small, settled + 1, 0), settled)
        x = torch.where(falls[:, None], trial, x)
        value = torch.where(falls, new_value, value)
        gradient = torch.where(falls[:, None], new_gradient, gradient)
        direction = torch.where(falls[:, None], -curvature.solve(gradient), direction)
        length = torch.where(falls, 1.0, STEP_BACK * length)
    return x


def _evaluated(losses: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their gradients; infinite and zero where either is no number."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        value = losses(points)
        (gradient,) = torch.autograd.grad(value.sum(), points)
    is_number = value.isfinite() & gradient.isfinite().all(-1)
    return (
        torch.where(is_number, value.detach(), math.inf),
        torch.where(is_number[:, None], gradient, 0.0),
    )


class _Curvature:
    """The last steps and changes of the gradient of each search; empty places are zeros, which do nothing."""

    def __init__(self, like: Tensor):
        self._steps = like.new_zeros(MEMORY, *like.shape)
        self._changes = self._steps.clone()
        self._weights = like.new_zeros(MEMORY, len(like), 1)
        self._scale = like.new_ones(len(like), 1)

    def add(self, which: Tensor, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum(-1, keepdim=True)
        square = change.square().sum(-1, keepdim=True)
        taken = which[:, None] & (product > 1e-10 * square)
        self._scale = torch.where(taken, product / square, self._scale)
        weight = torch.where(taken, 1.0 / product, 0.0)
        self._steps = self._pushed(self._steps, step, taken)
        self._changes = self._pushed(self._changes, change, taken)
        self._weights = self._pushed(self._weights, weight, taken)

    @staticmethod
    def _pushed(kept: Tensor, new: Tensor, taken: Tensor) -> Tensor:
        return torch.where(taken, torch.cat([new[None], kept[:-1]]), kept)

    def solve(self, gradient: Tensor) -> Tensor:
        """The inverse Hessian's approximation times gradients ``(k, P)`` (Nocedal and Wright, algorithm 7.4)."""
        rest, parts = gradient, []
        for step, change, weight in zip(self._steps, self._changes, self._weights, strict=True):
            parts.append(weight * (step * rest).sum(-1, keepdim=True))
            rest = rest - parts[-1] * change
        found = self._scale * rest
        for i in reversed(range(MEMORY)):
            back = self._weights[i] * (self._changes[i] * found).sum(-1, keepdim=True)
            found = found + (parts[i] - back) * self._steps[i]
        return found
