"""Inputs for the fused kernel, and what it computes from them, with derivatives: by the kernel or by the reference."""

import contextlib
import math

import torch

from pyro_flowkit.ops import (
    Columns,
    SplineSettings,
    num_spline_params,
    rational_quadratic_forward,
    rational_quadratic_inverse,
    use_reference,
)

TAILS = ["linear", "circular", None]
BINS = [1, 2, 8, 13]
BOUND = 3.0

# Every way to share out five columns; the rest passes through.
COLUMNS = {
    "own": Columns(5, own=(0, 1, 2, 3, 4)),
    "own and rest": Columns(5, own=(3, 1)),
    "shared": Columns(5, (), shared=(0, 1, 2, 3, 4)),
    "shared and rest": Columns(5, (), shared=(4, 0, 2)),
    "all three": Columns(5, own=(3, 0), shared=(4, 1)),
    "rest": Columns(5, ()),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_params(*shape, count_bins, tails, scale=1.0, seed=0, dtype=torch.float64):
    size = (*shape, num_spline_params(count_bins, tails))
    return scale * torch.randn(size, generator=generator(seed), dtype=dtype)


def points(count, seed=0, dtype=torch.float64):
    """Points within the box and a little beyond it."""
    return 8.0 * torch.rand(count, generator=generator(seed), dtype=dtype) - 4.0


def edges(dtype=torch.float64):
    """The bounds, their neighbours, and points far outside."""
    bound = torch.tensor(BOUND, dtype=dtype)
    beside = [torch.nextafter(bound, far) for far in (bound - 1, bound + 1)]
    special = torch.stack([bound, *beside, torch.zeros_like(bound)])
    far = torch.tensor([3.5, 9.0, 1000.25, 1e6, 1e19, math.inf], dtype=dtype)
    both = torch.cat([special, far])
    return torch.cat([both, -both])


def evaluate(x, params, *, count_bins, tails, inverse):
    """The spline element by element."""
    function = rational_quadratic_inverse if inverse else rational_quadratic_forward
    return function(x, params, count_bins=count_bins, bound=BOUND, tails=tails)


def settings_of(count_bins, tails):
    return SplineSettings(count_bins, BOUND, tails)


def column_inputs(name, rows, count_bins, tails, *, scale=1.0, seed=0, dtype=torch.float64):
    """Columns, settings and the three tensors for :func:`spline_columns`."""
    columns, settings = COLUMNS[name], settings_of(count_bins, tails)
    x = points(rows * columns.dim, seed, dtype).view(rows, columns.dim)
    if tails is None:
        x = x.clamp(-BOUND, BOUND)
    own = shared = None
    if columns.own:
        own = random_params(
            rows, len(columns.own), count_bins=count_bins, tails=tails, scale=scale, seed=seed + 1
        )
        own = own.flatten(-2).to(dtype)
    if columns.shared:
        shared = random_params(
            len(columns.shared), count_bins=count_bins, tails=tails, scale=scale, seed=seed + 2
        )
        shared = shared.flatten().to(dtype)
    return columns, settings, (x, own, shared)


def with_gradients(function, tensors, *, reference=False, seed=0, weights=(1.0, 1.0), **options):
    """Outputs of ``function(*tensors)``, and the derivatives of a random combination of them.

    ``weights`` scale the incoming derivatives of the two outputs; 0 leaves an output out.
    """
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    with use_reference() if reference else contextlib.nullcontext():
        outputs = function(*leaves, **options)
        loss = 0.0
        for output, weight in zip(outputs, weights, strict=True):
            if weight:
                incoming = torch.randn(
                    output.shape, generator=generator(seed + 7), dtype=torch.float64
                )
                loss = loss + (weight * incoming.float().to(output.dtype) * output).sum()
        found = torch.autograd.grad(loss, [t for t in leaves if t is not None], allow_unused=True)
    return [output.detach() for output in outputs], list(found)


def assert_same(got, want, *, tolerance=1e-11):
    """Equal up to ``tolerance`` of the largest number, and of each; NaN and inf in the same places."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
            continue
        size = b[b.isfinite()].abs()
        largest = max(1.0, size.max().item()) if size.numel() else 1.0
        torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=tolerance, equal_nan=True)
