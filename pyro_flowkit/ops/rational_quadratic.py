"""The monotonic rational-quadratic spline: by the fused kernel where it applies, by the PyTorch reference elsewhere.

Reference:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.
"""

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from pyro_flowkit.ops import fused, reference
from pyro_flowkit.ops.backend import compiles_reference
from pyro_flowkit.ops.checks import check_floating
from pyro_flowkit.ops.columns import Columns, take
from pyro_flowkit.ops.eager import is_plain_eager
from pyro_flowkit.ops.settings import (
    MIN_BIN_HEIGHT,
    MIN_BIN_WIDTH,
    MIN_SLOPE,
    SplineSettings,
    Tails,
)
from pyro_flowkit.ops.shapes import broadcast_shapes

# More rows of parameters than this are not worth a table each.
_MAX_SHARED = 1024

_ONE_COLUMN = Columns(1, (0,))


def rational_quadratic_forward(
    inputs: Tensor,
    params: Tensor,
    *,
    count_bins: int,
    bound: float = 3.0,
    tails: Tails = "linear",
    min_bin_width: float = MIN_BIN_WIDTH,
    min_bin_height: float = MIN_BIN_HEIGHT,
    min_slope: float = MIN_SLOPE,
) -> tuple[Tensor, Tensor]:
    """Evaluate the spline at ``inputs``. Zero parameters give the identity, to rounding.

    Args:
        inputs: points, shape ``(*batch,)``; any floating dtype, half precisions are computed in float32.
        params: raw parameters, shape ``(*batch, num_spline_params(count_bins, tails))``, broadcast against ``inputs``.
        count_bins: number of bins K.
        bound: the box is ``[-bound, bound]`` on both axes.
        tails: "linear" is the identity outside the box, with slope 1 at the bounds; "circular" commutes with a shift by
            ``2 * bound`` (a map of the circle onto itself, lifted to the line); None maps the box onto itself and gives
            NaN outside.
        min_bin_width, min_bin_height: smallest share of the box's side for a bin.
        min_slope: smallest slope at a knot.

    Returns:
        The values and log dy/dx (nats), both with the broadcast batch shape and the dtype of ``inputs``.

    Raises:
        ValueError: for settings that make no spline, parameters of another size, or integers.

    Example:
        >>> import torch
        >>> from pyro_flowkit.ops import rational_quadratic_forward
        >>> x, params = torch.tensor([-5.0, 0.5]), torch.zeros(2, 23)  # eight bins; zeros are the identity
        >>> y, log_slope = rational_quadratic_forward(x, params, count_bins=8)
        >>> y, bool(log_slope.abs().max() < 1e-5)
        (tensor([-5.0000,  0.5000]), True)
    """
    settings = _settings(count_bins, bound, tails, min_bin_width, min_bin_height, min_slope)
    return spline_elements(inputs, params, settings, inverse=False)


def rational_quadratic_inverse(
    inputs: Tensor,
    params: Tensor,
    *,
    count_bins: int,
    bound: float = 3.0,
    tails: Tails = "linear",
    min_bin_width: float = MIN_BIN_WIDTH,
    min_bin_height: float = MIN_BIN_HEIGHT,
    min_slope: float = MIN_SLOPE,
) -> tuple[Tensor, Tensor]:
    """Invert :func:`rational_quadratic_forward`: same arguments; returns x and log dx/dy (nats).

    Example:
        >>> import torch
        >>> from pyro_flowkit.ops import rational_quadratic_forward, rational_quadratic_inverse
        >>> x, params = torch.tensor([-1.0, 0.5]), torch.randn(2, 23)
        >>> y, _ = rational_quadratic_forward(x, params, count_bins=8)
        >>> torch.allclose(rational_quadratic_inverse(y, params, count_bins=8)[0], x, atol=1e-5)
        True
    """
    settings = _settings(count_bins, bound, tails, min_bin_width, min_bin_height, min_slope)
    return spline_elements(inputs, params, settings, inverse=True)


def spline_columns(
    x: Tensor,
    params: Tensor | None,
    shared_params: Tensor | None,
    columns: Columns,
    settings: SplineSettings,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Send some columns of a vector through splines, each with its own raw parameters, and sum the log-dets.

    Args:
        x: shape ``(*batch, columns.dim)``.
        params: raw parameters of ``columns.own``, shape ``(*batch, len(columns.own) * settings.num_params)``, which
            broadcasts against the batch shape of ``x``; None where there are none.
        shared_params: raw parameters of ``columns.shared``, the same for the whole batch, shape
            ``(len(columns.shared) * settings.num_params,)``; None where there are none.
        columns: which columns have which parameters.
        settings: of all the splines.
        inverse: evaluate the inverse.

    Returns:
        Values ``(*batch, columns.dim)`` and log-dets ``(*batch,)`` (nats) in the dtype of ``x``.

    Raises:
        ValueError: for parameters of another size, and for integers.

    Example:
        >>> import torch
        >>> from pyro_flowkit.ops import Columns, SplineSettings, spline_columns
        >>> settings, columns = SplineSettings(count_bins=4, bound=3.0), Columns(2, own=(1,))
        >>> x, params = torch.tensor([[0.5, 1.0]]), torch.ones(1, settings.num_params)
        >>> y, log_det = spline_columns(x, params, None, columns, settings)
        >>> bool(y[0, 0] == x[0, 0]), bool(y[0, 1] != x[0, 1])
        (True, True)
        >>> back, _ = spline_columns(y, params, None, columns, settings, inverse=True)
        >>> torch.allclose(back, x, atol=1e-5), log_det.shape
        (True, torch.Size([1]))
    """
    for given, numbers, name in (
        (params, columns.own, "params"),
        (shared_params, columns.shared, "shared_params"),
    ):
        _check_size(given, len(numbers) * settings.num_params, settings, name)
    check_floating(x, "x")
    if params is not None:
        check_floating(params, "params")
    if shared_params is not None:
        check_floating(shared_params, "shared_params")
    if shared_params is not None and shared_params.dim() != 1:
        raise ValueError(
            f"Expected shared_params of one dimension, got shape {tuple(shared_params.shape)}."
        )
    if not fused.applies(x, params, shared_params):
        return _columns_reference(x, params, shared_params, columns, settings, inverse)
    dtype, working = x.dtype, _working(x, params, shared_params)
    batch_shape = x.shape[:-1]
    if params is not None and params.dim() == 1 and shared_params is None:
        params, shared_params, columns = None, params, columns.all_shared
    if params is not None and params.shape[:-1] != batch_shape:
        batch_shape = broadcast_shapes(batch_shape, params.shape[:-1])
        params = params.expand(*batch_shape, params.shape[-1])
        x = x.expand(*batch_shape, columns.dim)
    value, ladj = fused.run(
        x.to(working),
        None if params is None else params.to(working),
        None if shared_params is None else shared_params.to(working),
        columns,
        settings,
        functools.partial(_columns_reference, columns=columns, settings=settings, inverse=inverse),
        inverse=inverse,
    )
    return value.to(dtype), ladj.to(dtype)


def _columns_reference(
    x: Tensor,
    params: Tensor | None,
    shared_params: Tensor | None,
    columns: Columns,
    settings: SplineSettings,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    values, ladjs = [], []
    for numbers, raw in ((columns.own, params), (columns.shared, shared_params)):
        part = take(x, numbers, columns.dim)
        if raw is not None:
            raw = raw.unflatten(-1, (len(numbers), settings.num_params))
            part, ladj = _in_pytorch(part, raw, settings, inverse)
            ladjs.append(ladj.sum(-1))
        values.append(part)
    batch_shape = broadcast_shapes(*(v.shape[:-1] for v in values))
    values.append(take(x, columns.rest, columns.dim))
    together = columns.merge(*(v.expand(*batch_shape, v.shape[-1]) for v in values))
    total = functools.reduce(torch.add, ladjs, x.new_zeros(()))
    return together, total.expand(batch_shape)


def _in_pytorch(
    inputs: Tensor, params: Tensor, settings: SplineSettings, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The reference, compiled where that is asked for and nobody has to see every operation."""
    if compiles_reference() and is_plain_eager(inputs, params):
        return _compiled(settings, inverse)(inputs, params)
    return reference.evaluate(inputs, params, settings, inverse=inverse)


@functools.cache
def _compiled(settings: SplineSettings, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def evaluate(inputs: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return reference.evaluate(inputs, params, settings, inverse=inverse)

    # With a code object of its own: of one that they share, the compiler takes the settings for variables.
    own = FunctionType(evaluate.__code__.replace(), globals(), closure=evaluate.__closure__)
    return torch.compile(own, fullgraph=True)


_known_settings = functools.lru_cache(maxsize=128)(SplineSettings)


def _settings(*arguments: Any) -> SplineSettings:
    if torch.compiler.is_compiling():  # which warns of a cache
        return SplineSettings(*arguments)
    return _known_settings(*arguments)


def spline_elements(
    inputs: Tensor, params: Tensor, settings: SplineSettings, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`rational_quadratic_forward`, or its inverse, for settings that are there already.

    Example:
        >>> import torch
        >>> from pyro_flowkit.ops import SplineSettings, spline_elements
        >>> settings = SplineSettings(count_bins=8, bound=3.0)
        >>> y, log_slope = spline_elements(torch.randn(4), torch.zeros(4, settings.num_params), settings)
        >>> y.shape, log_slope.shape
        (torch.Size([4]), torch.Size([4]))
    """
    _check_size(params, settings.num_params, settings, "params")
    check_floating(inputs, "inputs")
    check_floating(params, "params")
    if not fused.applies(inputs, params):
        return _in_pytorch(inputs, params, settings, inverse)
    dtype, working = inputs.dtype, _working(inputs, params)
    x, raw = inputs.to(working), params.to(working)
    shape, own_shape = x.shape, raw.shape[:-1]
    if shape != own_shape:
        shape = broadcast_shapes(shape, own_shape)
        x = x.expand(shape)
    count = math.prod(own_shape)
    shared = len(own_shape) < len(shape) and own_shape == shape[len(shape) - len(own_shape) :]
    own: Tensor | None = None
    common: Tensor | None = None
    if shared and 0 < count <= _MAX_SHARED:  # one row of parameters for many inputs
        columns = Columns(count, (), tuple(range(count)))
        x, common = x.reshape(-1, count), raw.reshape(-1)
    else:
        columns = _ONE_COLUMN
        raw = raw if own_shape == shape else raw.expand(*shape, settings.num_params)
        x, own = x.reshape(-1, 1), raw.reshape(-1, settings.num_params)

    def in_pytorch(x: Tensor, own: Tensor | None, common: Tensor | None) -> tuple[Tensor, Tensor]:
        raw = cast(Tensor, own if common is None else common)
        given = raw.unsqueeze(-2) if common is None else raw.unflatten(-1, (count, -1))
        return reference.evaluate(x, given, settings, inverse=inverse)

    value, ladj = fused.run(
        x, own, common, columns, settings, in_pytorch, inverse=inverse, sum_ladj=False
    )
    return value.to(dtype).reshape(shape), ladj.to(dtype).reshape(shape)


def _working(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_size(params: Tensor | None, size: int, settings: SplineSettings, name: str) -> None:
    if torch.jit.is_tracing():  # sizes are tensors there
        return
    if (0 if params is None else params.shape[-1]) != size:
        shape = None if params is None else tuple(params.shape)
        raise ValueError(
            f"Expected {name} with last dimension {size} (count_bins={settings.count_bins}, "
            f"tails={settings.tails!r}), got shape {shape}."
        )
