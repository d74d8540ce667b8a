r"""Data on the way into a density: dequantisation and the logit, each with its log-det.

A density of transformed data y = g(x) is a density of x through log p(x) = log p(y) + log|det dy/dx|. The helpers
return that last term per row, so that values in nats (or bits) are those of the data as it came.

References:
    Lucas Theis, Aaron van den Oord, Matthias Bethge. A note on the evaluation of generative models. ICLR 2016
    (uniform dequantisation bounds the log-probability of the discrete data from below).

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density estimation using Real NVP. ICLR 2017 (the logit).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flowkit.ops.checks import check_floating

MIN_CELL = 1 / 8  # the spacing of numbers near 1, in units of a cell: eight to a cell at least


def dequantize(
    counts: Tensor, levels: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Add uniform noise to integers and scale to (0, 1): ``u = (counts + U[0, 1)) / levels``.

    Args:
        counts: integers 0 to ``levels - 1``, of any dtype, shape ``(*batch, D)``.
        levels: number of distinct values, at least 2.
        generator: source of the noise.

    Returns:
        ``u`` of shape ``(*batch, D)`` in the default dtype (or that of ``counts``, if floating, and at least float32),
        and log|det du/dx| (nats) on the scale of the integers, ``-D log(levels)``, shape ``(*batch,)``.

    Raises:
        ValueError: if values are no integers or out of range, or the cells of so many levels are too small for the
            dtype.

    Example:
        >>> import torch
        >>> from pyro_flowkit import dequantize
        >>> u, log_det = dequantize(torch.tensor([[0, 1, 15]]), levels=16)
        >>> bool(((u >= 0) & (u < 1)).all()), log_det
        (True, tensor([-8.3178]))
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"Expected levels to be an integer >= 2, got {levels!r}.")
    if counts.dim() < 1:
        raise ValueError(f"Expected counts of shape (*batch, D), got shape {tuple(counts.shape)}.")
    x = counts if counts.is_floating_point() else counts.to(torch.get_default_dtype())
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    most = int(MIN_CELL / torch.finfo(x.dtype).eps)
    if levels > most:
        raise ValueError(
            f"Expected at most {most} levels in {x.dtype}, whose numbers leave no room for noise in smaller cells, got "
            f"{levels}: use float64."
        )
    if x.numel() and not bool(((x >= 0) & (x <= levels - 1) & (x == x.round())).all()):
        raise ValueError(
            f"Expected integers from 0 to {levels - 1}, got values from {x.min():g} to {x.max():g}"
            + (" that are not all whole." if bool((x != x.round()).any()) else ".")
        )
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    # the sum may round up to the next integer; stay inside the cell
    u = torch.minimum((x + noise) / levels, (x + 1.0) / levels * (1.0 - torch.finfo(x.dtype).eps))
    return u, x.new_full(x.shape[:-1], -x.shape[-1] * math.log(levels))


def logit(u: Tensor, *, alpha: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Map (0, 1) to the line: ``y = log(s / (1 - s))`` with ``s = alpha + (1 - 2 alpha) u``.

    Args:
        u: values in [0, 1], shape ``(*batch, D)``.
        alpha: keeps the ends of the interval finite, in [0, 1/2).

    Returns:
        ``y``, and log|det dy/du| (nats), shape ``(*batch,)``.

    Raises:
        ValueError: if ``alpha`` is out of range, or a value is outside [0, 1] or NaN.

    Example:
        >>> import torch
        >>> from pyro_flowkit import logit
        >>> y, log_det = logit(torch.tensor([0.5, 0.75]))
        >>> y, log_det
        (tensor([0.0000, 1.0986]), tensor(3.0603))
    """
    _check_alpha(alpha)
    if u.numel() and not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"Expected values in [0, 1], got values from {u.min():g} to {u.max():g}.")
    s = alpha + (1.0 - 2.0 * alpha) * u
    log_s, log_rest = s.log(), torch.log1p(-s)
    ladj = (math.log1p(-2.0 * alpha) - log_s - log_rest).sum(-1)
    return log_s - log_rest, ladj


def inverse_logit(y: Tensor, *, alpha: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Undo :func:`logit`; returns ``u`` and log|det du/dy| (nats).

    Raises:
        ValueError: if ``alpha`` is out of range, or ``y`` not in floating point.

    Example:
        >>> import torch
        >>> from pyro_flowkit import inverse_logit
        >>> inverse_logit(torch.tensor([0.0]))[0]
        tensor([0.5000])
    """
    _check_alpha(alpha)
    check_floating(y, "y")
    log_s, log_rest = torch.nn.functional.logsigmoid(y), torch.nn.functional.logsigmoid(-y)
    u = (log_s.exp() - alpha) / (1.0 - 2.0 * alpha)
    return u, (log_s + log_rest - math.log1p(-2.0 * alpha)).sum(-1)


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha < 0.5:
        raise ValueError(f"Expected alpha in [0, 0.5), got {alpha!r}.")


def as_tensor(data: Any, name: str = "data") -> Any:
    """An array, or a frame or a series of pandas, as a tensor; anything else is given back as it is.

    Raises:
        TypeError: if it holds no numbers.
    """
    if hasattr(data, "dtypes") and hasattr(data, "to_numpy"):  # of pandas
        frame = data.to_frame() if data.ndim == 1 else data
        text = [
            str(column)
            for column, dtype in frame.dtypes.items()
            if not (isinstance(dtype, np.dtype) and dtype.kind in "biuf")
        ]
        if text:
            raise TypeError(
                f"Expected {name} with columns of numbers, got others: {', '.join(text)}"
            )
        data = data.to_numpy()
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "biuf":
            raise TypeError(f"Expected {name} to hold numbers, got an array of {data.dtype}")
        return torch.from_numpy(np.ascontiguousarray(data).copy())
    return data
