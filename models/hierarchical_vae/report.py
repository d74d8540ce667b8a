"""What ``python -m models.hierarchical_vae`` prints: bounds, the levels one by one, the difference from a flat VAE."""

from dataclasses import dataclass
from typing import Protocol

import torch
import xarray as xr
from torch import Tensor

from models.vae.data import Prepared
from models.vae.report import ELBO_DRAWS, HasBounds, elbo_of_rows
from pyro_flowkit.diagnostics import (
    compare_densities,
    latent_usage,
    pointwise_bounds,
)

USAGE_ROWS = 1000
USAGE_DRAWS = 50


class HasLevels(HasBounds, Protocol):
    def elbo_terms(self, x: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Found:
    """What was found of one VAE.

    Attributes:
        elbo: of all test rows (nats), shape ``(n,)``.
        bounds: ``pointwise_bounds`` of the first of them.
    """

    elbo: Tensor
    bounds: xr.Dataset

    @property
    def iwae(self) -> Tensor:
        """The tightest bound of the first rows (nats)."""
        return torch.from_numpy(self.bounds["iwae"].isel(n_particles=-1).to_numpy())


def bounds(
    vae: HasBounds, prepared: Prepared, *, num_rows: int, num_samples: int, seed: int
) -> Found:
    """Prints the ELBO of all test rows, and the ladder of bounds of the first."""
    elbo = elbo_of_rows(vae, prepared.test, draws=ELBO_DRAWS, seed=seed)
    rows = prepared.test[:num_rows]
    found = pointwise_bounds(vae.model, vae.guide, rows, num_samples=num_samples, seed=seed)
    print(f"ELBO of all {len(elbo)} test rows: {_with_error(elbo)} nats")
    print(f"On {len(rows)} test rows:")
    print("quantity    kind         nats per datum (standard error)")
    for quantity, row in compare_densities({"VAE": found}).loc["VAE"].iterrows():
        print(f"{quantity:<11} {row['kind']:<12} {row['nats']:.2f} ({row['se']:.2f})")
    return Found(elbo, found)


def levels(vae: HasLevels, prepared: Prepared, *, seed: int) -> None:
    """Prints of each level, from the top down, its KL and along how many directions it varies with the data."""
    rows = prepared.test[:USAGE_ROWS]
    usage = latent_usage(vae.model, vae.guide, rows, num_samples=USAGE_DRAWS, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draws = [vae.elbo_terms(rows) for _ in range(ELBO_DRAWS)]
    print(f"Levels, on {len(rows)} test rows:")
    print("level  latents  active directions  KL in nats per datum (standard error)")
    for site in usage["site"].to_numpy():
        own = usage.sel(site=site)
        kl = torch.stack([terms[site] for terms in draws]).mean(0)
        size, active = int(own["num_directions"]), int(own["active_directions"])
        print(f"{site:<6} {size:<8} {active:<18} {_with_error(kl)}")
    print(usage.attrs["message"])


def difference(found: Found, flat: Found) -> None:
    """Prints by how much the bounds of the hierarchical VAE are above those of the flat one, paired over images."""
    particles = int(found.bounds["n_particles"][-1])
    print("Hierarchical less flat, in nats per datum (paired standard error over data):")
    print(f"ELBO, {len(found.elbo)} test rows: {_with_error(found.elbo - flat.elbo, '+')}")
    print(
        f"IWAE-{particles}, {len(found.iwae)} test rows: {_with_error(found.iwae - flat.iwae, '+')}"
    )


def _with_error(values: Tensor, sign: str = "") -> str:
    """Mean and its standard error."""
    return f"{float(values.mean()):{sign}.2f} ({float(values.std()) / len(values) ** 0.5:.2f})"
