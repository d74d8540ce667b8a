"""The recording of a model: its graph for the draws and the arguments at hand, made anew where their shapes are new."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pyro_flowkit.programs.graph import (
    Stopwatch,
    Unrecordable,
    learned_by,
    recorded,
    side_by_side,
    together,
)
from pyro_flowkit.programs.runs import Densities, Program, Values, run_given

MAX_SECONDS = 20.0  # for one recording
MAX_GRAPHS = 8  # kept at a time
FEW_CALLS = 4  # that come before a graph is made for one number of draws


class Recording:
    """A model as tensor operations.

    Args:
        model: a Pyro model.
        with_deterministic: whether the values of deterministic sites are wanted, too.
    """

    def __init__(self, model: Program, with_deterministic: bool):
        self._model, self._with_deterministic = model, with_deterministic
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> Densities:
        """The densities at many draws.

        Args:
            values: of latents, draws first.
            rows: of the model's plates, common to all draws.
            args: of the model.
            kwargs: of the model.

        Raises:
            Unrecordable: if there is no such graph.
        """
        graph, tensors = self._graph(values, rows, args, kwargs)
        return Densities(*graph(values, tensors))

    def learned(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> list[Tensor]:
        """The parameters that the graph for these arguments reads."""
        return learned_by(self._graph(values, rows, args, kwargs)[0].of_one)

    def _graph(
        self, values: Values, rows: Values, args: tuple, kwargs: dict
    ) -> tuple["_Graph", list[Tensor]]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = [*rows.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        key = (
            signature(args, kwargs),
            tuple((name, _kind(value[0])) for name, value in values.items()),
            tuple((name, _kind(value)) for name, value in rows.items()),
            _modes(self._model),
            torch.get_default_dtype(),
        )
        if key not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            progress = _Progress(MAX_SECONDS)

            def densities(draw: Values, inputs: list[Tensor]) -> tuple[Values, ...]:
                given = dict(zip(rows, inputs, strict=False))
                tensors = iter(inputs[len(rows) :])
                mixed = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = pytree.tree_unflatten(mixed, spec)
                found = run_given(
                    progress(self._model),
                    {**draw, **given},
                    args,
                    kwargs,
                    with_deterministic=self._with_deterministic,
                )
                return tuple(found)

            try:
                graph = recorded(densities, {n: v[0] for n, v in values.items()}, inputs)
            except Unrecordable as error:
                raise Unrecordable(progress.where() + str(error)) from error
            self._graphs[key] = _Graph(graph)
        return self._graphs[key], inputs


class _Graph:
    """A graph for one draw, run for many: by ``vmap``, or as another graph for a number of draws that comes again."""

    def __init__(self, of_one: fx.GraphModule):
        self.of_one = of_one
        self._calls: Counter[int] = Counter()
        self._of_many: dict[int, Any] = {}

    def __call__(self, values: Values, tensors: list[Tensor]) -> Any:
        size = len(next(iter(values.values())))
        if size in self._of_many:
            return self._of_many[size](values, tensors)
        self._calls[size] += 1
        if self._calls[size] <= FEW_CALLS:
            return side_by_side(self.of_one)(values, tensors)
        try:
            self._of_many[size] = together(self.of_one, values, tensors)
        except Unrecordable:
            self._of_many[size] = side_by_side(self.of_one)
        return self._of_many[size](values, tensors)


def signature(args: tuple, kwargs: dict) -> Hashable:
    """What of the arguments of a call a graph is made for: shapes of tensors, and whatever is no tensor."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, *(_kind(leaf) if isinstance(leaf, Tensor) else _identity(leaf) for leaf in leaves)


class _Progress(Messenger):
    """Remembers the last site that a model came to, and ends what takes too long."""

    def __init__(self, max_seconds: float):
        super().__init__()
        self._stopwatch = Stopwatch(max_seconds)
        self._last: str | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self._stopwatch.check()
            self._last = msg["name"]

    def where(self) -> str:
        return f"at site {self._last!r} or after it, " if self._last else "before its first site, "


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _identity(leaf: Any) -> Hashable:
    simple = isinstance(leaf, bool | int | float | complex | str | bytes | type(None))
    return (type(leaf), leaf) if simple else (type(leaf), id(leaf))


def _modes(model: Any) -> Sequence[bool]:
    owner = getattr(model, "__self__", model)
    return (
        tuple(part.training for part in owner.modules())
        if isinstance(owner, torch.nn.Module)
        else ()
    )
