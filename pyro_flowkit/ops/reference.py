r"""The monotonic rational-quadratic spline, forward and inverse, in plain PyTorch.

This is the reference for every other implementation: branch-free, free of data-dependent shapes, and accurate at the
edges. One raw parameter vector per scalar input holds ``count_bins`` width logits, ``count_bins`` height logits and the
raw slopes at the knots that are not fixed, in this order.

Within bin k, with knots (x_k, y_k), width w, height h, chord slope s = h / w, knot slopes d_k and d_{k+1}, let
a0 = d_k / s, a1 = d_{k+1} / s, t = (x - x_k) / w and u = 1 - t = (x_{k+1} - x) / w. Durkan et al. (2019), equations 4
and 5, then read

.. math::

    y      &= y_k + h \, t (t + a_0 u) / q, \qquad q = t^2 + u^2 + (a_0 + a_1) t u \\
    dy/dx  &= s \, (a_1 t^2 + 2 t u + a_0 u^2) / q^2

in which every sum has positive terms only, so nothing cancels, and q >= 1/2 because t^2 + u^2 >= (t + u)^2 / 2.

References:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.

    J. A. Gregory, R. Delbourgo. Piecewise rational quadratic interpolation to monotonic data. IMA Journal of Numerical
    Analysis, 1982.

    Danilo J. Rezende et al. Normalizing Flows on Tori and Spheres. ICML 2020 (circular splines).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flowkit.ops.settings import SplineSettings
from pyro_flowkit.ops.shapes import broadcast_shapes


class _Bin(NamedTuple):
    """The bin that holds each input: its lower corner, width, height and the slopes at its two knots."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    slope_left: Tensor
    slope_right: Tensor


def evaluate(
    inputs: Tensor, params: Tensor, settings: SplineSettings, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Values and log-derivatives (nats); shapes as in :func:`~pyro_flowkit.ops.rational_quadratic_forward`."""
    bound, tails = settings.bound, settings.tails
    dtype = inputs.dtype
    working = torch.promote_types(torch.promote_types(dtype, params.dtype), torch.float32)
    v, params = inputs.to(working), params.to(working)
    batch_shape = broadcast_shapes(v.shape, params.shape[:-1])
    v = v.expand(batch_shape)

    knots = _knots(params, settings)
    point = _wrap(v, bound) if tails == "circular" else v
    # The box; what lies outside is put back by the tails below. Not clamp, whose derivative at the bound itself is 1 or
    # 0 by the version of PyTorch.
    point = point.masked_fill(point > bound, bound).masked_fill(point < -bound, -bound)
    bin = _select_bin(point, knots, axis=1 if inverse else 0)
    box_value, box_ladj = _invert_bin(point, bin) if inverse else _evaluate_bin(point, bin)

    # Rounding may carry a value an ulp past the bound, where the inverse would not find it; the
    # derivative stays as it is.
    box_value = box_value - (box_value - box_value.clamp(-bound, bound)).detach()

    outside = v.abs() > bound
    if tails == "linear":
        value, ladj = torch.where(outside, v, box_value), box_ladj.masked_fill(outside, 0.0)
    elif tails == "circular":
        value, ladj = torch.where(outside, v + (box_value - point), box_value), box_ladj
    else:
        value = box_value.masked_fill(outside, math.nan)
        ladj = box_ladj.masked_fill(outside, math.nan)
    return value.to(dtype), ladj.to(dtype)


def _knots(params: Tensor, settings: SplineSettings) -> Tensor:
    """Raw parameters to x, y and slope of every knot, shape ``(*batch, 3, count_bins + 1)``."""
    count_bins, bound, min_slope = settings.count_bins, settings.bound, settings.min_slope
    minima = (settings.min_bin_width, settings.min_bin_height)
    logits = params[..., : 2 * count_bins].unflatten(-1, (2, count_bins))
    shares = logits.softmax(-1).unbind(-2)
    rows = []
    for share, minimum in zip(shares, minima, strict=True):
        share = minimum + (1.0 - minimum * count_bins) * share
        interior = 2.0 * bound * share[..., :-1].cumsum(-1) - bound
        # pinned to the bounds at both ends
        rows.append(F.pad(F.pad(interior, (1, 0), value=-bound), (0, 1), value=bound))
    # softplus(raw + offset) + min_slope is 1 at raw = 0
    offset = math.log(math.expm1(1.0 - min_slope))
    slopes = min_slope + F.softplus(params[..., 2 * count_bins :] + offset)
    if settings.tails == "linear":
        slopes = F.pad(slopes, (1, 1), value=1.0)
    elif settings.tails == "circular":
        slopes = torch.cat([slopes, slopes[..., :1]], dim=-1)
    return torch.stack([*rows, slopes], dim=-2)


def _wrap(v: Tensor, bound: float) -> Tensor:
    """Move a value by whole turns into [-bound, bound]; what is infinite or too large to have a phase goes to 0."""
    turns = torch.round(v / (2.0 * bound))
    wrapped = v - 2.0 * bound * turns.detach()
    return torch.where(
        turns.abs() * torch.finfo(v.dtype).eps < 1.0, wrapped, torch.where(v.isnan(), v, 0.0)
    )


def _select_bin(point: Tensor, knots: Tensor, axis: int) -> _Bin:
    # Counting the interior knots at or below the point needs no sorting, no clamping and no data-dependent shape.
    index = (point.unsqueeze(-1) >= knots[..., axis, 1:-1]).sum(-1)
    ends = torch.stack([index, index + 1], dim=-1).unsqueeze(-2)
    knots = knots.expand(*point.shape, *knots.shape[-2:])
    x, y, slope = knots.gather(-1, ends.expand(*point.shape, 3, 2)).unbind(-2)
    return _Bin(
        x=x[..., 0],
        y=y[..., 0],
        width=x[..., 1] - x[..., 0],
        height=y[..., 1] - y[..., 0],
        slope_left=slope[..., 0],
        slope_right=slope[..., 1],
    )


def _coordinates(point: Tensor, start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """In-bin coordinate and its complement, both in [0, 1]; clamped before the division, so that rounding of the
    difference cannot leave the bin."""
    offset = point - start
    # not clamp and minimum, whose derivatives at a tie (the bounds) are not 1 in every version of PyTorch
    offset = offset.masked_fill(offset < 0.0, 0.0)
    offset = torch.where(offset > side, side, offset)
    return offset / side, (side - offset) / side


def _log_derivative(t: Tensor, u: Tensor, q: Tensor, bin: _Bin) -> Tensor:
    slope = bin.height / bin.width
    return torch.log(
        bin.slope_right * t * t + 2.0 * slope * t * u + bin.slope_left * u * u
    ) - 2.0 * torch.log(q)


def _evaluate_bin(x: Tensor, bin: _Bin) -> tuple[Tensor, Tensor]:
    t, u = _coordinates(x, bin.x, bin.width)
    slope = bin.height / bin.width
    a0, a1 = bin.slope_left / slope, bin.slope_right / slope
    q = t * t + u * u + (a0 + a1) * t * u
    return bin.y + bin.height * (t * (t + a0 * u) / q), _log_derivative(t, u, q, bin)


def _invert_bin(y: Tensor, bin: _Bin) -> tuple[Tensor, Tensor]:
    r"""Solve v = t (t + a0 u) / q for t, where v = (y - y_k) / h and w = 1 - v.

    With u = 1 - t this is the quadratic (1 - B) t^2 + B t - v = 0, where B = r + 2 v and r = a0 w - a1 v. Its
    discriminant, B^2 + 4 (1 - B) v, is r^2 + 4 v w: a sum of two non-negative terms, where the usual form subtracts
    numbers of equal size when the knot slopes are small. With D = sqrt(r^2 + 4 v w) the root in [0, 1] is

        t = 2 v / (2 v + r + D),        u = 2 w / (2 w - r + D).

    For r >= 0 the first has positive terms only; for r < 0, r + D = 4 v w / (D - r) turns it into
    (D - r) / (D - r + 2 w), which has too. So, with p = D + |r|, either (t, u) = (2 v, p) / (2 v + p) or
    (t, u) = (p, 2 w) / (p + 2 w): no subtraction is left but the one in r, whose rounding error is relative to the
    larger of its two terms and enters D only next to 4 v w. The denominator vanishes nowhere: v = 0 gives p = 2 a0 > 0.
    (Durkan et al. 2019, appendix A.2, use the first form for every sign of r.)
    """
    v, w = _coordinates(y, bin.y, bin.height)
    slope = bin.height / bin.width
    a0, a1 = bin.slope_left / slope, bin.slope_right / slope
    r = a0 * w - a1 * v
    positive = r >= 0
    # not abs(r), whose derivative at r = 0 is neither branch's
    p = torch.sqrt(r * r + 4.0 * v * w) + torch.where(positive, r, -r)
    numerator_t = torch.where(positive, 2.0 * v, p)
    numerator_u = torch.where(positive, p, 2.0 * w)
    total = numerator_t + numerator_u
    t, u = numerator_t / total, numerator_u / total
    q = t * t + u * u + (a0 + a1) * t * u
    return bin.x + bin.width * t, -_log_derivative(t, u, q, bin)
