"""A function of tensors as a graph of tensor operations, for one set of latents or for many at a time.

What Python did on the way there, Pyro's handlers above all, is not in the graph. What the function read besides its
inputs is: parameters and data stay the tensors that they are, so that gradients and changes in place reach them;
numbers and branches are what they were while it was recorded.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, vmap

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.programs.constants import ConstantsFirst
from pyro_flowkit.programs.tracing import traced

Values = dict[str, Tensor]
Node = Any  # of a torch.fx.Graph, whose arguments have many types

_aten = torch.ops.aten


class Unrecordable(Exception):
    """A function that has no graph; the message is a clause that says why."""


class ReadsValue(Unrecordable):
    """A function that reads the value of a tensor, or has tensors whose shapes depend on one."""


def recorded(
    function: Callable[[Values, list[Tensor]], Any],
    values: Values,
    tensors: list[Tensor],
    *,
    constants_first: bool = False,
) -> fx.GraphModule:
    """The graph of a function.

    Args:
        function: of named tensors and a list of tensors, to any nest of tensors.
        values: such named tensors.
        tensors: such a list.
        constants_first: compute at once, and not in the graph, what depends on neither inputs nor parameters. The
            function may then read it.

    Raises:
        ReadsValue: if it reads a value that depends on its inputs.
        Unrecordable: if it draws random numbers, changes a tensor that is not its own, or fails.
    """
    values = {name: value.detach() for name, value in values.items()}
    tensors = [tensor.detach() for tensor in tensors]
    plain = functionalize(function, remove="mutations")

    def run(values: Values, tensors: list[Tensor]) -> Any:
        if not constants_first:
            return plain(values, tensors)
        with ConstantsFirst([*values.values(), *tensors]):
            return plain(values, tensors)

    try:
        graph = traced(run, values, tensors)
        if any(_changes(node) for node in graph.graph.nodes):
            graph = _without_changes(graph, values, tensors)
    except Exception as error:  # whatever a program may raise when its tensors are none
        reads = isinstance(error, ReadsValue) or _reads_value(error)
        raise (ReadsValue if reads else Unrecordable)(_reason(error)) from error
    _clean(graph)
    _refuse(graph)
    return graph


def _without_changes(
    graph: fx.GraphModule, values: Values, tensors: list[Tensor]
) -> fx.GraphModule:
    """The graph with new tensors in the place of those of its own that it changes."""
    _refuse(graph, of_its_own=True)
    constants = dict.fromkeys(str(node.target) for node, _ in _constants(graph))
    known = [getattr(graph, name) for name in constants]

    def run(values: Values, tensors: list[Tensor], known: list[Tensor]) -> Any:
        given = _Given(graph, dict(zip(constants, known, strict=True)))
        return given.run(values, tensors)

    detached = [tensor.detach() for tensor in known]
    pure = traced(functionalize(run, remove="mutations"), values, tensors, detached)
    return traced(lambda values, tensors: pure(values, tensors, known), values, tensors)


class _Given(fx.Interpreter):
    """A graph with other constants."""

    def __init__(self, graph: fx.GraphModule, constants: Values):
        super().__init__(graph)
        self._given = constants

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (
            self._given[target] if target in self._given else super().get_attr(target, args, kwargs)
        )


def side_by_side(graph: fx.GraphModule) -> Callable[[Values, list[Tensor]], Any]:
    """The graph for all rows of the values at a time; the tensors are common to them.

    Values and outputs have one more dimension, the first.
    """
    batched = vmap(graph, in_dims=(0, None))

    def run(values: Values, tensors: list[Tensor]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                return batched(values, tensors)
        except (RuntimeError, NotImplementedError) as error:  # an operation without a rule
            if isinstance(error, torch.OutOfMemoryError | torch.linalg.LinAlgError):
                raise
            raise Unrecordable(_reason(error)) from error

    return run


def together(graph: fx.GraphModule, values: Values, tensors: list[Tensor]) -> fx.GraphModule:
    """:func:`side_by_side` as a graph of its own, for values of these shapes."""
    values = {name: value.detach() for name, value in values.items()}
    tensors = [tensor.detach() for tensor in tensors]
    run = side_by_side(graph)
    wide = traced(functionalize(run, remove="mutations"), values, tensors)
    _clean(wide)
    _refuse(wide)
    return wide


def learned_by(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors that the graph reads besides its inputs and that ask for gradients."""
    found = {id(tensor): tensor for _, tensor in _constants(graph) if tensor.requires_grad}
    return list(found.values())


def _constants(graph: fx.GraphModule) -> list[tuple[Node, Tensor]]:
    nodes = (node for node in graph.graph.nodes if node.op == "get_attr")
    pairs = ((node, getattr(graph, str(node.target))) for node in nodes)
    return [(node, tensor) for node, tensor in pairs if isinstance(tensor, Tensor)]


def _clean(graph: fx.GraphModule) -> None:
    """Leave out what nothing depends on, and compute once what depends on nothing but numbers."""
    nodes = graph.graph
    for node in list(nodes.nodes):
        if node.target in _REWRITTEN:
            _REWRITTEN[node.target](graph, node)
    _erase_unused(nodes)
    _fold(graph)
    _erase_unused(nodes)
    nodes.lint()
    graph.recompile()


def _rewrite_copy(graph: fx.GraphModule, node: Node) -> None:
    """A copy of one tensor into another of its kind is the first: autograd knows no derivative of it."""
    into, source = _kind_of(node.args[0]), _kind_of(node.args[1])
    if into is not None and into == source:
        node.replace_all_uses_with(node.args[1])


def _rewrite_select_scatter(graph: fx.GraphModule, node: Node) -> None:
    """``where`` for ``x[i] = y``: torch's rule for many rows multiplies the derivative by the size of x."""
    into, source, dim, index = node.args
    value = node.meta["val"]
    dim = dim % value.dim()
    mask = torch.arange(value.shape[dim], device=value.device) == index % value.shape[dim]
    name = f"_selected_{node.name}"
    graph.register_buffer(name, mask.reshape(-1, *(1,) * (value.dim() - 1 - dim)), persistent=False)
    with graph.graph.inserting_before(node):
        given = graph.graph.call_function(_aten.unsqueeze.default, (source, dim))
        where = (graph.graph.get_attr(name), given, into)
        _replace(node, graph.graph.call_function(_aten.where.self, where))


def _rewrite_masked_write(graph: fx.GraphModule, node: Node) -> None:
    """``where`` for ``x[mask] = number``, which has no rule for many rows."""
    into, indices, source, *accumulate = node.args
    if len(indices) != 1 or any(accumulate):
        return
    shape, dtype, device = _kind_of(node)
    number = source.meta.get("val")
    if _kind_of(indices[0]) != (shape, torch.bool, device):
        return
    if number is not None and number.numel() == 1 and number.dtype == dtype:
        with graph.graph.inserting_before(node):
            number = graph.graph.call_function(_aten.reshape.default, (source, []))
            where = (indices[0], number, into)
            _replace(node, graph.graph.call_function(_aten.where.self, where))


def _rewrite_view(graph: fx.GraphModule, node: Node) -> None:
    """Beside other draws a tensor may have strides that a view cannot have."""
    node.target = _aten.reshape.default


_REWRITTEN: dict[Any, Callable[[fx.GraphModule, Node], None]] = {
    _aten.copy.default: _rewrite_copy,
    _aten.select_scatter.default: _rewrite_select_scatter,
    _aten.index_put.default: _rewrite_masked_write,
    _aten.view.default: _rewrite_view,
}


def _replace(node: Node, other: Node) -> None:
    other.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(other)


def _kind_of(node: Node) -> Any:
    """Shape, dtype and device of a node's tensor; None where it has none."""
    value = getattr(node, "meta", {}).get("val")
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def _erase_unused(nodes: fx.Graph) -> None:
    for node in reversed(list(nodes.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not _changes(node):
            nodes.erase_node(node)


def _changes(node: Node) -> bool:
    """Whether an operation writes into a tensor."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _written(node: Node) -> Node:
    """Where the tensor comes from that an operation writes into."""
    while node.op == "call_function" and (_changes(node) or _is_view(node)):
        node = node.args[0] if node.args else node.all_input_nodes[0]
    return node


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(value.alias_info is not None for value in schema.returns)


def _is_random(node: Node) -> bool:
    if not (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    ):
        return False
    # attention is marked for the dropout that it may have
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return "dropout_p" not in names or given.get("dropout_p", 0.0) != 0.0


def _fold(graph: fx.GraphModule) -> None:
    literal: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            if node.users and all(u.target is _aten.lift_fresh_copy.default for u in node.users):
                literal[node] = getattr(graph, node.target)
        elif isinstance(node.target, torch._ops.OpOverload) and not (
            _is_random(node) or _changes(node)
        ):
            if all(source in literal for source in node.all_input_nodes):
                with torch.no_grad():
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), literal.__getitem__)
                    literal[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(literal.items()):
        is_needed = any(user not in literal for user in node.users)
        if node.op == "call_function" and is_needed and isinstance(value, Tensor):
            name = f"_folded{number}"
            graph.register_buffer(name, value, persistent=False)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))


def _refuse(graph: fx.GraphModule, *, of_its_own: bool = False) -> None:
    """Raise for what a graph must not do; changing tensors of its own is allowed on request."""
    varies: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or varies.intersection(node.all_input_nodes):
            varies.add(node)
        if node.op != "call_function":
            continue
        if _is_random(node):
            raise Unrecordable(f"it draws random numbers by itself ({node.target})")
        if _changes(node) and not (of_its_own and _written(node).op == "call_function"):
            raise Unrecordable(f"it changes a tensor in place ({node.target})")
        if varies.intersection(_selectors(node)):
            raise ReadsValue(f"it has a tensor whose shape depends on values ({node.target})")
        if node.target is _aten.copy.default:
            raise Unrecordable("it writes values of one kind into a tensor of another")


def _selectors(node: Node) -> list[Node]:
    """The inputs of an operation whose values decide on the shape of what it gives."""
    if node.target is _aten.index.Tensor:
        kinds = ((index, _kind_of(index)) for index in node.args[1] if index is not None)
        return [index for index, kind in kinds if kind and kind[1] in (torch.bool, torch.uint8)]
    is_such = isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.dynamic_output_shape in node.target.tags
    )
    return list(node.all_input_nodes) if is_such else []


def _reads_value(error: Exception) -> bool:
    text = str(error)
    return "_local_scalar_dense" in text or "vmap" in text and ".item()" in text


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, Unrecordable):
        return lines[0]
    if _reads_value(error):
        return "it reads the value of a tensor that depends on latents or arguments (float(), .item(), an if)"
    return f"{type(error).__name__}: {lines[0]}"


class Stopwatch:
    """Ends a recording that takes too long, by the processor time of the thread, where the function asks it."""

    def __init__(self, max_seconds: float):
        self.max_seconds = max_seconds
        self._deadline = Deadline(max_seconds)

    def check(self) -> None:
        """Raise Unrecordable once the time is over."""
        if self._deadline.is_over:
            raise Unrecordable(f"recording it takes more than {self.max_seconds:g} s")
