"""Layers of a flow one after the other as one call of the kernel, without PyTorch's operations and without a graph.

A flow for a guide is a dozen layers on some sixty rows: their arithmetic takes less time than PyTorch needs to call
them one by one. Forward, the derivative of log q along with a draw, and backward are three calls here, and so are the
way back from values to inputs and its own backward pass. Who builds a graph around them is up to the caller.
"""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pyro_flowkit.ops.backend import MAX_BLOCKS, MAX_CHAIN, MAX_LAYERS, backend, kernel
from pyro_flowkit.ops.block_affine import Block
from pyro_flowkit.ops.columns import Columns
from pyro_flowkit.ops.coupling import CONDITIONER_LIMIT
from pyro_flowkit.ops.eager import is_plain_eager
from pyro_flowkit.ops.layout import Layout
from pyro_flowkit.ops.scratch import scratch
from pyro_flowkit.ops.settings import SplineSettings
from pyro_flowkit.ops.threads import count_threads

# beyond this the products of triangles are faster in PyTorch
MAX_DIM = 64

# as the kernel counts them
_COUPLING, _LU, _PERMUTATION, _DIAGONAL, _TRIANGLE, _HIERARCHY = range(6)


class Link(NamedTuple):
    """A layer of a chain.

    Attributes:
        description: as the kernel reads it.
        tensors: that it computes with; None for one that is missing.
        num_fixed: how many of them, from the first on, have no derivative.
        splines: of a row, roughly: how much work it is.
        names: of the tensors in their module.
    """

    description: tuple[Any, ...]
    tensors: tuple[Tensor | None, ...]
    num_fixed: int = 0
    splines: int = 0
    names: tuple[str, ...] = ()

    @property
    def goes_back(self) -> bool:
        """Whether the kernel knows the way from values to inputs."""
        return self.description[0] != _HIERARCHY


def coupling(
    packed: Tensor,
    shared_params: Tensor | None,
    layout: Layout,
    passed: tuple[int, int],
    columns: Columns,
    settings: SplineSettings,
) -> Link | None:
    """A forward :func:`~pyro_flowkit.ops.coupling.spline_coupling` without a context; None for too many layers."""
    if len(layout.shapes) > MAX_LAYERS:
        return None
    sizes = (passed[0], passed[1] - passed[0], CONDITIONER_LIMIT, layout.sizes)
    description = (_COUPLING, *columns.packed, *settings.packed, *sizes)
    return Link(description, (packed, shared_params), 0, columns.dim + layout.num_weights // 400)


def lu(matrix: Tensor, bias: Tensor) -> Link:
    """``y = L U x + b``: L below the diagonal of the matrix, U above, and the logarithm of U's diagonal on it."""
    return Link((_LU,), (matrix, bias))


def permutation(order: tuple[int, ...]) -> Link:
    """``y[..., i] = x[..., order[i]]``."""
    return Link((_PERMUTATION, _packed(order)), ())


@cache
def _packed(order: tuple[int, ...]) -> bytes:
    return struct.pack(f"{len(order)}i", *order)


def affine(
    origin: Tensor,
    units: Tensor,
    raw_loc: Tensor,
    raw_log_scale: Tensor,
    raw_lower: Tensor | None,
    *,
    rate: float,
    matrix_rate: float,
) -> Link:
    """The map of :class:`~pyro_flowkit.transforms.affine.Affine`, "full", or without ``raw_lower`` "diagonal"."""
    tensors = (origin, units, raw_loc, raw_log_scale)
    if raw_lower is None:
        return Link((_DIAGONAL, float(rate), float(matrix_rate)), tensors, 2)
    return Link((_TRIANGLE, float(rate), float(matrix_rate)), (*tensors, raw_lower), 2)


def blocks(blocks: Sequence[Block], parameters: Sequence[Tensor | None]) -> Link | None:
    """The map of :func:`~pyro_flowkit.ops.block_affine.block_affine`; None if it has too many blocks or layers."""
    if len(blocks) > MAX_BLOCKS or any(len(b.layout.shapes) > MAX_LAYERS for b in blocks):
        return None
    each = [(b.start, b.size, b.of_network, b.of_line, b.layout.sizes) for b in blocks]
    work = sum(block.layout.num_weights for block in blocks) // 400
    return Link((_HIERARCHY, *each), tuple(parameters), 0, work)


class Noise(NamedTuple):
    """What a backward pass needs to tell how noisy a gradient is.

    With c the weight of a draw in the loss, c times the difference of the derivatives of log q and log p arrives at it,
    or -c times that of log p. The mean squares asked for are of the difference, and of the derivative of log p, both
    before the last layer: in units of its scale.

    Attributes:
        weight: c, shape ``(rows,)``.
        of_q: the derivative of log q before the last layer, shape ``(rows, dim)``.
        is_path: whether what arrives is the difference.
    """

    weight: Tensor
    of_q: Tensor
    is_path: bool


class _Kept:
    """What a way through a chain left behind, for the ways that follow it."""

    def __init__(self, links: Sequence[Link], header: tuple[Any, ...], dtype: torch.dtype):
        self._links, self._header = links, header
        self._kept = scratch(1, _room(*header[1:]), dtype)

    def arguments(self) -> tuple[Any, ...]:
        """Those of the kernel that are common to all ways."""
        return (*self._header, _tensors_of(self._links), self._kept.data_ptr(), self._kept.numel())

    def _grads(self, wanted: Sequence[bool] | None) -> list[Tensor | None]:
        """Room for the derivatives with respect to all tensors, of networks only where they are wanted."""
        found: list[Tensor | None] = []
        for link in self._links:
            for i, tensor in enumerate(link.tensors):
                is_fixed = tensor is None or i < link.num_fixed
                if link.description[0] == _COUPLING and i == 0 and wanted is not None:
                    is_fixed = not wanted[len(found)]
                found.append(None if is_fixed else torch.empty_like(cast(Tensor, tensor)))
        return found


class Passage(_Kept):
    """The way from inputs to values, and the two that follow it."""

    def pushed(self, derivative: Tensor, cut: int) -> tuple[Tensor, Tensor, Tensor]:
        """The derivative of a log-density, carried through all layers, whose parameters are held fixed.

        Args:
            derivative: with respect to the input, of the log-density of the input, shape ``(rows, dim)``.
            cut: number of a layer.

        Returns:
            Derivatives with respect to the input of layer ``cut`` (to the value, if there is none), to the input of
            the last layer, and to the value.
        """
        derivative = derivative.contiguous()
        found = (
            torch.empty_like(derivative),
            torch.empty_like(derivative),
            torch.empty_like(derivative),
        )
        addresses = [t.data_ptr() for t in (derivative, *found)]
        cast(Any, kernel).push_chain(*self.arguments(), cut, *addresses)
        return found

    def backward(
        self,
        grad_value: Tensor,
        grad_ladj: Tensor | None,
        noise: Noise | None = None,
        wanted: Sequence[bool] | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Derivatives with respect to the input, and to the tensors of all links; None for those without one.

        Args:
            grad_value: that with respect to the value, shape ``(rows, dim)``.
            grad_ladj: that with respect to the log-dets, shape ``(rows,)``; None for zeros.
            noise: what is to be learned of its size.
            wanted: which of the links' tensors are learned, where it is known: a network's derivative costs the most.

        Returns:
            The derivatives, and where it was asked for the two mean squares of :class:`Noise`.
        """
        grad_value = grad_value.contiguous()
        grad_ladj = None if grad_ladj is None else grad_ladj.contiguous()
        grad_input = torch.empty_like(grad_value)
        found = self._grads(wanted)
        squares, weight, of_q, is_path = None, None, None, False
        if noise is not None:
            squares, (weight, of_q, is_path) = grad_value.new_empty(2), noise
            weight, of_q = weight.contiguous(), of_q.contiguous()
        cast(Any, kernel).run_chain_backward(
            *self.arguments(),
            tuple(_address(grad) for grad in found),
            *map(_address, (grad_value, grad_ladj, grad_input, weight, of_q, squares)),
            is_path,
        )
        return [grad_input, *found], squares


class WayBack(_Kept):
    """The way from values to inputs, and the backward pass of it."""

    def backward(
        self, grad_input: Tensor, grad_ladj: Tensor | None, wanted: Sequence[bool] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Derivatives with respect to the value, and to the tensors of all links; None for those without one.

        Args:
            grad_input: that with respect to the input, shape ``(rows, dim)``.
            grad_ladj: that with respect to the log-dets of this way, shape ``(rows,)``; None for zeros.
            wanted: as in :meth:`Passage.backward`.
        """
        grad_input = grad_input.contiguous()
        grad_ladj = None if grad_ladj is None else grad_ladj.contiguous()
        grad_value, found = torch.empty_like(grad_input), self._grads(wanted)
        cast(Any, kernel).pull_chain_backward(
            *self.arguments(),
            tuple(_address(grad) for grad in found),
            *map(_address, (grad_input, grad_ladj, grad_value)),
        )
        return grad_value, found


_Way = TypeVar("_Way", bound=_Kept)


def applies(x: Tensor, links: Sequence[Link]) -> bool:
    """Whether :func:`run` may compute with these tensors, here and now."""
    rows, dim = x.shape
    if backend() != "fused" or dim > MAX_DIM or not 0 < len(links) <= MAX_CHAIN:
        return False
    tensors = [x, *(tensor for link in links for tensor in link.tensors)]
    if x.dtype not in (torch.float32, torch.float64) or not is_plain_eager(*tensors):
        return False
    # with several threads the layers one by one are faster
    if torch.is_autocast_enabled("cpu") or count_threads(rows * sum(k.splines for k in links)) > 1:
        return False
    return all(
        t is None or (t.is_cpu and t.dtype == x.dtype and t.is_contiguous()) for t in tensors
    )


@torch.no_grad()
def run(x: Tensor, links: Sequence[Link]) -> tuple[Tensor, Tensor, Passage]:
    """All layers, one after the other, on rows ``(rows, dim)`` that :func:`applies` has agreed to.

    Returns:
        Values ``(rows, dim)``; log-dets of all layers together, ``(rows,)``, in nats; and the ways that follow.
    """
    return _through("run_chain", Passage, x, links)


@torch.no_grad()
def pull(y: Tensor, links: Sequence[Link]) -> tuple[Tensor, Tensor, WayBack]:
    """The way back through all layers, whose links have one, on rows that :func:`applies` has agreed to.

    Returns:
        Inputs ``(rows, dim)``; log-dets of the way back, ``(rows,)``, in nats; and its backward pass.
    """
    return _through("pull_chain", WayBack, y, links)


def _through(
    name: str, kind: type[_Way], start: Tensor, links: Sequence[Link]
) -> tuple[Tensor, Tensor, _Way]:
    start = start.contiguous()
    rows, dim = start.shape
    header = (start.dtype == torch.float64, rows, dim, tuple(link.description for link in links))
    way = kind(links, header, start.dtype)
    end, ladj = torch.empty_like(start), start.new_empty(rows)
    addresses = (start.data_ptr(), end.data_ptr(), ladj.data_ptr())
    getattr(kernel, name)(*way.arguments(), *addresses)
    return end, ladj, way


def _room(rows: int, dim: int, descriptions: tuple) -> int:
    return cast(int, cast(Any, kernel).kept_of_chain(rows, dim, descriptions))


def _tensors_of(links: Sequence[Link]) -> tuple[int, ...]:
    """Address and length of every tensor."""
    found: list[int] = []
    for link in links:
        for tensor in link.tensors:
            found += (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())
    return tuple(found)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
