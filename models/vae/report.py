"""What the program says and draws: bounds, the parts of the gap; samples, reconstructions, interpolations."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from models.vae.data import Prepared
from models.vae.model import VAE
from models.vae.training import WARM_UP_START
from pyro_flowkit.diagnostics import (
    compare_densities,
    inference_gaps,
    latent_usage,
    plot_bounds,
    pointwise_bounds,
)
from pyro_flowkit.training import FitResult

FAST_SAMPLES = 50
ELBO_DRAWS = 5
SHOWN = 10


class HasBounds(Protocol):
    """Model and guide of data, and a fast estimate of their ELBO."""

    model: Any
    guide: Any

    def elbo(self, x: Tensor) -> Tensor: ...


def heading(settings: dict[str, Any], prepared: Prepared) -> None:
    """Says which VAE of which data this is, and what was chosen by the data."""
    print(
        f"{_name(settings['prior'], settings['posterior'])}, {prepared.likelihood} likelihood, "
        f"{settings['latent_dim']} latents, on {prepared.data_size} training rows of {prepared.name}: {prepared.unit}"
    )
    if prepared.why:
        print(prepared.why)


def warm_up(share: float) -> None:
    """Says over which share of the training the weight of the KL rises."""
    if share:
        print(f"weight of the KL: {WARM_UP_START} to 1 over {share:.0%} of the training")


def stage(name: str, result: FitResult, cpu_seconds: float) -> None:
    """Says how one stage of the training went."""
    steps = len(result.history["step"])
    validation = result.validation["elbo"]
    best = f", validation {validation.max():.2f} at best" if len(validation) else ""
    skipped = f", {result.skipped_steps} skipped" if result.skipped_steps else ""
    print(
        f"{name}: {steps} steps{skipped}, {cpu_seconds:.0f} CPU s, "
        f"{result.stop_reason}, step {result.best_step} kept{best}"
    )


def bounds(vae: VAE, prepared: Prepared, args: argparse.Namespace) -> xr.Dataset:
    """Prints the ELBO of all test rows, and the ladder of bounds of the first; returns the latter per datum."""
    few = FAST_SAMPLES if args.fast else None
    rows = prepared.test[: args.eval_rows]
    found = pointwise_bounds(
        vae.model, vae.guide, rows, num_samples=few or args.num_samples, seed=args.seed
    )
    name = "VAE"
    table = compare_densities({name: found}).loc[name]
    if len(rows) < len(prepared.test):
        elbo = elbo_of_rows(vae, prepared.test, draws=ELBO_DRAWS, seed=args.seed)
        error = elbo.std() / len(elbo) ** 0.5
        print(f"ELBO of all {len(elbo)} test rows: {elbo.mean():.2f} ({error:.2f}) nats")
    print(f"On {len(rows)} test rows:")
    print("quantity    kind         nats per datum (standard error)  bits per dimension")
    for quantity, row in table.iterrows():
        value = f"{row['nats']:.2f} ({row['se']:.2f})"
        print(f"{quantity:<11} {row['kind']:<12} {value:<32} {row['bits_per_dim']:.3f}")
    tightest = table.iloc[-1]
    print(f"gap, {table.index[-1]} - ELBO: {tightest['gap']:.2f} ({tightest['gap_se']:.2f}) nats")
    return found


def elbo_of_rows(vae: HasBounds, rows: Tensor, *, draws: int, seed: int) -> Tensor:
    """ELBO of every row (nats), the mean over so many draws; shape ``(n,)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        estimates = [
            torch.stack([vae.elbo(few) for _ in range(draws)]).mean(0) for few in rows.split(1000)
        ]
    return torch.cat(estimates)


def gaps(vae: VAE, prepared: Prepared, args: argparse.Namespace) -> None:
    """Prints what the gap is made of, and which latents are in use."""
    samples = FAST_SAMPLES if args.fast else args.num_samples
    parts_of_gap(vae, prepared, num_rows=args.gaps, num_samples=samples, seed=args.seed)
    test = prepared.test[:2000]
    print(latent_usage(vae.model, vae.guide, test, seed=args.seed).attrs["message"])


def parts_of_gap(vae: HasBounds, prepared: Prepared, *, num_rows: int, **options: Any) -> None:
    """Prints what the gap of test rows is made of; the options are those of ``inference_gaps``."""
    rows, known = prepared.test[:num_rows], prepared.reference[:num_rows]
    print(
        f"Of {len(rows)} test rows and as many training rows, whose posteriors are optimised one by one:"
    )
    found = inference_gaps(vae.model, vae.guide, rows, train_data=known, **options)
    print(found.attrs["message"])


def pictures(vae: VAE, prepared: Prepared, found: xr.Dataset, folder: Path) -> None:
    """Saves the ladder of bounds, and for images samples, reconstructions and interpolations, as png files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    plot_bounds({"VAE": found}, ax=figure.subplots())
    figure.savefig(folder / "bounds.png", dpi=130)
    drawn = ["bounds"]
    if prepared.image_shape is not None:
        shape = prepared.image_shape
        for name, rows, labels in (
            ("samples", sample_rows(vae), []),
            ("reconstructions", reconstruction_rows(vae, prepared.test), ["data", "mean"]),
            ("interpolations", interpolation_rows(vae, prepared.test), []),
        ):
            _save_grid(rows, shape, folder / f"{name}.png", labels)
            drawn.append(name)
    print(f"Pictures in {folder}: {', '.join(f'{name}.png' for name in drawn)}")


@torch.no_grad()
def sample_rows(vae: VAE, rows: int = 6) -> Tensor:
    """Means of the data given codes from the prior, shape ``(rows, SHOWN, D)``."""
    return vae.decode(vae.p_z().sample((rows, SHOWN)))


@torch.no_grad()
def reconstruction_rows(vae: VAE, test: Tensor) -> Tensor:
    """Data, and the mean given a code of their posterior, below them; shape ``(2, n, D)``."""
    x = test[:SHOWN]
    return torch.stack([x, vae.decode(vae.q_z(x).sample())])


@torch.no_grad()
def interpolation_rows(vae: VAE, test: Tensor, rows: int = 4) -> Tensor:
    """From one test row to another along a line between codes of their posteriors, shape ``(rows, SHOWN, D)``.

    A line between codes passes where no code has ever been, in the gaps of a standard normal that is too wide. Under a
    flow prior the line is drawn where the prior is a round normal: in the space of its base.
    """
    rows = min(rows, len(test) // 2)
    z = vae.q_z(test[: 2 * rows]).sample()
    layers = [] if vae.prior is None else vae.prior().transforms
    for layer in reversed(layers):
        z = layer.inv(z)
    share = torch.linspace(0.0, 1.0, SHOWN)[:, None]
    line = torch.lerp(z[:rows, None], z[rows:, None], share)
    for layer in layers:
        line = layer(line)
    return vae.decode(line)


def _save_grid(
    rows: Tensor, shape: tuple[int, int], path: Path, labels: Sequence[str] = ()
) -> None:
    from matplotlib.figure import Figure

    height, width = shape
    count, columns = rows.shape[:2]
    images = rows.reshape(count, columns, height, width).numpy()
    picture = images.transpose(0, 2, 1, 3).reshape(count * height, columns * width)
    figure = Figure(figsize=(columns * 0.8, count * 0.8 * height / width), layout="constrained")
    ax = figure.subplots()
    ax.imshow(picture, cmap="gray_r", vmin=0.0, vmax=max(1.0, float(np.max(images))))
    ax.set_xticks([])
    ax.set_yticks([height * (i + 0.5) for i in range(len(labels))], labels)
    figure.savefig(path, dpi=130)


def _name(prior: str, posterior: str) -> str:
    return f"VAE, {prior} prior, {posterior} posterior"
