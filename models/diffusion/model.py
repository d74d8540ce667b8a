"""One network as a Markovian hierarchical VAE (model and guide) and as a continuous flow."""

import math
from collections.abc import Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit import ContinuousFlow
from pyro_flowkit.nn import ResidualNetwork

MAX_LOG_SNR, MIN_LOG_SNR = 10.0, -10.0
GRID = 41
NUM_WAVES, OWN_WIDTH = 7, 16
SMALL_ANGLE = 0.05
RATE = math.log(1.0 + math.pi / 2 / SMALL_ANGLE)
"""Angles go by their difference below the small one, by their ratio above it: for network and solver."""


class AngleField(nn.Module):
    """The network: what it expects v to be, given a noisy point and the angle of the noise; zero at first.

    A residual network of the whole point, and for each coordinate a small one of its own, which no dropout touches:
    marginals have edges, such as those of the noise that makes pixels continuous.

    Args:
        input_dim: size D of a point.
        hidden_dims: one width, repeated for each residual block.
        dropout: probability of dropping a hidden unit while training.

    Shapes: ``(*batch, D)`` and angles ``(*batch, 1)`` between 0 and pi/2 to ``(*batch, D)``.
    """

    def __init__(self, input_dim: int, hidden_dims: Sequence[int], *, dropout: float = 0.0):
        super().__init__()
        self.network = ResidualNetwork(
            input_dim,
            input_dim,
            hidden_dims,
            context_dim=NUM_WAVES,
            activation=nn.SiLU,
            dropout=dropout,
        )
        self.of_angle = nn.Linear(NUM_WAVES, input_dim * OWN_WIDTH)
        self.of_coordinate = nn.Parameter(3.0 * torch.randn(input_dim, OWN_WIDTH))
        self.own_output = nn.Parameter(torch.zeros(input_dim, OWN_WIDTH))

    def forward(self, z: Tensor, angle: Tensor) -> Tensor:
        waves = [w for k in (1, 2, 4) for w in ((k * angle).cos(), (k * angle).sin())]
        seen = torch.cat([*waves, (angle.sin() + SMALL_ANGLE).log()], dim=-1)
        own = self.of_angle(seen).unflatten(-1, (-1, OWN_WIDTH))
        own = F.silu(z.unsqueeze(-1) * self.of_coordinate + own)
        return self.network(z, seen) + (own * self.own_output).sum(-1)


class ProbabilityFlow(nn.Module):
    """The velocity field of the probability-flow equation, from noise at t = 0 to data at t = 1.

    Where the noise is small the field is bent most, so that time slows down there: see :func:`angle_at`.

    Args:
        field: a module ``(z, angle)`` to the expected v.
    """

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        angle = angle_at(t)
        return -RATE * (angle + SMALL_ANGLE) * self.field(x, angle)


class StraightFlow(nn.Module):
    """The same network as the velocity of flow matching along straight lines.

    Args:
        field: as for :class:`ProbabilityFlow`.
    """

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return self.field(x, math.pi / 2 * (1.0 - t))


class Diffusion(ContinuousFlow):
    """A variance-preserving diffusion; see the package's docstring for its equations.

    It is a :class:`ContinuousFlow`, whose ``log_prob`` and ``sample`` are those of the probability-flow equation, and
    which ``fit(diffusion, data=x)`` trains, by matching v. ``model`` and ``guide`` are the hierarchical VAE.

    Args:
        input_dim: size D of the data.
        field: a module ``(z, angle)`` to v, for standardised data, for example an :class:`AngleField`.
        num_steps: of the solver of the flow's equation.
        small_angles: have training see small angles more often, as the integral of the ELBO weighs them, instead of all
            alike: for the bound's sake, not the flow's.

    Attributes:
        spread: buffer of shape ``(41, D)``, for log signal to noise ratios from -10 to 10: the variance of a datum
            given a noisy point, as a multiple of that of the noise. Ones are right for a standard normal.
    """

    spread: Tensor

    def __init__(
        self,
        input_dim: int,
        field: nn.Module,
        *,
        num_steps: int = 32,
        small_angles: bool = False,
    ):
        super().__init__(input_dim, velocity=ProbabilityFlow(field), num_steps=num_steps)
        self.small_angles = small_angles
        self.register_buffer("spread", torch.ones(GRID, input_dim))

    def field(self, z: Tensor, angle: Tensor) -> Tensor:
        """What the network expects v to be, given z of shape ``(*batch, D)`` and angles ``(*batch, 1)``."""
        velocity: Any = self.ode.velocity
        return velocity.field(z, angle)

    def denoised(self, z: Tensor, angle: Tensor) -> Tensor:
        """What the network expects the (standardised) datum to be."""
        return angle.cos() * z - angle.sin() * self.field(z, angle)

    def missed(self, x: Tensor, angle: Tensor) -> Tensor:
        """The squared error of v for a draw of the noise, shape ``(*batch, D)``.

        Args:
            x: standardised data, shape ``(*batch, D)``.
            angle: shape ``(*batch, 1)``.
        """
        noise = torch.randn_like(x)
        z = angle.cos() * x + angle.sin() * noise
        v = angle.cos() * noise - angle.sin() * x
        return (self.field(z, angle) - v).square()

    def matching_loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The squared error of v, a mean over the dimensions, at an angle drawn for each row, shape ``(n,)``.

        Uniform ones are flow matching along the arc. The integral of the ELBO weighs small ones more; a flow suffers
        more from what is missed at large ones, which it carries all the way.
        """
        self.sync_with_store(lend=False)
        with torch.no_grad():
            x, _ = self.standardization.inverse_and_ladj(x)
            # of all parts of the way there is one in every batch
            share = torch.arange(len(x), dtype=x.dtype, device=x.device).div(max(len(x), 1))
            share = (share + torch.rand((), dtype=x.dtype, device=x.device)) % 1.0
            share = share.unsqueeze(-1)
            angle = angle_at(share) if self.small_angles else math.pi / 2 * share
        return self.missed(x, angle).mean(-1)

    @torch.no_grad()
    def fit_scales(self, x: Tensor, *, draws: int = 4) -> Self:
        """Take ``spread`` from data, shape ``(n, D)``: then no other normal steps of these means fit them better.

        (Bao, Li, Zhu and Zhang 2022.)
        """
        x, _ = self.standardization.inverse_and_ladj(x)
        for i, angle in enumerate(
            angle_of(torch.linspace(MIN_LOG_SNR, MAX_LOG_SNR, GRID)).tolist()
        ):
            errors = [self.missed(x, angles_like(angle, x)).mean(0) for _ in range(draws)]
            self.spread[i] = torch.stack(errors).mean(0)
        return self

    def spread_at(self, log_snr: Tensor) -> Tensor:
        """``spread`` at log signal to noise ratios of shape ``(*batch,)``, shape ``(*batch, D)``."""
        place = (log_snr - MIN_LOG_SNR) / (MAX_LOG_SNR - MIN_LOG_SNR) * (GRID - 1)
        below = place.floor().clamp(0, GRID - 2)
        share = (place - below).unsqueeze(-1)
        index = below.long()
        return (1 - share) * self.spread[index] + share * self.spread[index + 1]

    def model(self, x: Tensor, num_levels: int = 10, fitted_scales: bool = True) -> None:
        """The generative model of the hierarchical VAE: from noise down to the data, site by site.

        Args:
            x: data, shape ``(n, D)``.
            num_levels: of latents.
            fitted_scales: whether the steps' scales know that the datum is not known (``spread``); False gives them
                those of the inference model (Kingma et al. 2021).
        """
        log_snr = level_ratios(num_levels).to(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{num_levels}", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            for level in range(num_levels - 1, 0, -1):
                upper = log_snr[level]
                step = Step(log_snr[level - 1], upper)
                spread = self.spread_at(upper) if fitted_scales else torch.zeros(())
                datum = self.denoised(z, angles_like(float(angle_of(upper)), z))
                normal = dist.Normal(step.mean(z, datum), step.variance(spread).sqrt())
                z = pyro.sample(f"z{level}", normal.to_event(1))
            first = float(angle_of(log_snr[0]))
            base = dist.Normal(self.denoised(z, angles_like(first, z)), math.sin(first)).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [self.standardization]), obs=x)

    def guide(self, x: Tensor, num_levels: int = 10, fitted_scales: bool = True) -> None:
        """The inference model: noise is added to the data. It has no parameters, and the scales are no matter of it."""
        log_snr = level_ratios(num_levels).to(x)
        x, _ = self.standardization.inverse_and_ladj(x)
        with pyro.plate("data", len(x)):
            top = angle_of(log_snr[-1])
            z = pyro.sample(f"z{num_levels}", dist.Normal(top.cos() * x, top.sin()).to_event(1))
            for level in range(num_levels - 1, 0, -1):
                step = Step(log_snr[level - 1], log_snr[level])
                normal = dist.Normal(step.mean(z, x), step.variance(torch.zeros(())).sqrt())
                z = pyro.sample(f"z{level}", normal.to_event(1))


class Step:
    """The level of the log signal to noise ratio ``lower``, given the next one, of ``upper``, and the datum.

    (Kingma et al. 2021, equations 25 to 33.)

    Args:
        lower, upper: of one shape, ``upper`` the noisier and thus the smaller one.
    """

    def __init__(self, lower: Tensor, upper: Tensor):
        lower_angle, self.upper_angle = angle_of(lower), angle_of(upper)
        self.remains = (upper - lower).exp()  # of the ratio
        signal = self.upper_angle.cos() / lower_angle.cos()
        self.of_z = self.remains / signal
        self.of_x = lower_angle.cos() * -torch.expm1(upper - lower)
        self.known_variance = lower_angle.sin().square() * -torch.expm1(upper - lower)

    def mean(self, z: Tensor, x: Tensor) -> Tensor:
        return self.of_z * z + self.of_x * x

    def variance(self, spread: Tensor) -> Tensor:
        """Given z alone, where the datum has the variance ``spread`` times that of the noise; 0 if it is known."""
        return self.known_variance + (self.of_x * self.upper_angle.sin()).square() * spread


def angle_at(time: Tensor) -> Tensor:
    """The angle of a time of the flow: from pi/2 at 0 to 0 at 1, faster where it is large."""
    return SMALL_ANGLE * torch.expm1(RATE * (1.0 - time))


def angle_of(log_snr: Tensor) -> Tensor:
    """The angle whose squared cotangent is the ratio of signal to noise."""
    return (-log_snr / 2).exp().atan()


def level_ratios(num_levels: int) -> Tensor:
    """The log signal to noise ratios of the levels from the data up, in equal steps from 10 to -10.

    Raises:
        ValueError: for fewer than 2 levels.
    """
    if num_levels < 2:
        raise ValueError(f"Expected at least 2 levels, got {num_levels}")
    return torch.linspace(MAX_LOG_SNR, MIN_LOG_SNR, num_levels)


def angles_like(angle: float, z: Tensor) -> Tensor:
    """The angle for each of the points z of shape ``(*batch, D)``, shape ``(*batch, 1)``."""
    return torch.full_like(z[..., :1], angle)
