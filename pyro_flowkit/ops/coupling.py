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

from pyro_flowkit.ops import fused
from pyro_flowkit.ops.columns import Columns
from pyro_flowkit.ops.eager import differentiate
from pyro_flowkit.ops.launch import launch, total
from pyro_flowkit.ops.rational_quadratic import spline_columns
from pyro_flowkit.ops.scratch import scratch
from pyro_flowkit.ops.settings import SplineSettings
from pyro_flowkit.ops.threads import count_threads

# The conditioner sees its inputs clamped to this size, so that inf makes neither its output nor its gradient NaN. Both
# directions clamp the same values: the map stays a bijection.
CONDITIONER_LIMIT = 1e4

# as many numbers as the widest vector of the kernel holds
_LANES = 8
_MAX_LAYERS = 8


def applies(
    x: Tensor, context: Tensor | None, layers: Sequence[Tensor], shared_params: Tensor | None
) -> bool:
    """Whether :func:`spline_coupling` may compute with these tensors, here and now."""
    tensors = (x, context, shared_params, *layers)
    if torch.compiler.is_compiling() or not fused.applies(*tensors):
        return False
    if len(layers) > 2 * _MAX_LAYERS or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    if context is not None and context.shape[:-1] != x.shape[:-1]:
        return False
    return all(tensor is None or tensor.dtype == x.dtype for tensor in tensors)


def spline_coupling(
    x: Tensor,
    context: Tensor | None,
    layers: Sequence[Tensor],
    shared_params: Tensor | None,
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
        layers: weight and bias of every layer, one after the other.
        shared_params: raw parameters of ``columns.shared``, or None.
        passed: first column that the perceptron reads, and the column after the last.
        columns, settings, inverse: as for :func:`~pyro_flowkit.ops.spline_columns`.

    Returns:
        Values ``(*batch, columns.dim)`` and log-dets ``(*batch,)`` (nats).
    """
    batch_shape = x.shape[:-1]
    if len(batch_shape) != 1:
        x = x.reshape(-1, columns.dim)
        context = None if context is None else context.reshape(-1, context.shape[-1])
    plan = (passed, columns, settings, inverse)
    tensors = tuple(
        None if t is None else t.contiguous() for t in (x, context, shared_params, *layers)
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        value, ladj = cast(tuple[Tensor, Tensor], _Coupling.apply(plan, *tensors))
    else:
        value, ladj = _forward(plan, tensors, None, _count_threads(plan, tensors))
    if len(batch_shape) != 1:
        return value.reshape(*batch_shape, columns.dim), ladj.reshape(batch_shape)
    return value, ladj


_Plan = tuple[tuple[int, int], Columns, SplineSettings, bool]


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x = cast(Tensor, tensors[0])
        kept = scratch(x.shape[0], _kept_per_row(tensors), x.dtype)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.threads = _count_threads(plan, tensors)  # the layout of what is kept depends on it
        ctx.save_for_backward(*tensors, kept)
        return _forward(plan, tensors, kept, ctx.threads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return _composed(ctx.plan, *tensors)

            return (None, *differentiate(again, tensors, grads))
        layers_wanted = any(ctx.needs_input_grad[4:])
        return (None, *_backward(ctx.plan, tensors, kept, grads, layers_wanted, ctx.threads))


def _composed(plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own operations."""
    (first, stop), columns, settings, inverse = plan
    x, context, shared_params, layers = _named(tensors)
    h = F.hardtanh(x[:, first:stop], -CONDITIONER_LIMIT, CONDITIONER_LIMIT)
    if context is not None:
        h = torch.cat([h, context], dim=-1)
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        h = F.relu(F.linear(h, weight, bias))
    params = F.linear(h, layers[-2], layers[-1])
    return spline_columns(x, params, shared_params, columns, settings, inverse=inverse)


def _named(
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]]:
    x, context, shared_params, *layers = tensors
    return cast(Tensor, x), context, shared_params, cast(Sequence[Tensor], layers)


def _sizes(tensors: Sequence[Tensor | None]) -> list[int]:
    """Inputs of the first layer, then outputs of every layer."""
    weights = cast(Sequence[Tensor], tensors[3::2])
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]


def _kept_per_row(tensors: Sequence[Tensor | None]) -> int:
    """What the kernel keeps of a row: the numbers of every layer, in whole vectors."""
    return sum(-(-size // _LANES) * _LANES for size in _sizes(tensors))


def _header(
    plan: _Plan, tensors: Sequence[Tensor | None]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The kernel's arguments before and after the number of rows, up to the addresses of tensors with rows."""
    (first, stop), columns, settings, inverse = plan
    x, context, _, layers = _named(tensors)
    before = (x.dtype == torch.float64, inverse, True)
    network = (*_sizes(tensors), *(parameter.data_ptr() for parameter in layers))
    context_dim = 0 if context is None else context.shape[1]
    passed = (first, stop - first, context_dim, CONDITIONER_LIMIT, network)
    return before, (*columns.packed, *settings.packed, *passed)


def _count_threads(plan: _Plan, tensors: Sequence[Tensor | None]) -> int:
    """As many threads as the splines and the products (about a hundred to the time of a spline) are worth."""
    x, _, _, layers = _named(tensors)
    products = sum(weight.numel() for weight in layers[::2])
    return count_threads(x.shape[0] * (plan[1].dim + products // 400))


def _forward(
    plan: _Plan, tensors: Sequence[Tensor | None], kept: Tensor | None, threads: int
) -> tuple[Tensor, Tensor]:
    x, context, shared_params, _ = _named(tensors)
    value, ladj = torch.empty_like(x), x.new_empty(x.shape[0])
    launch(
        "couple",
        _header(plan, tensors),
        (x, context, shared_params, value, ladj, kept),
        (True, True, False, True, True, True),
        threads,
    )
    return value, ladj


def _backward(
    plan: _Plan,
    tensors: Sequence[Tensor | None],
    kept: Tensor,
    grads: Sequence[Tensor | None],
    layers_wanted: bool,
    threads: int,
) -> list[Tensor | None]:
    x, context, shared_params, layers = _named(tensors)
    grad_value, grad_ladj = (None if grad is None else grad.contiguous() for grad in grads)
    sizes = [layer.numel() for layer in layers]
    grad_x = torch.empty_like(x)
    grad_context = None if context is None else torch.empty_like(context)
    grad_shared = None if shared_params is None else x.new_empty(threads, shared_params.numel())
    grad_layers = x.new_empty(threads, sum(sizes)) if layers_wanted else None
    launch(
        "couple_backward",
        _header(plan, tensors),
        (
            x,
            shared_params,
            kept,
            grad_value,
            grad_ladj,
            grad_x,
            grad_context,
            grad_shared,
            grad_layers,
        ),
        (True, False, True, True, True, True, True, None, None),
        threads,
    )
    found: list[Tensor | None] = [None] * len(layers)
    if grad_layers is not None:
        parts = total(grad_layers).split(sizes)
        found = [p.view(w.shape) if w.dim() == 2 else p for p, w in zip(parts, layers, strict=True)]
    return [grad_x, grad_context, None if grad_shared is None else total(grad_shared), *found]
