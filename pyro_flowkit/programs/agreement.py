"""Whether two ways of computing the same densities agree: site by site and element by element, within rounding.

Rounding is what the densities themselves lose when their inputs change in the last digits, so it is measured where the
first look does not suffice; it does not grow with the number of sites, rows or particles.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ROUNDINGS = 1e3  # units in the last place that a density may lose without a closer look
SENSITIVITY = 20.0  # times as much as it changes when its latents do in the last digits
JITTER = 4.0  # units in the last place

Values = Mapping[str, Tensor]


def disagreement(
    alone: Values, other: Values, density: Callable[[dict[str, Tensor]], Values], latents: Values
) -> str | None:
    """What is wrong with the other way, as a clause; None if nothing is.

    Args:
        alone: log-densities of every site by a plain run of the program, in nats.
        other: the same by the other way.
        density: the plain run, as a function of the latents.
        latents: where they were computed.
    """
    if alone.keys() != other.keys():
        missing, extra = sorted(alone.keys() - other.keys()), sorted(other.keys() - alone.keys())
        return f"its sites change: {missing or extra} {'are missing' if missing else 'are new'}"
    suspects = []
    for name, expected in alone.items():
        got = other[name]
        if got.shape != expected.shape:
            return (
                f"site {name!r} has densities of shape {tuple(got.shape)} instead of {tuple(expected.shape)} for one "
                "draw"
            )
        if not _close(expected, got, _tolerance(expected)):
            suspects.append(name)
    if not suspects:
        return None
    changes = _sensitivity(alone, density, latents)
    for name in suspects:
        expected, got = alone[name], other[name]
        tolerance = _tolerance(expected) + SENSITIVITY * changes[name]
        if not _close(expected, got, tolerance):
            gap = (expected - got).abs().reshape(-1)
            at = int(gap.nan_to_num(nan=torch.inf).argmax()) if gap.numel() else 0
            return (
                f"site {name!r} has another log-density, {float(got.reshape(-1)[at]):.6g} instead of "
                f"{float(expected.reshape(-1)[at]):.6g}"
            )
    return None


def _tolerance(expected: Tensor) -> Tensor:
    size = torch.where(expected.isfinite(), expected.abs(), 0.0)
    return ROUNDINGS * torch.finfo(expected.dtype).eps * (1.0 + size)


def _close(expected: Tensor, got: Tensor, tolerance: Tensor) -> bool:
    same = (expected == got) | (expected.isnan() & got.isnan())
    return bool((same | ((expected - got).abs() <= tolerance)).all())


def _sensitivity(
    alone: Values, density: Callable[[dict[str, Tensor]], Values], latents: Values
) -> dict[str, Tensor]:
    """How far each density moves when the latents move in their last digits."""
    found = {name: torch.zeros_like(value) for name, value in alone.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        moved = {name: _jittered(value, generator) for name, value in latents.items()}
        for name, value in density(moved).items():
            if name in found and value.shape == found[name].shape:
                change = (value - alone[name]).abs().nan_to_num(posinf=0.0)
                found[name] = torch.maximum(found[name], change)
    return found


def _jittered(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    sign = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
    return value * (1 + JITTER * torch.finfo(value.dtype).eps * sign)
