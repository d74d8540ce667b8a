"""The log joint density of a recorded model together with its derivative by the latents, as one graph without autograd.

Most of what a step spends on a small model is bookkeeping: autograd's nodes, and operations that are there for shapes
that do not occur. The graph here is made for a number of draws that comes again, and it is simplified
(:mod:`pyro_flowkit.programs.simplify`). It is made only for models that learn nothing themselves, and taken only if its
values and derivatives are those of the recording.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyro_flowkit.programs.graph import Unrecordable
from pyro_flowkit.programs.recording import Totals, signature
from pyro_flowkit.programs.runs import Values
from pyro_flowkit.programs.simplify import in_python, simplify
from pyro_flowkit.programs.tracing import traced
from pyro_flowkit.programs.vectorized import Vectorized


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, value: Tensor, derivative: Tensor, plain: Callable
    ) -> Tensor:
        ctx.save_for_backward(latent, derivative)
        ctx.plain = plain
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this, too
            (derivative,) = torch.autograd.grad(ctx.plain(latent).sum(), latent, create_graph=True)
        return grad.unsqueeze(-1) * derivative, None, None, None


def given(
    latent: Tensor, value: Tensor, derivative: Tensor, plain: Callable[[Tensor], Tensor]
) -> Tensor:
    """Values at draws whose derivatives are known, as a node of autograd's graph.

    Args:
        latent: the draws, ``(n, D)``.
        value: shape ``(n,)``.
        derivative: of each value by its own draw, ``(n, D)``.
        plain: gives the values for draws by PyTorch's operations, for a second derivative.
    """
    return cast(Tensor, _Given.apply(latent, value, derivative, plain))


Unpack = Callable[[Tensor], tuple[Values, Tensor]]

MAX_GAP = 1e-3  # of the largest value or derivative


class Differentiated:
    """log p(x, u) and its derivative by u, where a graph of both can be had.

    Args:
        program: the model at many draws.
        unpack: gives values for latents ``u`` of shape ``(n, D)``, and the log-det ``(n,)``.
    """

    def __init__(self, program: Vectorized, unpack: Unpack):
        self._program, self._unpack = program, unpack
        self._graphs: dict[Hashable, Graph | None] = {}
        self._last: _Call | None = None

    def __call__(self, latent: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
        """Values ``(n,)`` in nats and derivatives ``(n, D)``; None where no graph holds, as for a model that learns.

        Now and then the recording is compared with a plain run, at the calls at which it is without this graph, too.
        """
        latent = latent.detach()
        call = self._last
        if call is None or not call.is_same(latent, args, kwargs):
            graph = self.graph(latent, args, kwargs)
            call = self._last = _Call(latent, args, kwargs, graph, self._program)
        if call.graph is None or not call.graph.totals.are_fixed():
            return None
        if not self._program.takes_recording():
            with torch.no_grad():
                self._program.log_probs(self._unpack(latent)[0], args, kwargs)  # compares
        inputs = call.inputs() if self._program.way == "graph" else None
        if inputs is None:
            return None
        found: tuple[Tensor, Tensor] = call.graph.run(latent, *inputs)
        return found

    def graph(self, latent: Tensor, args: tuple, kwargs: dict) -> "Graph | None":
        """The graph for such calls, made now if there is none yet; None if there cannot be one."""
        key = _key(latent, args, kwargs)
        if key not in self._graphs:
            self._graphs[key] = self._made(latent, args, kwargs)
        return self._graphs[key]

    def _made(self, latent: Tensor, args: tuple, kwargs: dict) -> "Graph | None":
        rows = self._program.drawn_rows(args, kwargs)
        try:
            totals = self._program.recorded_totals(self._unpack(latent)[0], rows, args, kwargs)
            inputs = None if totals is None else totals.inputs(rows, args, kwargs)
            if totals is None or inputs is None or not totals.is_plain:
                return None
            if any(tensor.requires_grad for tensor in inputs):
                return None
            return Graph(self._unpack, totals, latent, inputs)
        except (Unrecordable, RuntimeError, NotImplementedError):  # an operation without a rule
            return None


class Graph:
    """Values and derivatives as one function of the latents and a recording's inputs.

    Attributes:
        run: that function.
        totals: the recording's own function.
        example: latents and inputs.
    """

    def __init__(self, unpack: Unpack, totals: Totals, latent: Tensor, inputs: list[Tensor]):
        self.totals = totals

        def with_derivative(latent: Tensor, *inputs: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                latent = latent.detach().requires_grad_()
                values, ladj = unpack(latent)
                total = totals(values, list(inputs), ladj)
                (derivative,) = torch.autograd.grad(total.sum(), latent)
            return [total.detach(), derivative.detach()]

        self.example = [latent.detach(), *(tensor.detach() for tensor in inputs)]
        graph = traced(with_derivative, *self.example)
        simplify(graph)
        in_python(graph)
        if not _are_close(graph(*self.example), with_derivative(*self.example)):
            raise Unrecordable("it has other values as a graph")
        self.run: Callable[..., Any] = graph.forward
        self._graph = graph

    def compile(self) -> None:
        """Let ``torch.compile`` make ``run`` anew, for tensors of these shapes.

        Raises:
            Exception: whatever the compiler may raise; and a RuntimeError if its numbers are others, beyond rounding.
        """
        compiled = torch.compile(self._graph, dynamic=False, fullgraph=True)
        if not _are_close(compiled(*self.example), self.run(*self.example)):
            raise RuntimeError("the compiled density has other values")
        self.run = compiled


class _Call:
    """A call, to be recognised when it comes again."""

    def __init__(
        self, latent: Tensor, args: tuple, kwargs: dict, graph: Graph | None, program: Vectorized
    ):
        self._kind, self._args, self._kwargs = (latent.shape, latent.dtype), args, kwargs
        are_tensors = all(type(arg) is Tensor for arg in args)
        self._is_simple = are_tensors and not kwargs  # nothing in it may change unseen
        self._shapes = [arg.shape for arg in args] if are_tensors else []
        self._program, self.graph = program, graph
        self._has_rows = bool(program.drawn_rows(args, kwargs))
        self._inputs = None if graph is None or self._has_rows else self._read({})

    def is_same(self, latent: Tensor, args: tuple, kwargs: dict) -> bool:
        """Whether a call is this one with other latents."""
        if not self._is_simple or kwargs or len(args) != len(self._args):
            return False
        pairs = zip(args, self._args, self._shapes, strict=True)
        return (latent.shape, latent.dtype) == self._kind and all(
            one is other and one.shape == shape for one, other, shape in pairs
        )

    def inputs(self) -> list[Tensor] | None:
        """What the graph is to be given; None if it is not for such arguments."""
        if not self._has_rows:
            return self._inputs
        return self._read(self._program.drawn_rows(self._args, self._kwargs))

    def _read(self, rows: Values) -> list[Tensor] | None:
        return self.graph.totals.inputs(rows, self._args, self._kwargs) if self.graph else None


def _key(latent: Tensor, args: tuple, kwargs: dict) -> Hashable:
    return signature(args, kwargs), latent.shape, latent.dtype, latent.device


def _are_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for one, other in zip(found, expected, strict=True):
        both = one.isfinite() & other.isfinite()
        size = float(other[both].abs().max()) if bool(both.any()) else 0.0
        if not torch.equal(one.isnan(), other.isnan()):
            return False
        if not bool(((one - other)[both].abs() <= MAX_GAP * (1e-3 + size)).all()):
            return False
    return True
