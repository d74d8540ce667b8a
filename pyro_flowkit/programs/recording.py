"""The recording of a model: its graph for the draws and the arguments at hand, made anew where their shapes are new."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pyro_flowkit.programs.graph import (
    ReadsValue,
    Stopwatch,
    Unrecordable,
    learned_by,
    recorded,
    side_by_side,
    together,
)
from pyro_flowkit.programs.runs import Densities, Program, Values, run_given

MAX_SECONDS = 20.0  # for one recording
MAX_GRAPHS = 32  # of a model
FEW_CALLS = 4  # that come before a graph is made for one number of draws
MAX_NODES = (
    2000  # of a graph that is made for one number of draws, at some two milliseconds for each
)


class Recording:
    """A model as tensor operations.

    A model may read values that do not depend on latents: of its own tensors, and of those arguments that are the same
    tensors at every call.

    Args:
        model: a Pyro model.
        with_deterministic: whether the values of deterministic sites are wanted, too.
        num_varying: how many of the first arguments are other tensors from call to call.

    Attributes:
        made: number of graphs so far.
    """

    def __init__(self, model: Program, with_deterministic: bool, num_varying: int = 0):
        self._model, self._with_deterministic = model, with_deterministic
        self._num_varying = num_varying
        self._graphs: dict[Hashable, _Graph] = {}
        self.made = 0

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
        unscaled, scales, found = graph(values, tensors)
        return Densities(unscaled, {**graph.scales, **scales}, found)

    def learned(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> list[Tensor]:
        """The parameters that the graph for these arguments reads."""
        return learned_by(self._graph(values, rows, args, kwargs)[0].of_one)

    def totals(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> "Totals":
        """The log joint density at many draws as a function of tensors, for arguments like these."""
        return Totals(self._graph(values, rows, args, kwargs)[0], len(next(iter(values.values()))))

    def _graph(
        self, values: Values, rows: Values, args: tuple, kwargs: dict
    ) -> tuple["_Graph", list[Tensor]]:
        key = (
            signature(args, kwargs),
            tuple((name, _kind(value[0])) for name, value in values.items()),
            tuple((name, _kind(value)) for name, value in rows.items()),
            _modes(self._model),
            torch.get_default_dtype(),
        )
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                raise Unrecordable(f"its arguments have more than {MAX_GRAPHS} shapes")
            self._graphs[key] = self._recorded(values, rows, args, kwargs)
            self.made += 1
        graph = self._graphs[key]
        call = _Call(rows, args, kwargs, graph.num_varying)
        if not call.has(graph.fixed):
            del self._graphs[key]
            raise Unrecordable(
                "it reads the value of an argument that is another tensor from call to call"
            )
        return graph, call.inputs

    def _recorded(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> "_Graph":
        """With all tensors of the arguments as inputs; if their values are read, with those that may not be."""
        attempts = ((None, False), (None, True), (self._num_varying, True))
        for num_varying, constants_first in attempts:
            call = _Call(rows, args, kwargs, num_varying)
            progress = _Progress(MAX_SECONDS)
            scales: dict[str, float] = {}
            densities = self._densities(call, progress, scales)
            draw = {name: value[0] for name, value in values.items()}
            try:
                graph = recorded(densities, draw, call.inputs, constants_first=constants_first)
                return _Graph(graph, scales, num_varying, call.fixed)
            except ReadsValue as error:
                reason = Unrecordable(progress.where() + str(error))
            except Unrecordable as error:
                raise Unrecordable(progress.where() + str(error)) from error
        raise reason

    def _densities(
        self, call: "_Call", progress: "_Progress", scales: dict[str, float]
    ) -> Callable[[Values, list[Tensor]], Any]:
        """What is recorded; the scales that are no tensors are left behind."""

        def densities(draw: Values, inputs: list[Tensor]) -> Any:
            rows, args, kwargs = call.with_inputs(inputs)
            found = run_given(
                progress(self._model),
                {**draw, **rows},
                args,
                kwargs,
                with_deterministic=self._with_deterministic,
                at_site=progress.at_site,
            )
            tensors = {n: s for n, s in found.scales.items() if isinstance(s, Tensor)}
            scales.update({n: s for n, s in found.scales.items() if n not in tensors})
            return found.unscaled, tensors, found.values

        return densities


class _Call:
    """A call of the model, whose tensors are inputs of a graph or fixed in it.

    Args:
        rows: of the model's plates; inputs.
        args: of the model.
        kwargs: of the model.
        num_varying: how many of the arguments have inputs; None for all and the keyword arguments.

    Attributes:
        inputs: tensors.
        fixed: tensors and their versions.
    """

    def __init__(self, rows: Values, args: tuple, kwargs: dict, num_varying: int | None):
        self._names = list(rows)
        everything = num_varying is None
        self._varying: Any = (args, kwargs) if everything else (args[:num_varying], {})
        self._fixed: Any = ((), {}) if everything else (args[num_varying:], kwargs)
        leaves, self._spec = pytree.tree_flatten(self._varying)
        self._leaves = leaves
        self.inputs = [*rows.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        leaves = pytree.tree_leaves(self._fixed)
        self.fixed = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]

    def has(self, fixed: list[tuple[Tensor, int]]) -> bool:
        """Whether these are the fixed tensors, unchanged."""
        return all(
            one is other and version == before
            for (one, version), (other, before) in zip(self.fixed, fixed, strict=True)
        )

    def with_inputs(self, inputs: list[Tensor]) -> tuple[Values, tuple, dict]:
        """Rows, arguments and keyword arguments of the same call with other inputs."""
        rows = dict(zip(self._names, inputs, strict=False))
        tensors = iter(inputs[len(rows) :])
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return rows, (*args, *self._fixed[0]), {**kwargs, **self._fixed[1]}


class _Graph:
    """A graph for one draw, run for many: by ``vmap``, or as another graph for a number of draws that comes again.

    Args:
        of_one: the graph.
        scales: those of sites that are no tensors.
        num_varying: how many of the arguments have inputs of the graph; None for all.
        fixed: the tensors of the others, with their versions.
    """

    def __init__(
        self,
        of_one: fx.GraphModule,
        scales: dict[str, float],
        num_varying: int | None,
        fixed: list[tuple[Tensor, int]],
    ):
        self.of_one, self.scales, self.num_varying, self.fixed = of_one, scales, num_varying, fixed
        self._calls: Counter[int] = Counter()
        self._of_many: dict[int, Any] = {}

    def __call__(self, values: Values, tensors: list[Tensor]) -> Any:
        size = len(next(iter(values.values())))
        if size in self._of_many:
            return self._of_many[size](values, tensors)
        self._calls[size] += 1
        is_long = len(self.of_one.graph.nodes) > MAX_NODES
        if is_long or self._calls[size] <= FEW_CALLS:
            return side_by_side(self.of_one)(values, tensors)
        try:
            self._of_many[size] = together(self.of_one, values, tensors)
        except Unrecordable:
            self._of_many[size] = side_by_side(self.of_one)
        return self._of_many[size](values, tensors)


class Totals:
    """What a recording says of the log joint density at a number of draws.

    Args:
        graph: the recording.
        size: number of draws.
    """

    def __init__(self, graph: _Graph, size: int):
        self._graph, self._size = graph, size

    def inputs(self, rows: Values, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """The tensors for a call, None where it is not one that the recording is for."""
        call = _Call(rows, args, kwargs, self._graph.num_varying)
        return call.inputs if call.has(self._graph.fixed) else None

    def are_fixed(self) -> bool:
        """Whether the tensors whose values were read are what they were."""
        return all(tensor._version == version for tensor, version in self._graph.fixed)

    def __call__(self, values: Values, tensors: list[Tensor], total: Tensor) -> Tensor:
        """What is given plus log p in nats, site after site, shape ``(size,)``."""
        unscaled, scales, _ = side_by_side(self._graph.of_one)(values, tensors)
        if scales:
            raise Unrecordable("it scales densities by tensors")
        for name, log_prob in unscaled.items():
            scaled = log_prob * self._graph.scales.get(name, 1.0)
            total = total + scaled.reshape(self._size, -1).sum(-1)
        return total

    @property
    def is_plain(self) -> bool:
        """Whether nothing in it is learned, and it is short enough to be taken apart."""
        return (
            not learned_by(self._graph.of_one) and len(self._graph.of_one.graph.nodes) <= MAX_NODES
        )


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
            self.at_site(msg["name"])

    def at_site(self, name: str) -> None:
        """Take note of a site."""
        self._stopwatch.check()
        self._last = name

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
