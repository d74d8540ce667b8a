r"""What the diagnostics per datum cost: pareto k, bounds, the split of the gap, and the use of the latents.

Pareto k is fitted for 1,000 data with 1,000 draws each, to weights with a light and with a heavy tail. The other
diagnostics look at VAEs of binary images of 784 pixels (scikit-learn's handwritten digits, enlarged), trained for a
short while with a normal posterior and with a flow. Seconds are those of the CPU on one thread; memory is the highest
resident size while the diagnostic runs beyond that before it.

    python -m benchmarks.diagnostics
    python -m benchmarks.diagnostics --quick
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from benchmarks import RESULTS
from models import data
from models._measure import Report, cpu_times, number, table
from models.vae import VAE, train
from pyro_flowkit.diagnostics import inference_gaps, latent_usage, pointwise_bounds, psis

SIDE = 28
TAILS = {"light tail (pareto k about 0.3)": 3.0, "heavy tail (pareto k about 0.9)": 1.1}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    rows, samples, steps = (50, 100, 20) if args.quick else (args.data, args.samples, args.steps)
    report = Report("Diagnostics per datum")
    report.add("## Pareto k", "", f"{rows} data with {samples} draws each.", "")
    report.add(*_pareto_k(rows, samples, repeats=3 if args.quick else 7), "")
    for posterior in ("normal", "flow"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        images = digits()
        held_out = images[-rows:]
        vae = VAE(
            SIDE**2,
            data_size=len(images) - rows,
            latent_dim=8,
            posterior=posterior,
            likelihood="bernoulli",
        )
        train(vae, images[:-rows], held_out, steps=steps, progress=False)
        report.add(f"## A VAE with a {posterior} posterior", "", *_vae(vae, held_out, samples), "")
    report.save(args.output)


def digits() -> Tensor:
    """Binary images of 28 x 28 pixels, flat, in random order, shape ``(1797, 784)``."""
    small = data.digits()
    levels = torch.cat([small.train, small.val, small.test]).reshape(-1, 1, 8, 8)
    large = F.interpolate(levels, size=(SIDE, SIDE), mode="bilinear").flatten(1)
    large = large[torch.randperm(len(large))]
    return (large > 8.0).float()


def _pareto_k(rows: int, samples: int, repeats: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, samples, generator=generator, dtype=torch.float64)
    weights = {name: -uniform.log() / alpha for name, alpha in TAILS.items()}
    tasks: dict[str, Callable[[], object]] = {
        name: (lambda log_weights=log_weights: psis(log_weights))
        for name, log_weights in weights.items()
    }
    timings = cpu_times(tasks, repeats=repeats, calls=1)
    cells = [
        [name, number(timing.median / 1e3), number(timing.best / 1e3), f"{median:.2f}"]
        for name, timing in timings.items()
        for median in [float(psis(weights[name])[1].median())]
    ]
    return table(["`psis`", "CPU seconds", "best of rounds", "median pareto k"], cells)


def _vae(vae: VAE, held_out: Tensor, samples: int) -> list[str]:
    programs = (vae.model, vae.guide)
    few = held_out[: max(1, len(held_out) // 4)]
    calls: dict[str, Callable[[], xr.Dataset]] = {
        f"`pointwise_bounds`, {len(few)} data x {samples} draws": lambda: pointwise_bounds(
            *programs, few, num_samples=samples, seed=0
        ),
        f"`pointwise_bounds`, {len(held_out)} x {samples}": lambda: pointwise_bounds(
            *programs, held_out, num_samples=samples, seed=0
        ),
        f"`latent_usage`, {len(held_out)} data": lambda: latent_usage(*programs, held_out, seed=0),
        f"`inference_gaps`, {len(few)} data": lambda: inference_gaps(*programs, few, seed=0),
    }
    cells, found = [], []
    for name, call in calls.items():
        result, seconds, megabytes = _measured(call)
        cells.append([name, number(seconds), megabytes])
        found.append(result)
    bounds, usage, gaps = found[1], found[2], found[3]
    tightest = bounds["iwae"].isel(n_particles=-1)
    return [
        *table(["", "CPU seconds", "MiB"], cells),
        "",
        f"- ELBO {float(bounds['elbo'].mean()):.2f}, IWAE-{samples} {float(tightest.mean()):.2f} nats per datum",
        f"- {gaps.attrs['message']}",
        f"- {usage.attrs['message']}",
    ]


def _measured(call: Callable[[], Any]) -> tuple[Any, float, str]:
    """Result, CPU seconds and the rise of the resident size."""
    before = _status("VmRSS", reset=True)
    start = time.process_time()
    result = call()
    seconds = time.process_time() - start
    peak = _status("VmHWM")
    known = before is not None and peak is not None
    return result, seconds, f"{(peak - before) / 1024:.0f}" if known else "unknown"  # type: ignore[operator]


def _status(key: str, *, reset: bool = False) -> int | None:
    """A memory figure of this process in KiB, on Linux; ``reset`` lets the highest one begin anew."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.diagnostics",
        description="CPU time and memory of the diagnostics per datum.",
    )
    parser.add_argument("--data", type=int, default=1000, help="data to diagnose (default: 1000)")
    parser.add_argument("--samples", type=int, default=1000, help="draws per datum (default: 1000)")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: 300)")
    parser.add_argument("--quick", action="store_true", help="few data, draws and steps")
    parser.add_argument("--output", default=RESULTS / "diagnostics.md", help="Markdown file")
    return parser


if __name__ == "__main__":
    main()
