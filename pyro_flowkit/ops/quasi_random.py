"""Draws that fill a space evenly, the same at every call: scrambled Sobol sequences and their mirror images.

Means over them are those of the distribution to about 1 / n in place of 1 / sqrt(n). The global random state is neither
read nor changed.
"""

import torch
from torch import Tensor

MAX_DIMENSIONS = 1000  # beyond them a sequence takes long, and is no better than random numbers


def uniform_draws(count: int, size: int, seed: int) -> Tensor:
    """Shape ``(count, size)``, float64, strictly inside of (0, 1)."""
    if size > MAX_DIMENSIONS:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(count, size, dtype=torch.float64, generator=generator)
    else:
        sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
        uniform = sobol.draw(count, dtype=torch.float64)
    return uniform.clamp(1e-10, 1 - 1e-10)


def normal_draws(count: int, like: Tensor, seed: int) -> Tensor:
    """Draws of a standard normal in the dimension of ``like``, the second half the mirror image of the first.

    Returns:
        Shape ``(2 * count, D)``.
    """
    half = torch.special.ndtri(uniform_draws(count, like.shape[-1], seed)).to(like)
    return torch.cat([half, -half])


def student_t_draws(count: int, df: Tensor, seed: int) -> Tensor:
    """The same of Student's t, degrees of freedom ``(D,)``."""
    import scipy.special

    uniform = uniform_draws(count, df.shape[-1], seed)
    half = torch.from_numpy(
        scipy.special.stdtrit(df.detach().double().cpu().numpy(), uniform.numpy())
    )
    half = half.to(df)
    return torch.cat([half, -half])
