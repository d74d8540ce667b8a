r"""Along which directions of a latent site posteriors vary with the data, whatever its coordinates are.

With m_i and C_i the mean and the covariance of the posterior of datum i,

    B = Cov_i(m_i),   W = mean_i(C_i),   (B + W)^-1 B v = r v

r is the share of the variance along v that lies between data: 1 where the posterior is sharp, 0 where
it is the same for all data. Any invertible linear map of the latents leaves the r as they are, so
that a rotation, which spreads two directions over all coordinates, hides nothing. They are the
squared canonical correlations of datum and draw (Hotelling 1936).

Means of S draws vary by W / S even where the posterior is the same for all data. That is taken from
their covariance; what is left of it in the largest of D eigenvalues stays, with N data, below

    ((sqrt(N - 2) + sqrt(D))^2 + 3 (sqrt(N - 2) + sqrt(D)) (1 / sqrt(N - 2) + 1 / sqrt(D))^(1/3)) / (N - 1) - 1

over S for Gaussian noise (Johnstone 2001; three of his standard deviations above the edge).

References:
    Harold Hotelling. Relations Between Two Sets of Variates. Biometrika 28, 1936.
    Iain Johnstone. On the Distribution of the Largest Eigenvalue in Principal Components Analysis.
    Annals of Statistics 29, 2001.
"""

import math

import torch
from torch import Tensor

_CLEAR = 3.0  # standard deviations of the largest eigenvalue of noise
_SINGULAR = 1e-10  # of the largest eigenvalue of a correlation matrix


def explained_by_direction(means: Tensor, within: Tensor, num_samples: int) -> Tensor:
    """Eigenvalues of (B + W)^-1 B, the largest first.

    Args:
        means: means of the draws of each datum, shape ``(N, D)``.
        within: W, shape ``(D, D)``, the mean over data of the covariance of their draws.
        num_samples: draws per datum, S.

    Returns:
        Shape ``(D,)``, in [0, 1]. Directions without any variance have 0.
    """
    centered = means - means.mean(0)
    between = centered.T @ centered / (len(means) - 1) - within / num_samples
    total = between + within
    scale = total.diagonal().clamp(min=0.0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    units = scale[:, None] * scale
    variances, axes = torch.linalg.eigh(total / units)
    kept = variances > _SINGULAR * variances[-1]
    whiten = axes[:, kept] / variances[kept].sqrt()
    explained = torch.linalg.eigvalsh(whiten.T @ (between / units) @ whiten).flip(0)
    missing = explained.new_zeros(len(within) - len(explained))
    return torch.cat([explained.clamp(0.0, 1.0), missing])


def largest_of_noise(variances: Tensor, num_samples: int) -> float:
    """What the largest eigenvalue of posteriors that are the same for all data stays below.

    Args:
        variances: of the draws of each datum, shape ``(N, D)``. Where they differ by datum, few data
            make most of the noise; N is then divided by ``mean(variance^2) / mean(variance)^2``.
        num_samples: draws per datum, S.
    """
    num_data, size = variances.shape
    # the square of a variance that is estimated by S normal draws is too large by this
    drawn = 1.0 + 2.0 / (num_samples - 1)
    mean = variances.mean(0)
    spread = variances[:, mean > 0].square().mean(0) / mean[mean > 0].square() / drawn
    unequal = max(float(spread.mean()), 1.0) if len(spread) else 1.0
    degrees = max((num_data - 1) / unequal, 1.0)
    sides = math.sqrt(max(degrees - 1.0, 1.0)), math.sqrt(size)
    spacing = sum(sides) * (1 / sides[0] + 1 / sides[1]) ** (1 / 3)
    edge = (sum(sides) ** 2 + _CLEAR * spacing) / degrees
    return max(edge - 1.0, 0.0) / num_samples
