r"""The rational-quadratic spline alone: fused kernel and PyTorch reference, time and accuracy.

Time is CPU nanoseconds of one spline evaluation (one scalar with a parameter vector of its own) out of many, forward
and inverse, without and with the gradient with respect to inputs and parameters; and CPU microseconds of a call with
very few evaluations, where only the way through PyTorch counts.

Accuracy is the error of float32 against the reference in float64 at the same float32 inputs and parameters, at random
points in and beyond the box and at knots. Steep splines make it large however they are computed. Gradients are taken
further than 1e-4 from a knot: the second derivative jumps there, and rounding decides on the side.

    python -m benchmarks.spline_kernel
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from models._measure import Report, Timing, cpu_times, number, table
from pyro_flowkit import ops
from pyro_flowkit.ops.settings import MIN_BIN_HEIGHT, MIN_BIN_WIDTH

BOUND = 3.0
EVALUATIONS = 16_384
FEW_EVALUATIONS = 8
SCALES = (0.1, 1.0, 5.0, 20.0)
KNOT_DISTANCE = 1e-4
DIRECTIONS = {
    "forward": ops.rational_quadratic_forward,
    "inverse": ops.rational_quadratic_inverse,
}
BACKENDS: dict[str, Callable[[], Any]] = {"fused": nullcontext, "reference": ops.use_reference}


@dataclass(frozen=True)
class Spline:
    """A kind of spline."""

    count_bins: int = 8
    tails: ops.Tails = "linear"
    dtype: torch.dtype = torch.float32

    @property
    def settings(self) -> dict[str, Any]:
        return {"count_bins": self.count_bins, "bound": BOUND, "tails": self.tails}

    @property
    def num_params(self) -> int:
        return ops.num_spline_params(self.count_bins, self.tails)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, K = {self.count_bins}, tails {self.tails}"


SPLINES = (
    Spline(),
    Spline(tails="circular"),
    Spline(tails=None),
    Spline(count_bins=4),
    Spline(count_bins=16),
    Spline(count_bins=32),
    Spline(dtype=torch.float64),
    Spline(count_bins=4, dtype=torch.float64),
    Spline(count_bins=16, dtype=torch.float64),
    Spline(count_bins=32, dtype=torch.float64),
)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    backends = list(BACKENDS) if ops.backend() == "fused" else ["reference"]
    repeats = 3 if args.quick else args.repeats
    splines = SPLINES[:1] if args.quick else SPLINES
    report = Report("The spline alone")
    if "fused" not in backends:
        report.add("Left out: fused (the fused kernel is not in use).", "")
    rounds = f"median of {repeats} interleaved rounds (best in brackets)"
    report.add(
        f"## {args.evaluations} evaluations a call", "", f"CPU ns of an evaluation, {rounds}.", ""
    )
    for gradient in (False, True):
        for direction in DIRECTIONS:
            rows = [
                _row(spline, direction, gradient, backends, args.evaluations, repeats)
                for spline in splines
            ]
            title = f"{direction} + backward" if gradient else direction
            report.add(*table([title, *_columns(backends)], rows), "")
    report.add(f"## {FEW_EVALUATIONS} evaluations a call", "", f"CPU us of a call, {rounds}.", "")
    report.add(*_few(backends, repeats), "")
    report.add(
        "## Accuracy of float32", "", *_accuracy(backends, 256 if args.quick else 10_000), ""
    )
    report.save(args.output)


def make_tasks(
    spline: Spline, direction: str, gradient: bool, backends: Sequence[str], evaluations: int
) -> dict[str, Callable[[], object]]:
    """The same call on every backend."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=spline.dtype)
    inputs = (1.9 * torch.rand(evaluations, generator=generator, dtype=spline.dtype) - 0.95) * BOUND
    params = draw(evaluations, spline.num_params)
    cotangents = (draw(evaluations), draw(evaluations))
    function = partial(DIRECTIONS[direction], **spline.settings)
    if gradient:
        inputs.requires_grad_()
        params.requires_grad_()

    def call(backend: str) -> object:
        with BACKENDS[backend]():
            outputs = function(inputs, params)
            if gradient:
                return torch.autograd.grad(outputs, (inputs, params), cotangents)
            return outputs

    return {backend: partial(call, backend) for backend in backends}


def _row(
    spline: Spline,
    direction: str,
    gradient: bool,
    backends: Sequence[str],
    evaluations: int,
    repeats: int,
) -> list[str]:
    tasks = make_tasks(spline, direction, gradient, backends, evaluations)
    timings = cpu_times(tasks, repeats=repeats, block_ms=10.0)
    return [str(spline), *_cells(timings, 1e6 / evaluations)]


def _columns(backends: Sequence[str]) -> list[str]:
    return [*backends, "reference / fused"] if "fused" in backends else list(backends)


def _cells(timings: dict[str, Timing], factor: float) -> list[str]:
    cells = [f"{number(t.median * factor)} ({number(t.best * factor)})" for t in timings.values()]
    if "fused" in timings:
        cells.append(f"{timings['reference'].times(timings['fused']):.1f}")
    return cells


def _few(backends: Sequence[str], repeats: int) -> list[str]:
    rows = []
    for gradient in (False, True):
        for direction in DIRECTIONS:
            tasks = make_tasks(Spline(), direction, gradient, backends, FEW_EVALUATIONS)
            timings = cpu_times(tasks, repeats=repeats, block_ms=5.0)
            name = f"{direction} + backward" if gradient else direction
            rows.append([name, *_cells(timings, 1e3)])
    return table([str(Spline()), *_columns(backends)], rows)


def _accuracy(backends: Sequence[str], points: int) -> list[str]:
    header = ["", *(f"{name}: {b}" for name in ERRORS for b in backends)]
    rows = []
    for tails in ("linear", "circular", None):
        for direction in DIRECTIONS:
            for scale in SCALES:
                found = errors(Spline(tails=tails), direction, scale, backends, points)
                cells = [_error(found[b][name]) for name in ERRORS for b in backends]
                rows.append([f"tails {tails}, {direction}, parameters {scale:g} N(0, 1)", *cells])
    return [f"Largest of {points} (99 % are below).", "", *table(header, rows)]


def _error(error: Tensor) -> str:
    return f"{error.max():.1e} ({error.quantile(0.99):.1e})"


ERRORS = (
    "value",
    "log-det",
    "d/d inputs",
    "d/d params",
    "value at knots",
    "log-det at knots",
)


def errors(
    spline: Spline, direction: str, scale: float, backends: Sequence[str], points: int
) -> dict[str, dict[str, Tensor]]:
    """Absolute errors of float32 against the reference in float64, by backend and quantity, shape ``(points,)``."""
    generator = torch.Generator().manual_seed(0)
    params = scale * torch.randn(points, spline.num_params, generator=generator)
    knots = _knots(params.double(), spline, direction)
    reach = 1.0 if spline.tails is None else 1.1
    inputs = (2.0 * torch.rand(points, generator=generator) - 1.0) * reach * BOUND
    which = torch.randint(knots.shape[-1], (points, 1), generator=generator)
    at_knots = knots.gather(-1, which).squeeze(-1).float().clamp(-BOUND, BOUND)
    inside = inputs.double().unsqueeze(-1)
    if spline.tails == "circular":
        inside = (inside + BOUND).remainder(2.0 * BOUND) - BOUND
    clear = (inside - knots).abs().min(-1).values > KNOT_DISTANCE
    cotangents = torch.randn(2, points, generator=generator) * clear
    function = partial(DIRECTIONS[direction], **spline.settings)

    def evaluate(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (inputs, params)]
        outputs = function(*leaves)
        gradients = torch.autograd.grad(outputs, leaves, list(cotangents.to(dtype)))
        there = function(at_knots.to(dtype), params.to(dtype))
        return [t.detach().double() for t in (*outputs, *gradients, *there)]

    with ops.use_reference():
        exact = evaluate(torch.float64)
    found = {}
    for backend in backends:
        with BACKENDS[backend]():
            got = evaluate(torch.float32)
        differences = [(a - b).abs() for a, b in zip(got, exact, strict=True)]
        largest = [e.max(-1).values if e.dim() > 1 else e for e in differences]
        found[backend] = dict(zip(ERRORS, largest, strict=True))
    return found


def _knots(params: Tensor, spline: Spline, direction: str) -> Tensor:
    """Where the bins meet and end, on the axis of the inputs; shape ``(*batch, count_bins + 1)``."""
    widths, heights = params[..., : 2 * spline.count_bins].unflatten(-1, (2, -1)).unbind(-2)
    forward = direction == "forward"
    least = MIN_BIN_WIDTH if forward else MIN_BIN_HEIGHT
    shares = (widths if forward else heights).softmax(-1)
    shares = least + (1.0 - least * spline.count_bins) * shares
    interior = (2.0 * shares[..., :-1].cumsum(-1) - 1.0) * BOUND
    ends = interior.new_tensor([-BOUND, BOUND]).expand(*interior.shape[:-1], 2)
    return torch.cat([interior, ends], dim=-1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spline_kernel",
        description="The spline alone: CPU time and accuracy of the fused kernel and of the reference.",
    )
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="default: 16384")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument("--quick", action="store_true", help="one spline, few rounds: a rehearsal")
    parser.add_argument("--output", default=RESULTS / "spline_kernel.md", help="Markdown file")
    return parser


if __name__ == "__main__":
    main()
