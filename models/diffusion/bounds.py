"""The ELBO of the hierarchical VAE, step by step, without drawing its chain from end to end."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from models.diffusion.model import (
    MAX_LOG_SNR,
    MIN_LOG_SNR,
    Diffusion,
    Step,
    angle_of,
    angles_like,
    level_ratios,
)
from pyro_flowkit.diagnostics.schema import LOWER_BOUND, STANDARD_ERROR, schema_attrs

ROWS_AT_ONCE = 16_384
STRETCHES = 200


@dataclass(frozen=True)
class Terms:
    """The parts of the ELBO of every datum in nats, means over draws of the noise.

    Attributes:
        reconstruction: ``log p(x | z1)``, shape ``(n,)``.
        steps: KL of every step from the data up, of every stretch in the limit, shape ``(n, steps)``.
        top: KL of the last level to the standard normal, shape ``(n,)``.
        mc_error: standard error of the ELBO that comes from the draws, shape ``(n,)``.
        log_snr: ends of the steps, shape ``(steps + 1,)``.
    """

    reconstruction: Tensor
    steps: Tensor
    top: Tensor
    mc_error: Tensor
    log_snr: Tensor

    @property
    def elbo(self) -> Tensor:
        """Shape ``(n,)``."""
        return self.reconstruction - self.steps.sum(-1) - self.top

    def dataset(self, event_size: int) -> xr.Dataset:
        """For ``compare_densities``."""
        return xr.Dataset(
            {
                "elbo": ("obs_id", self.elbo.numpy(), {"kind": LOWER_BOUND, "units": "nats"}),
                "elbo_se": ("obs_id", self.mc_error.numpy(), {"kind": STANDARD_ERROR}),
            },
            {"obs_id": np.arange(len(self.top)), "n_particles": [1]},
            schema_attrs(event_size=event_size),
        )


@torch.no_grad()
def elbo_terms(
    diffusion: Diffusion,
    x: Tensor,
    num_levels: int | None,
    *,
    fitted_scales: bool = True,
    draws: int = 2,
) -> Terms:
    """The ELBO of the hierarchical VAE with so many levels, or its limit for ever more of them.

    Each term depends on a single level, which is normal given the datum: no chain is drawn.

    Args:
        diffusion: the model, in eval mode.
        x: data, shape ``(n, D)``.
        num_levels: None is the limit, where KL and scales no longer matter: the integral of half the squared error of
            v times cos^2 over the log signal to noise ratio, at a random place in each of 200 stretches.
        fitted_scales: as for :meth:`Diffusion.model`.
        draws: of the noise for each datum and level, at least 2.

    Raises:
        ValueError: for fewer than 2 draws or levels.
    """
    if draws < 2:
        raise ValueError(f"Expected at least 2 draws, got {draws}")
    log_snr = level_ratios(num_levels or STRETCHES + 1).to(x)
    x, ladj = diffusion.standardization.inverse_and_ladj(x)
    found = []
    for _ in range(draws):
        if num_levels is None:
            steps = _stretches(diffusion, x, log_snr)
        else:
            steps = _steps(diffusion, x, log_snr, fitted_scales)
        found.append((_reconstruction(diffusion, x), steps))
    reconstruction = torch.stack([of_x for of_x, _ in found]).double()
    steps = torch.stack([of_steps for _, of_steps in found]).double()
    totals = reconstruction - steps.sum(-1)
    signal = float(angle_of(log_snr[-1]).cos().square())
    excess = signal * (x.double().square() - 1.0) - math.log1p(-signal)
    return Terms(
        reconstruction.mean(0) + ladj,
        steps.mean(0),
        0.5 * excess.sum(-1),
        (totals.var(0) / draws).sqrt(),
        log_snr,
    )


def _reconstruction(diffusion: Diffusion, x: Tensor) -> Tensor:
    """``log p(x | z1)`` of standardised data: a normal around what is denoised, of the scale of the noise."""
    angle = float(angle_of(torch.tensor(MAX_LOG_SNR)))
    missed = diffusion.missed(x, angles_like(angle, x))  # x is missed by sin(angle) times that
    return (-0.5 * missed - 0.5 * math.log(2 * math.pi) - math.log(math.sin(angle))).sum(-1)


def _steps(diffusion: Diffusion, x: Tensor, log_snr: Tensor, fitted_scales: bool) -> Tensor:
    """KL of two normals for every step, whose means differ as datum and denoised point do; shape ``(n, steps)``."""
    upper = log_snr[1:].unsqueeze(-1)
    step = Step(log_snr[:-1].unsqueeze(-1), upper)
    spread = diffusion.spread_at(log_snr[1:]) if fitted_scales else x.new_zeros(())
    variance = step.variance(spread)
    ratio = step.known_variance / variance
    apart = (step.of_x * step.upper_angle.sin()).square() / variance
    fixed = 0.5 * (ratio - 1.0 - ratio.log()).expand(len(upper), x.shape[-1]).sum(-1)
    return fixed + 0.5 * _weighted(diffusion, x, log_snr[1:].expand(len(x), -1), apart)


def _stretches(diffusion: Diffusion, x: Tensor, log_snr: Tensor) -> Tensor:
    size = (MAX_LOG_SNR - MIN_LOG_SNR) / (len(log_snr) - 1)
    place = log_snr[1:] + size * torch.rand(len(x), len(log_snr) - 1).to(x)
    cosines = angle_of(place).cos().square()
    every = x.new_ones(len(log_snr) - 1, 1)
    return 0.5 * size * cosines * _weighted(diffusion, x, place, every)


def _weighted(diffusion: Diffusion, x: Tensor, log_snr: Tensor, weights: Tensor) -> Tensor:
    """Squared errors of v at ratios of shape ``(n, steps)``, with weights ``(steps, D or 1)``; shape ``(n, steps)``."""
    size = max(1, ROWS_AT_ONCE // len(x))
    found = []
    for start in range(0, log_snr.shape[1], size):
        part = slice(start, start + size)
        angles = angle_of(log_snr[:, part]).unsqueeze(-1)
        rows = x.unsqueeze(1).expand(-1, angles.shape[1], -1)
        found.append((diffusion.missed(rows, angles) * weights[part]).sum(-1))
    return torch.cat(found, -1)
