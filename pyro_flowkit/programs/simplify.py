"""A graph with fewer operations and the same values: what autograd and ``vmap`` write down is made for any shape.

Ones that are multiplied by, zeros that are added, copies, sums over one number and operations that come twice go; the
derivative of a vector that was cut into slices is put together at once; what is left is called by PyTorch's own Python
functions, which cost less than its operators by name.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

Node = Any  # of a torch.fx.Graph, whose arguments have many types

_SMALL = 4096  # numbers

_COPIES = {_aten.detach.default, _aten.alias.default}
_SHAPES = {
    _aten.reshape.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
}
_ZEROS = {_aten.zeros_like.default, _aten.new_zeros.default, _aten.zeros.default}
_ONES = {_aten.ones_like.default, _aten.new_ones.default, _aten.ones.default}
_SUMS = {_aten.add.Tensor, _aten.add.Scalar}
_DIFFERENCES = {_aten.sub.Tensor, _aten.sub.Scalar}
_PRODUCTS = {_aten.mul.Tensor, _aten.mul.Scalar}
_QUOTIENTS = {_aten.div.Tensor, _aten.div.Scalar}

_IN_PYTHON: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_SUMS, operator.add),
    **dict.fromkeys(_DIFFERENCES, operator.sub),
    **dict.fromkeys(_PRODUCTS, operator.mul),
    **dict.fromkeys(_QUOTIENTS, operator.truediv),
    _aten.neg.default: operator.neg,
    _aten.pow.Tensor_Scalar: operator.pow,
    _aten.lt.Scalar: operator.lt,
    _aten.le.Scalar: operator.le,
    _aten.gt.Scalar: operator.gt,
    _aten.ge.Scalar: operator.ge,
    _aten.reshape.default: torch.reshape,
    _aten.sum.dim_IntList: torch.sum,
    _aten.where.self: torch.where,
    _aten.cat.default: torch.cat,
    _aten.clamp.default: torch.clamp,
    _aten.masked_fill.Scalar: torch.masked_fill,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.mm.default: torch.mm,
    **{
        getattr(_aten, name).default: getattr(torch, name)
        for name in ("exp", "log", "log1p", "sigmoid", "tanh", "sqrt", "rsqrt", "reciprocal", "abs")
    },
}


def simplify(graph: fx.GraphModule) -> None:
    """Rewrite a graph without operations in place, whose nodes have examples of their values."""
    _Simplification(graph).run()
    graph.recompile()


def in_python(graph: fx.GraphModule) -> None:
    """Call PyTorch's Python functions in the place of its operators; for graphs that are run as they are."""
    for node in graph.graph.nodes:
        if node.target in _IN_PYTHON and not node.kwargs:
            node.target = _IN_PYTHON[node.target]
        if (
            node.op == "get_attr"
        ):  # what is found at once need not be looked for among parameters and buffers
            graph.__dict__[node.target] = getattr(graph, node.target)
    graph.graph.set_codegen(fx.graph.CodeGen())  # inputs one by one, a list of outputs
    graph.recompile()


class _Simplification:
    def __init__(self, graph: fx.GraphModule):
        self._module, self._graph = graph, graph.graph
        self._constants: dict[Node, Tensor] = {}  # what depends on nothing
        self._numbers: dict[Node, float] = {}  # those of them that are one number everywhere

    def run(self) -> None:
        seen: dict[Any, Node] = {}
        for node in list(self._graph.nodes):
            if node.op == "get_attr":
                self._share(seen, ("get_attr", node.target), node)
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if self._is_constant(node):
                continue
            self._reshape(node)
            same = self._same_as(node)
            if same is not None:
                node.replace_all_uses_with(same)
                continue
            self._share(seen, _call_of(node), node)
        self._join_slices()
        self._keep_constants()
        for node in reversed(list(self._graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self._graph.erase_node(node)
        self._graph.lint()

    @staticmethod
    def _share(seen: dict[Any, Node], key: Any, node: Node) -> None:
        if key is not None and seen.setdefault(key, node) is not node:
            node.replace_all_uses_with(seen[key])

    def _value(self, argument: Any) -> float | None:
        """The number that an argument is, everywhere."""
        if isinstance(argument, bool | int | float):
            return float(argument)
        return self._numbers.get(argument) if isinstance(argument, fx.Node) else None

    def _is_constant(self, node: Node) -> bool:
        """Takes note of a node that depends on nothing, or on shapes alone."""
        like = node.meta["val"]
        number = 0.0 if node.target in _ZEROS else 1.0 if node.target in _ONES else None
        if number is not None:
            one = torch.full((), number, dtype=like.dtype, device=like.device)
            value = one.expand(like.shape)
            self._numbers[node] = number
        elif (
            node.all_input_nodes
            and _call_of(node) is not None
            and all(source in self._constants for source in node.all_input_nodes)
        ):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._constants.__getitem__)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
        else:
            return False
        self._constants[node] = value
        if number is None and 0 < value.numel() <= _SMALL and value.is_floating_point():
            first = value.flatten()[0]
            if bool((value == first).all()):
                self._numbers[node] = float(first)
        return True

    def _same_as(self, node: Node) -> Node | None:
        """Another node that has the value of this one."""
        target, args = node.target, node.args
        candidate, other = None, None
        if target in _COPIES or target in _SHAPES:
            candidate = args[0]
        elif target is _aten.pow.Tensor_Scalar and args[1] == 1:
            candidate = args[0]
        elif len(args) == 2 and not node.kwargs:
            neutral = 0.0 if target in _SUMS or target in _DIFFERENCES else 1.0
            if (
                target in _SUMS
                or target in _DIFFERENCES
                or target in _PRODUCTS
                or target in _QUOTIENTS
            ):
                candidate, other = args
                commutes = target in _SUMS or target in _PRODUCTS
                if commutes and self._value(candidate) == neutral:
                    candidate, other = other, candidate
                if self._value(other) != neutral:
                    return None
        is_node = isinstance(candidate, fx.Node) and candidate not in self._constants
        return candidate if is_node and _kind(candidate) == _kind(node) else None

    def _reshape(self, node: Node) -> None:
        """Sums over one number are shapes, and shapes of what has just been given another shape are one."""
        target, args = node.target, node.args
        is_sum = target is _aten.sum.dim_IntList and len(args) >= 2 and not node.kwargs
        if is_sum and all(args[0].meta["val"].shape[dim] == 1 for dim in args[1]):
            node.target = _aten.reshape.default
        elif target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default
        if node.target is _aten.reshape.default:
            source = args[0]
            while source.target is _aten.reshape.default:
                source = source.args[0]
            node.args = (source, list(node.meta["val"].shape))

    def _join_slices(self) -> None:
        """Derivatives by slices of a vector, side by side instead of as a sum of vectors with zeros around them."""
        for node in reversed(list(self._graph.nodes)):
            if node.target is not _aten.add.Tensor or any(
                u.target is _aten.add.Tensor for u in node.users
            ):
                continue
            parts = _slices_below(node)
            if parts is None or len({part.args[2] for part in parts}) > 1:
                continue
            parts.sort(key=lambda part: part.args[3])
            dim, size = parts[0].args[2], node.meta["val"].shape[parts[0].args[2]]
            stops = [part.args[3] + part.args[0].meta["val"].shape[dim] for part in parts]
            if [part.args[3] for part in parts] != [0, *stops[:-1]] or stops[-1] != size:
                continue
            with self._graph.inserting_before(node):
                pieces = [part.args[0] for part in parts]
                joined = self._graph.call_function(_aten.cat.default, (pieces, dim))
            joined.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(joined)

    def _keep_constants(self) -> None:
        for i, (node, value) in enumerate(self._constants.items()):
            if any(user not in self._constants for user in node.users):
                name = f"_constant{i}"
                if value.numel() <= _SMALL:  # a larger one is better read from one place
                    value = value.contiguous()
                self._module.register_buffer(name, value, persistent=False)
                with self._graph.inserting_before(node):
                    constant = self._graph.get_attr(name)
                constant.meta["val"] = value
                node.replace_all_uses_with(constant, lambda user: user not in self._constants)


def _slices_below(node: Node) -> list[Node] | None:
    """The leaves of a sum, if all are derivatives by slices."""
    if node.target is _aten.slice_backward.default:
        return [node] if node.args[5] == 1 else None
    if node.target is not _aten.add.Tensor or node.kwargs:
        return None
    leaves: list[Node] = []
    for argument in node.args:
        found = _slices_below(argument) if isinstance(argument, fx.Node) else None
        if found is None:
            return None
        leaves += found
    return leaves


def _kind(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else (node,)


def _call_of(node: Node) -> Any:
    """What makes a call the same as another; None for one that may differ."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return target, repr(node.args), repr(node.kwargs)
