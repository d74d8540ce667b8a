"""A whole spline coupling, conditioner included, as one node of the autograd graph.

The networks of a flow are small: a step through one of PyTorch's own spends as long in the bookkeeping of its dozen
nodes as in arithmetic. Here the operations are the same, but nothing is recorded, copied or allocated in between.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flowkit.ops import fused
from pyro_flowkit.ops.columns import Columns
from pyro_flowkit.ops.eager import differentiate
from pyro_flowkit.ops.rational_quadratic import spline_columns
from pyro_flowkit.ops.settings import SplineSettings

# The conditioner sees its inputs clamped to this size, so that inf makes neither its output nor its gradient NaN. Both
# directions clamp the same values: the map stays a bijection.
CONDITIONER_LIMIT = 1e4


def applies(
    x: Tensor, context: Tensor | None, layers: Sequence[Tensor], shared_params: Tensor | None
) -> bool:
    """Whether :func:`spline_coupling` may compute with these tensors, here and now."""
    tensors = (x, context, shared_params, *layers)
    if torch.compiler.is_compiling() or not fused.applies(*tensors):
        return False
    if torch.is_autocast_enabled("cpu") or x.dtype not in (torch.float32, torch.float64):
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
    tensors = (x, context, shared_params, *layers)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        value, ladj = cast(tuple[Tensor, Tensor], _Coupling.apply(plan, *tensors))
    else:
        value, ladj, *_ = _forward(plan, *tensors)
    if len(batch_shape) != 1:
        return value.reshape(*batch_shape, columns.dim), ladj.reshape(batch_shape)
    return value, ladj


_Plan = tuple[tuple[int, int], Columns, SplineSettings, bool]


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        value, ladj, inputs, params = _forward(plan, *tensors)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.num_tensors = plan, len(tensors)
        ctx.save_for_backward(*tensors, *inputs, params)
        return value, ladj

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[: ctx.num_tensors]
        if torch.is_grad_enabled():

            def again(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return _composed(ctx.plan, *tensors)

            return (None, *differentiate(again, tensors, grads))
        *inputs, params = ctx.saved_tensors[ctx.num_tensors :]
        wanted = ctx.needs_input_grad[1:]
        return (None, *_backward(ctx.plan, tensors, inputs, params, grads, wanted))


def _named(
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]]:
    x, context, shared_params, *layers = tensors
    return cast(Tensor, x), context, shared_params, cast(Sequence[Tensor], layers)


def _composed(plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own operations."""
    x, context, shared_params, layers = _named(tensors)
    (first, stop), columns, settings, inverse = plan
    h = F.hardtanh(x[:, first:stop], -CONDITIONER_LIMIT, CONDITIONER_LIMIT)
    if context is not None:
        h = torch.cat([h, context], dim=-1)
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        h = F.relu(F.linear(h, weight, bias))
    params = F.linear(h, layers[-2], layers[-1])
    return spline_columns(x, params, shared_params, columns, settings, inverse=inverse)


def _forward(plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Values, log-dets, the inputs of every layer and the output of the last."""
    x, context, shared_params, layers = _named(tensors)
    (first, stop), columns, settings, inverse = plan
    with torch.no_grad():
        h = F.hardtanh(x[:, first:stop], -CONDITIONER_LIMIT, CONDITIONER_LIMIT)
        inputs = [h if context is None else torch.cat([h, context], dim=-1)]
        for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
            inputs.append(torch.addmm(bias, inputs[-1], weight.t()).relu_())
        params = torch.addmm(layers[-1], inputs[-1], layers[-2].t())
        call = (columns, settings, inverse, True)
        value, ladj = fused.forward(x, params, shared_params, call)
    return value, ladj, inputs, params


def _backward(
    plan: _Plan,
    tensors: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    params: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    (first, stop), columns, settings, inverse = plan
    x, context, shared_params, layers = _named(tensors)
    grad_value, grad_ladj = grads
    call = (columns, settings, inverse, True)
    grad_x, grad, grad_shared = fused.backward(
        x, params, shared_params, grad_value, grad_ladj, call
    )
    layer_grads: list[Tensor | None] = [None] * len(layers)
    for i in reversed(range(len(inputs))):
        weight, grad = layers[2 * i], cast(Tensor, grad)
        if wanted[3 + 2 * i]:
            layer_grads[2 * i] = grad.t() @ inputs[i]
        if wanted[4 + 2 * i]:
            layer_grads[2 * i + 1] = grad.sum(0)
        if i > 0:
            grad = grad @ weight
            torch.ops.aten.threshold_backward.grad_input(grad, inputs[i], 0, grad_input=grad)
        elif wanted[0] or wanted[1]:
            grad = grad @ weight
    grad_context = None
    if wanted[0] or wanted[1]:
        grad_features, features = cast(Tensor, grad)[:, : stop - first], inputs[0]
        if context is not None:
            grad_context = cast(Tensor, grad)[:, stop - first :]
            features = features[:, : stop - first]
        grad_features = torch.ops.aten.hardtanh_backward(
            grad_features, features, -CONDITIONER_LIMIT, CONDITIONER_LIMIT
        )
        grad_x[:, first:stop].add_(grad_features)
    return [grad_x, grad_context, grad_shared, *layer_grads]
