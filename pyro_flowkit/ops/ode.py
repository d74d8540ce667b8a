"""Solvers of ordinary differential equations whose state is a tuple of tensors.

References:
    John C. Butcher. Numerical Methods for Ordinary Differential Equations. Wiley 2016, section 32 (Runge-Kutta).

    Ricky T. Q. Chen. torchdiffeq, 2018. https://github.com/rtqichen/torchdiffeq (the adaptive solver).
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Derivative = Callable[[Tensor, State], State]


def rk4(derivative: Derivative, state: State, start: float, end: float, num_steps: int) -> State:
    """The state at ``end``, by the classical Runge-Kutta method of order 4 in steps of equal size.

    Args:
        derivative: of the state, a function of the time (without dimensions) and the state.
        state: at ``start``.
        start, end: times, in either order.
        num_steps: number of steps, of four evaluations each.
    """
    size = (end - start) / num_steps

    def moved(state: State, by: State, factor: float) -> State:
        return tuple(s + factor * b for s, b in zip(state, by, strict=True))

    for i in range(num_steps):
        time = torch.full((), start + i * size, dtype=state[0].dtype, device=state[0].device)
        first = derivative(time, state)
        second = derivative(time + size / 2, moved(state, first, size / 2))
        third = derivative(time + size / 2, moved(state, second, size / 2))
        fourth = derivative(time + size, moved(state, third, size))
        slopes = zip(first, second, third, fourth, strict=True)
        state = moved(state, tuple(a + 2 * b + 2 * c + d for a, b, c, d in slopes), size / 6)
    return state


def dopri5(
    derivative: Derivative, state: State, start: float, end: float, tolerance: float
) -> State:
    """The state at ``end``, by the adaptive method of Dormand and Prince, order 5, of torchdiffeq.

    Args:
        derivative, state, start, end: as for :func:`rk4`.
        tolerance: of the error of a step, relative and absolute.

    Raises:
        ImportError: if torchdiffeq is not installed.
    """
    times = state[0].new_tensor([start, end])
    path = torchdiffeq().odeint(
        derivative, state, times, rtol=tolerance, atol=tolerance, method="dopri5"
    )
    return tuple(values[-1] for values in path)


def torchdiffeq() -> ModuleType:
    """The module, which is imported where it is needed."""
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            'Expected torchdiffeq for solver="dopri5", got no such module: pip install "pyro-flowkit[continuous]". '
            'solver="rk4" needs nothing.'
        ) from error
    return torchdiffeq
