"""Layers that the kernel takes one after the other in one call, as one node of the autograd graph.

A small flow spends more time between its layers than in them. Whoever goes through transforms, a distribution or a
composition, asks :func:`chained` for them: neighbours that the kernel knows come back as one :class:`Chain`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_flowkit.ops import chain
from pyro_flowkit.ops.backend import MAX_CHAIN, backend
from pyro_flowkit.ops.chain import Link
from pyro_flowkit.ops.eager import differentiate, is_plain_eager, was_made_by
from pyro_flowkit.transforms.base import Bijection

BLOCK_ROWS = 1024  # at a time, where nothing is kept of them

_T = TypeVar("_T")


def chained(transforms: Sequence[_T], value: Tensor, *, back: bool = False) -> list[_T]:
    """The transforms, neighbours that the kernel knows as one; as they are where it would not compute with a value.

    Args:
        transforms: of this package or of others.
        value: what goes through them.
        back: whether it goes from the last to the first.
    """
    if backend() != "fused" or not value.is_cpu or not is_plain_eager(value):
        return [*transforms]
    found: list[Any] = []
    layers: list[Any] = []
    links: list[Link] = []

    def close() -> None:
        found.extend([Chain(layers[:], links[:])] if len(layers) > 1 else layers)
        layers.clear()
        links.clear()

    for transform in transforms:
        link = _link(transform)
        if link is not None and back and not link.goes_back:
            link = None
        if link is None or len(layers) == MAX_CHAIN:
            close()
        if link is None:
            found.append(transform)
        else:
            layers.append(transform)
            links.append(link)
    close()
    return found


def _link(transform: object) -> Link | None:
    if not isinstance(transform, Bijection):
        return None
    own = vars(transform)
    is_replaced = "call_and_ladj" in own or "inverse_and_ladj" in own  # by somebody who watches
    return None if is_replaced else transform.link()


class Chain(Bijection):
    """Neighbours as one transform: by the kernel where it may compute with the values, else one by one.

    Args:
        layers: at least one, of one size.
        links: theirs.
    """

    def __init__(self, layers: Sequence[Bijection], links: Sequence[Link]):
        super().__init__(cache_size=0)
        self.layers, self.links = layers, links
        self.input_dim = layers[0].input_dim
        self.is_affine = all(layer.is_affine for layer in layers)
        self._goes_back = all(link.goes_back for link in links)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._through(x, back=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._through(y, back=True)

    def _through(self, start: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
        self._check_input(start)
        rows = _rows(start)
        if not chain.applies(rows, self.links) or (back and not self._goes_back):
            return _in_turn(self.layers, start, back=back)
        tensors = [tensor for link in self.links for tensor in link.tensors]
        if torch.is_grad_enabled() and any(_requires_grad(t) for t in (start, *tensors)):
            return cast(tuple[Tensor, Tensor], _Chain.apply(self, back, start, *tensors))
        way = chain.pull if back else chain.run
        blocks = [way(block, self.links)[:2] for block in rows.split(BLOCK_ROWS)]
        ends, ladjs = zip(*blocks, strict=True)
        return torch.cat(ends).view(start.shape), torch.cat(ladjs).view(start.shape[:-1])

    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        node: Any = y.grad_fn
        if not was_made_by(node, _Chain) or node.back:
            return super().pushed_derivative(x, y, derivative)
        return cast(Tensor, node.way.pushed(_rows(derivative), 0)[-1]).view(derivative.shape)

    def tracked_tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.tracked_tensors()]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain_: Chain, back: bool, start: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        way = chain.pull if back else chain.run
        end, ladj, ctx.way = way(_rows(start), chain_.links)
        ctx.chain, ctx.back = chain_, back
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(start, *tensors)
        return end.view(start.shape), ladj.view(start.shape[:-1])

    @staticmethod
    def backward(
        ctx: Any, grad_end: Tensor | None, grad_ladj: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        start, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(start: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                with _computing_with(ctx.chain, tensors):
                    return _in_turn(ctx.chain.layers, start, back=ctx.back)

            found = differentiate(again, (start, *tensors), (grad_end, grad_ladj))
            return (None, None, *found)
        grad_rows = torch.zeros_like(start) if grad_end is None else grad_end
        of_ladj = None if grad_ladj is None else grad_ladj.reshape(-1)
        wanted = ctx.needs_input_grad[3:]
        if ctx.back:
            grad_start, grads = ctx.way.backward(_rows(grad_rows), of_ladj, wanted)
        else:
            (grad_start, *grads), _ = ctx.way.backward(_rows(grad_rows), of_ladj, wanted=wanted)
        return (None, None, grad_start.view(start.shape), *grads)


def _rows(vectors: Tensor) -> Tensor:
    return vectors.reshape(-1, vectors.shape[-1])


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _in_turn(layers: Sequence[Bijection], value: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    total: Tensor | None = None
    for layer in reversed(layers) if back else layers:
        value, ladj = layer.inverse_and_ladj(value) if back else layer.call_and_ladj(value)
        total = ladj if total is None else total + ladj
    return value, cast(Tensor, total)


@contextmanager
def _computing_with(chain_: Chain, tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """The layers compute with these tensors in the place of their own, for a while."""
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    waiting = iter(tensors)
    try:
        for layer, link in zip(chain_.layers, chain_.links, strict=True):
            for name in link.names:
                path, _, last = name.rpartition(".")
                owner = cast(nn.Module, layer).get_submodule(path)
                kept: dict[str, Any] = (
                    owner._parameters if last in owner._parameters else owner._buffers
                )
                swapped.append((kept, last, kept[last]))
                kept[last] = next(waiting)
        yield
    finally:
        for kept, last, own in swapped:
            kept[last] = own
