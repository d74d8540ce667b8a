"""A whole spline coupling, conditioner included, as one call of the kernel and one node of the autograd graph.

The networks of a flow are small: a step through one of PyTorch's own spends as long in the bookkeeping of its dozen
operations as in arithmetic. The kernel takes the rows block by block through network and splines while they are in the
cache.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flowkit.ops.backend import MAX_LAYERS, backend, kernel
from pyro_flowkit.ops.columns import Columns
from pyro_flowkit.ops.eager import differentiate, is_plain_eager, was_made_by
from pyro_flowkit.ops.launch import count_rows, launch, per_thread, total
from pyro_flowkit.ops.layout import Layout
from pyro_flowkit.ops.rational_quadratic import spline_columns
from pyro_flowkit.ops.scratch import scratch
from pyro_flowkit.ops.settings import SplineSettings
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.ops.threads import count_threads

# The conditioner sees its inputs clamped to this size, so that inf makes neither its output nor its gradient NaN. Both
# directions clamp the same values: the map stays a bijection.
CONDITIONER_LIMIT = 1e4


def applies(
    x: Tensor,
    context: Tensor | None,
    packed: Tensor,
    shared_params: Tensor | None,
    layout: Layout,
) -> bool:
    """Whether :func:`spline_coupling` may compute with these tensors, here and now."""
    tensors, dtype = (x, context, packed, shared_params), x.dtype
    if backend() != "fused" or not is_plain_eager(*tensors):
        return False
    if len(layout.shapes) > MAX_LAYERS or torch.is_autocast_enabled("cpu"):
        return False
    if dtype not in (torch.float32, torch.float64):
        return False
    if context is not None and context.shape[:-1] != x.shape[:-1]:
        return False
    return all(t is None or (t.is_cpu and t.dtype == dtype) for t in tensors)


def for_every_row(context: Tensor | None, x: Tensor) -> Tensor | None:
    """The context, widened to the rows of x where one context is for several draws."""
    if context is not None and context.dim() < x.dim():
        if broadcast_shapes(context.shape[:-1], x.shape[:-1]) == x.shape[:-1]:
            return context.expand(*x.shape[:-1], -1)
    return context


def spline_coupling(
    x: Tensor,
    context: Tensor | None,
    packed: Tensor,
    shared_params: Tensor | None,
    layout: Layout,
    passed: tuple[int, int],
    columns: Columns,
    settings: SplineSettings,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Splines whose raw parameters are the output of a multilayer perceptron with ReLU.

    Args:
        x: shape ``(*batch, columns.dim)``.
        context: shape ``(*batch, context_dim)``, or None.
        packed: weights and biases of the perceptron, as ``layout`` says.
        shared_params: raw parameters of ``columns.shared``, or None.
        layout: of the perceptron.
        passed: first column that the perceptron reads, and the column after the last.
        columns, settings, inverse: as for :func:`~pyro_flowkit.ops.spline_columns`.

    Returns:
        Values ``(*batch, columns.dim)`` and log-dets ``(*batch,)`` (nats).
    """
    plan = (layout, passed, columns, settings, inverse)
    tensors = tuple(
        None if t is None else t.contiguous() for t in (x, context, packed, shared_params)
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return cast(tuple[Tensor, Tensor], _Coupling.apply(plan, *tensors))
    return _forward(plan, cast(_Tensors, tensors), None, _count_threads(plan, count_rows(x)))


@torch.no_grad()
def pushed_derivative(
    value: Tensor, derivative: Tensor, own: Columns, settings: SplineSettings
) -> Tensor | None:
    """A derivative of the log-density through the splines that have parameters of their own, x to ``value``.

    The inverse map of these columns is differentiated, by what the forward pass kept: the conditioner is not run again.

    Args:
        value: what :func:`spline_coupling` returned, forward; the columns that others share count as passed.
        derivative: with respect to x, of the log-density of x, shape ``(*batch, dim)``.
        own: the columns with own parameters alone.

    Returns:
        The derivative with respect to the value, but for the shared columns, of the density of the value; None where
        ``value`` did not come from the kernel with a graph.
    """
    node: Any = value.grad_fn
    if not was_made_by(node, _Coupling) or derivative.dtype != value.dtype:
        return None
    layout, passed, *_ = node.plan
    _, context, packed, _, kept = node.saved_tensors
    tensors = (value.detach().contiguous(), context, packed, None)
    grads = (derivative, value.new_ones(value.shape[:-1]))
    plan = (layout, passed, own, settings, True)
    return _backward(plan, tensors, kept, grads, False, node.threads)[0]


_Plan = tuple[Layout, tuple[int, int], Columns, SplineSettings, bool]
# x, context, packed, shared_params
_Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x = cast(Tensor, tensors[0])
        rows = count_rows(x)
        kept = scratch(rows, cast(Any, kernel).kept_per_row(plan[0].sizes), x.dtype)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.threads = _count_threads(plan, rows)  # how what is kept lies in memory depends on it
        ctx.save_for_backward(*tensors, kept)
        return _forward(plan, cast(_Tensors, tensors), kept, ctx.threads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return _composed(ctx.plan, *cast(_Tensors, tensors))

            return (None, *differentiate(again, tensors, grads))
        packed_wanted = ctx.needs_input_grad[3]
        return (None, *_backward(ctx.plan, tensors, kept, grads, packed_wanted, ctx.threads))


def _composed(
    plan: _Plan, x: Tensor, context: Tensor | None, packed: Tensor, shared_params: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own operations."""
    layout, (first, stop), columns, settings, inverse = plan
    h = F.hardtanh(x[..., first:stop], -CONDITIONER_LIMIT, CONDITIONER_LIMIT)
    if context is not None:
        h = torch.cat([h, context], dim=-1)
    *hidden, output = layout.unpack(packed)
    for layer in hidden:
        h = F.relu(F.linear(h, *layer))
    params = F.linear(h, *output)
    return spline_columns(x, params, shared_params, columns, settings, inverse=inverse)


def _header(plan: _Plan, tensors: _Tensors) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The kernel's arguments before and after the number of rows, up to the addresses of tensors with rows."""
    layout, (first, stop), columns, settings, inverse = plan
    x, context, packed, _ = tensors
    before = (x.dtype == torch.float64, inverse, True)
    start, step = packed.data_ptr(), packed.element_size()
    network = (*layout.sizes, *[start + offset * step for offset in layout.offsets])
    context_dim = 0 if context is None else context.shape[-1]
    passed = (first, stop - first, context_dim, CONDITIONER_LIMIT, network)
    return before, (*columns.packed, *settings.packed, *passed)


def _count_threads(plan: _Plan, rows: int) -> int:
    """As many threads as the splines and the products (about a hundred to the time of a spline) are worth."""
    return count_threads(rows * (plan[2].dim + plan[0].num_weights // 400))


def _forward(
    plan: _Plan, tensors: _Tensors, kept: Tensor | None, threads: int
) -> tuple[Tensor, Tensor]:
    x, context, _, shared_params = tensors
    value, ladj = torch.empty_like(x), x.new_empty(x.shape[:-1])
    launch(
        "couple",
        _header(plan, tensors),
        count_rows(x),
        (x, context, shared_params, value, ladj, kept),
        (True, True, False, True, True, True),
        threads,
    )
    return value, ladj


def _backward(
    plan: _Plan,
    tensors: _Tensors,
    kept: Tensor,
    grads: Sequence[Tensor | None],
    packed_wanted: bool,
    threads: int,
) -> tuple[Tensor | None, ...]:
    x, context, packed, shared_params = tensors
    grad_value, grad_ladj = (None if grad is None else grad.contiguous() for grad in grads)
    grad_x = torch.empty_like(x)
    grad_context = None if context is None else torch.empty_like(context)
    grad_packed = per_thread(x, packed.numel(), threads) if packed_wanted else None
    grad_shared = None if shared_params is None else per_thread(x, shared_params.numel(), threads)
    launch(
        "couple_backward",
        _header(plan, tensors),
        count_rows(x),
        (
            x,
            shared_params,
            kept,
            grad_value,
            grad_ladj,
            grad_x,
            grad_context,
            grad_shared,
            grad_packed,
        ),
        (True, False, True, True, True, True, True, None, None),
        threads,
    )
    parts = (grad_packed, grad_shared)
    return grad_x, grad_context, *(None if part is None else total(part) for part in parts)
