"""The fused kernel as an operation of PyTorch: autograd, second derivatives, ``torch.compile``.

In eager mode a bare ``autograd.Function`` hands addresses to the kernel, which is the cheapest way that there is. Its
backward runs the kernel too; under ``create_graph`` it differentiates the reference, so that there are second
derivatives. ``torch.compile`` sees two custom operators instead. Whatever needs to look inside (``torch.func``,
forward-mode derivatives, tracing, dispatch modes) gets the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyro_flowkit.ops.backend import backend
from pyro_flowkit.ops.columns import Columns
from pyro_flowkit.ops.eager import differentiate, is_plain_eager, is_transformed
from pyro_flowkit.ops.launch import count_rows, launch, per_thread, total
from pyro_flowkit.ops.settings import TAILS, SplineSettings
from pyro_flowkit.ops.threads import count_threads

Outputs = tuple[Tensor, Tensor]
Reference = Callable[..., Outputs]


def applies(*tensors: Tensor | None) -> bool:
    """Whether the kernel may compute with these tensors, here and now."""
    if backend() != "fused":
        return False
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.is_floating_point()):
            return False
    if torch.compiler.is_compiling():
        return not is_transformed()
    return is_plain_eager(*tensors)


def run(
    x: Tensor,
    params: Tensor | None,
    shared_params: Tensor | None,
    columns: Columns,
    settings: SplineSettings,
    reference: Reference,
    *,
    inverse: bool,
    sum_ladj: bool = True,
) -> Outputs:
    """Values and log-dets by the kernel; all tensors are of one dtype, float32 or float64.

    Args:
        x: shape ``(*batch, dim)``.
        params: shape ``(*batch, len(columns.own) * num_params)``, or None where no column has its own.
        shared_params: shape ``(len(columns.shared) * num_params,)``, or None.
        reference: the same function of the three tensors in PyTorch, for second derivatives.
        sum_ladj: sum the log-dets of each vector.

    Returns:
        Values ``(*batch, dim)`` and log-dets, ``(*batch,)`` or ``(*batch, dim)``.
    """
    plan = (columns, settings, inverse, sum_ladj)
    if torch.compiler.is_compiling():
        return _spline_operator(x, params, shared_params, *_flat(plan))
    tensors = (x, params, shared_params)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return cast(Outputs, _Spline.apply(*tensors, plan, reference))
    return forward(*tensors, plan)


# columns, settings, inverse, sum_ladj
Plan = tuple[Columns, SplineSettings, bool, bool]


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        params: Tensor | None,
        shared_params: Tensor | None,
        plan: Plan,
        reference: Reference,
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, params, shared_params)
        ctx.plan = plan
        ctx.reference = reference
        return forward(x, params, shared_params, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return (*differentiate(ctx.reference, ctx.saved_tensors, grads), None, None)
        x, params, shared_params = ctx.saved_tensors
        grad_value, grad_ladj = grads
        found = backward(x, params, shared_params, grad_value, grad_ladj, ctx.plan)
        return (*found, None, None)


def forward(x: Tensor, params: Tensor | None, shared_params: Tensor | None, plan: Plan) -> Outputs:
    """What :func:`run` returns, without autograd."""
    x, params, shared_params = x.contiguous(), _contiguous(params), _contiguous(shared_params)
    value = torch.empty_like(x)
    ladj = x.new_empty(x.shape[:-1]) if plan[3] else torch.empty_like(x)
    rows = count_rows(x)
    tensors = (x, params, shared_params, value, ladj)
    by_row = (True, True, False, True, True)
    launch("run", _header(x, plan), rows, tensors, by_row, _count_threads(rows, plan))
    return value, ladj


def backward(
    x: Tensor,
    params: Tensor | None,
    shared_params: Tensor | None,
    grad_value: Tensor | None,
    grad_ladj: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Derivatives with respect to the three tensors; None for an incoming derivative stands for zeros."""
    x, params, shared_params = x.contiguous(), _contiguous(params), _contiguous(shared_params)
    grad_value, grad_ladj = _contiguous(grad_value), _contiguous(grad_ladj)
    rows = count_rows(x)
    threads = _count_threads(rows, plan)
    grad_x = torch.empty_like(x)
    grad_params = None if params is None else torch.empty_like(params)
    parts = None if shared_params is None else per_thread(x, shared_params.numel(), threads)
    tensors = (x, params, shared_params, grad_value, grad_ladj, grad_x, grad_params, parts)
    by_row = (True, True, False, True, True, True, True, None)
    launch("run_backward", _header(x, plan), rows, tensors, by_row, threads)
    grad_shared = None if parts is None else total(parts)
    return grad_x, grad_params, grad_shared


def _count_threads(rows: int, plan: Plan) -> int:
    return count_threads(rows * (len(plan[0].own) + len(plan[0].shared)))


def _header(x: Tensor, plan: Plan) -> tuple[tuple[bool, bool, bool], tuple[Any, ...]]:
    columns, settings, inverse, sum_ladj = plan
    return (x.dtype == torch.float64, inverse, sum_ladj), columns.packed + settings.packed


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---- torch.compile: operators that it does not look into; their arguments must be of a few plain types ----


def _flat(plan: Plan) -> tuple[list[int], list[int], list[int], list[float], bool, bool]:
    columns, settings, inverse, sum_ladj = plan
    sizes = [columns.dim, settings.count_bins, TAILS.index(settings.tails)]
    numbers = [
        settings.bound,
        settings.min_bin_width,
        settings.min_bin_height,
        settings.min_slope,
    ]
    return sizes, list(columns.own), list(columns.shared), numbers, inverse, sum_ladj


def _unflat(
    sizes: Sequence[int],
    own: Sequence[int],
    shared: Sequence[int],
    numbers: Sequence[float],
    inverse: bool,
    sum_ladj: bool,
) -> Plan:
    dim, count_bins, tails = sizes
    bound, *minima = numbers
    settings = SplineSettings(count_bins, bound, TAILS[tails], *minima)
    return Columns(dim, tuple(own), tuple(shared)), settings, inverse, sum_ladj


@torch.library.custom_op("pyro_flowkit::spline", mutates_args=(), device_types="cpu")
def _spline_operator(
    x: Tensor,
    params: Tensor | None,
    shared_params: Tensor | None,
    sizes: Sequence[int],
    own: Sequence[int],
    shared: Sequence[int],
    numbers: Sequence[float],
    inverse: bool,
    sum_ladj: bool,
) -> tuple[Tensor, Tensor]:
    return forward(
        x, params, shared_params, _unflat(sizes, own, shared, numbers, inverse, sum_ladj)
    )


@_spline_operator.register_fake
def _(x, params, shared_params, sizes, own, shared, numbers, inverse, sum_ladj):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1] if sum_ladj else x.shape)


@torch.library.custom_op("pyro_flowkit::spline_backward", mutates_args=(), device_types="cpu")
def _spline_backward_operator(
    x: Tensor,
    params: Tensor | None,
    shared_params: Tensor | None,
    grad_value: Tensor,
    grad_ladj: Tensor,
    sizes: Sequence[int],
    own: Sequence[int],
    shared: Sequence[int],
    numbers: Sequence[float],
    inverse: bool,
    sum_ladj: bool,
) -> list[Tensor]:
    plan = _unflat(sizes, own, shared, numbers, inverse, sum_ladj)
    grads = backward(x, params, shared_params, grad_value, grad_ladj, plan)
    return [grad for grad in grads if grad is not None]


@_spline_backward_operator.register_fake
def _(x, params, shared_params, *rest):
    return [t.new_empty(t.shape) for t in (x, params, shared_params) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.plan = inputs[3:]


def _backward_of_operator(
    ctx: Any, grad_value: Tensor, grad_ladj: Tensor
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = iter(_spline_backward_operator(*tensors, grad_value, grad_ladj, *ctx.plan))
    grads = [None if t is None else next(found) for t in tensors]
    return (*grads, *(None for _ in ctx.plan))


_spline_operator.register_autograd(_backward_of_operator, setup_context=_setup)
