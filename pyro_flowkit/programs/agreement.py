"""Whether two ways of computing the same densities agree: site by site and element by element, within rounding.

Rounding is what the densities themselves lose when their inputs change in the last digits, so it is measured where the
first look does not suffice; it does not grow with the number of sites, rows or particles.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

ROUNDINGS = 1e3  # units in the last place that a density may lose without a closer look
SENSITIVITY = 20.0  # times as much as it changes when its latents do in the last digits
JITTER = 4.0  # units in the last place
MAX_GRADIENT_GAP = 1e-2  # of the largest derivative: what is looked for is a gradient that is cut, not a last digit

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


def row_disagreement(
    found: Values,
    row: int,
    nesting: int,
    density: Callable[[dict[str, Tensor]], Values],
    latents: dict[str, Tensor],
) -> str | None:
    """Where one of many draws has other densities than in a plain run, as a clause.

    Args:
        found: log-densities of every site, shapes ``(n, *nesting dims)``.
        row: which draw.
        nesting: number of batch dimensions of the program.
        density: the plain run, as a function of the latents.
        latents: of that draw.
    """
    expected = density(latents)
    got = {}
    for name, log_prob in found.items():
        if log_prob.dim() < nesting + 1:
            return f"site {name!r} has one density for all draws"
        of_row = log_prob[row]
        fits = name in expected and of_row.numel() == expected[name].numel()
        got[name] = of_row.reshape(expected[name].shape) if fits else of_row
    return disagreement(expected, got, density, latents)


def gradient_gap(
    alone: Callable[[dict[str, Tensor]], Values],
    at_once: Callable[[dict[str, Tensor]], Values],
    values: Values,
    learned: Iterable[Tensor],
) -> str | None:
    """Which derivative of a recording is another than that of a plain run, as a clause.

    Args:
        alone: the plain run, as a function of the latents.
        at_once: the recording, as a function of many draws of them.
        values: of the latents, ``(n, *batch, *event)``; the first draw is compared.
        learned: the parameters.
    """
    draw = {
        name: value[0].detach().clone().requires_grad_(value.is_floating_point())
        for name, value in values.items()
    }
    leaves = {f"site {name!r}": value for name, value in draw.items() if value.requires_grad}
    leaves |= {f"a parameter of shape {tuple(p.shape)}": p for p in learned}
    with torch.enable_grad():
        wide = {name: value.expand(len(values[name]), *value.shape) for name, value in draw.items()}
        one, all_alike = alone(draw), at_once(wide)
        expected = _gradients([value.sum() for value in one.values()], leaves)
        got = _gradients([value[0].sum() for value in all_alike.values()], leaves)
    for name, derivative in expected.items():
        finite = derivative.isfinite() & got[name].isfinite()
        size = derivative[finite].abs().max() if bool(finite.any()) else 0.0
        gap = (derivative - got[name])[finite].abs()
        if bool((gap > MAX_GRADIENT_GAP * (1e-3 + size)).any()):
            return f"the derivative by {name} is another one in a recording"
    return None


def _gradients(totals: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    total = torch.stack(totals).sum()
    if not total.requires_grad or not leaves:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        total, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


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
