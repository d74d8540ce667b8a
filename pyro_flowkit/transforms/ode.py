r"""The flow of an ordinary differential equation as a transform: a continuous normalizing flow.

.. math::

    \frac{dx}{dt} = v(x, t), \quad y = x(1) \text{ for } x(0) = x, \qquad
    \log|\det dy/dx| = \int_0^1 \mathrm{tr} \frac{\partial v}{\partial x}(x(t), t) \, dt

The inverse is the same equation from t = 1 to t = 0. Both are as exact as their solver: what one direction misses the
other does not take back, so ``y -> x -> y`` returns to within the solver's error.

``torch.jit`` cannot trace forward-mode derivatives, nor log-densities therefore: that raises a ``RuntimeError``.

The trace is exact by forward-mode differentiation along all D axes at once, at the price of D evaluations; or, where
that is asked for, Hutchinson's estimate of it along one random direction of signs for a whole solution.

References:
    Ricky T. Q. Chen, Yulia Rubanova, Jesse Bettencourt, David Duvenaud. Neural Ordinary Differential Equations.
    NeurIPS 2018.

    Will Grathwohl et al. FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models. ICLR 2019
    (Hutchinson's estimate).
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_flowkit.ops import ode
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.transforms.base import FlowTransformModule, VectorMap, check_size
from pyro_flowkit.transforms.conditional import ConditionalFlowTransformModule
from pyro_flowkit.transforms.linear import working_dtype

Solver = Literal["rk4", "dopri5"]
Trace = Literal["exact", "hutchinson"]


@dataclass(frozen=True)
class Solution:
    """How an equation is solved.

    Args:
        solver: "rk4", fixed steps, or "dopri5", adaptive ones, by torchdiffeq.
        num_steps: of "rk4", four evaluations each.
        tolerance: of a step of "dopri5", relative and absolute.
        trace: "exact" or "hutchinson", an estimate.

    Raises:
        ValueError: for a name or a number that makes no solver.
        ImportError: for "dopri5" without torchdiffeq.
    """

    solver: Solver = "rk4"
    num_steps: int = 16
    tolerance: float = 1e-6
    trace: Trace = "exact"

    def __post_init__(self) -> None:
        if self.solver not in ("rk4", "dopri5"):
            raise ValueError(f'Expected solver to be "rk4" or "dopri5", got {self.solver!r}.')
        if self.trace not in ("exact", "hutchinson"):
            raise ValueError(f'Expected trace to be "exact" or "hutchinson", got {self.trace!r}.')
        check_size("num_steps", self.num_steps)
        if not 0 < self.tolerance < 1:
            raise ValueError(f"Expected tolerance between 0 and 1, got {self.tolerance!r}.")
        if self.solver == "dopri5":
            ode.torchdiffeq()

    def solve(
        self, derivative: ode.Derivative, state: ode.State, start: float, end: float
    ) -> ode.State:
        """The state at ``end``."""
        if self.solver == "rk4":
            return ode.rk4(derivative, state, start, end, self.num_steps)
        return ode.dopri5(derivative, state, start, end, self.tolerance)


class _ODE(VectorMap, nn.Module):
    """What the two transforms share: the field, the solution and its two directions."""

    velocity: nn.Module
    solution: Solution

    def _setup(self, velocity: nn.Module, solution: Solution) -> None:
        self.velocity = velocity
        self.solution = solution

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check_input(x, context)
        return self.move_and_ladj(x, context, 0.0, 1.0)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check_input(y, context)
        return self.move_and_ladj(y, context, 1.0, 0.0)

    def move_and_ladj(
        self, x: Tensor, context: Tensor | None, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        """Where the equation takes x from the time ``start`` to ``end``, and the log-det of that.

        Raises:
            RuntimeError: while ``torch.jit`` traces.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "Expected the log-density of a continuous flow outside of torch.jit.trace (JitTrace_ELBO), got a call "
                "while it traces: it cannot record forward-mode derivatives. Use Trace_ELBO."
            )
        dtype, value, field = self._prepared(x, context)
        divergent = _with_trace(field, value, self.solution.trace)
        state: ode.State = (value, value.new_zeros(value.shape[:-1]))
        if value.numel():
            state = self.solution.solve(divergent, state, start, end)
        return state[0].to(dtype), state[1].to(dtype)

    def move(self, x: Tensor, context: Tensor | None, start: float, end: float) -> Tensor:
        """The same without the log-det, which is most of the work."""
        dtype, value, field = self._prepared(x, context)
        if not value.numel():
            return value.to(dtype)
        solve = self.solution.solve
        return solve(lambda t, state: (field(t, state[0]),), (value,), start, end)[0].to(dtype)

    def _prepared(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[torch.dtype, Tensor, Callable[[Tensor, Tensor], Tensor]]:
        if not torch.compiler.is_compiling():
            _load_forward_mode()
        parameter = next(self.velocity.parameters(), x)
        value = x.to(working_dtype(x, parameter))
        if context is not None:
            batch_shape = broadcast_shapes(x.shape[:-1], context.shape[:-1])
            value = value.expand(*batch_shape, x.shape[-1])
        value = value.contiguous()  # forward mode takes no tensor that overlaps itself
        if isinstance(
            self.velocity, PyroModule
        ):  # which states its parameters where forward mode is not at work
            self.velocity(value, value[..., :1], context)

        def field(time: Tensor, value: Tensor) -> Tensor:
            times = time.expand(*value.shape[:-1], 1)
            return self.velocity(value, times, context).to(value.dtype)

        return x.dtype, value, field


class ODE(_ODE, FlowTransformModule):
    """The flow of ``dx/dt = velocity(x, t, None)`` from t = 0 to t = 1; see the module's docstring.

    Args:
        input_dim: size D of the event.
        velocity: module ``(x, t, context)`` of shapes ``(*batch, D)``, ``(*batch, 1)`` and None to ``(*batch, D)``.
        solution: how the equation is solved.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats.
    """

    def __init__(self, input_dim: int, velocity: nn.Module, solution: Solution):
        super().__init__(input_dim)
        self._setup(velocity, solution)

    def _call(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self.move(x, None, 0.0, 1.0)


class ConditionalODE(_ODE, ConditionalFlowTransformModule):
    """The flow of ``dx/dt = velocity(x, t, context)``; arguments as for :class:`ODE`."""

    def __init__(self, input_dim: int, context_dim: int, velocity: nn.Module, solution: Solution):
        super().__init__(input_dim, context_dim)
        self._setup(velocity, solution)


@functools.cache
def _load_forward_mode() -> None:
    """Have torch load its forward mode, which scripts some operations and warns that scripting is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        one = torch.ones(())
        torch.func.jvp(torch.sin, (one,), (one,))


def _with_trace(
    field: Callable[[Tensor, Tensor], Tensor], value: Tensor, trace: Trace
) -> ode.Derivative:
    """The derivative of a point and its log-det: the field, and the trace of its Jacobian."""
    size = value.shape[-1]
    if trace == "exact":
        axes = torch.eye(size, dtype=value.dtype, device=value.device)
        axes = axes.reshape(size, *(1,) * (value.dim() - 1), size).expand(size, *value.shape)

        def exact(time: Tensor, state: ode.State) -> ode.State:
            def along(axis: Tensor) -> tuple[Tensor, Tensor]:
                return _pushed(functools.partial(field, time), state[0], axis)

            velocities, columns = torch.func.vmap(along)(axes)  # all velocities are the same
            return velocities[0], columns.diagonal(dim1=0, dim2=-1).sum(-1)

        return exact
    signs = torch.empty_like(value).bernoulli_(0.5).mul_(2.0).sub_(1.0)

    def estimated(time: Tensor, state: ode.State) -> ode.State:
        velocity, along = _pushed(functools.partial(field, time), state[0], signs)
        return velocity, (along * signs).sum(-1)

    return estimated


def _pushed(
    function: Callable[[Tensor], Tensor], point: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    """The value at a point, and its derivative along a tangent."""
    value, derivative, *_ = torch.func.jvp(function, (point,), (tangent,))
    return value, derivative
