r"""The best Gaussian for a density, found without noise: where the training of a flow starts.

With fixed draws e_1..e_n of a standard normal, the ELBO of the Gaussian ``loc + S e`` is an ordinary function,

    L(loc, S) = (1/n) sum_i log p(loc + S e_i) + log |det S| + D/2 (1 + log 2 pi)

and L-BFGS finds its maximum in a few dozen steps, where stochastic gradients take thousands. It starts from the
Gaussian given and from Laplace's at a mode, and works in the units of either, so that the scales of the posterior do
not matter. Whatever it finds is judged, and accepted, by its ELBO on other draws.

References:
    Ryan Giordano, Martin Ingram, Tamara Broderick. Black Box Variational Inference with a Deterministic Objective.
    JMLR 2024.

    Abhinav Agrawal, Daniel Sheldon, Justin Domke. Advances in Black-Box VI. NeurIPS 2020 (Laplace initialisation, and
    that it ruins some models unless the ELBO decides).
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.ops.quasi_random import normal_draws

Density = Callable[[Tensor], Tensor]

MAX_ITERATIONS = 200  # of L-BFGS, for each of the starts
FEW_ITERATIONS = 25  # to see whether another start leads to another mode
SEARCH_SECONDS = 30.0  # of processor time
SHARE_FOR_LAPLACE = 0.25  # of the time: a mode is no more than a start
LITTLE_ROOM = 0.1  # nats; a Gaussian that is nearer is the best one at its mode
SETTLED = 1e-5  # nats that an iteration brings
FIRST_STEPS = (1.0, 0.1, 0.01, 1e-3)
_LOG_2PI_E = 1.0 + math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Gaussian:
    """Location ``(D,)`` and scale, lower triangular ``(D, D)`` or a diagonal ``(D,)``."""

    loc: Tensor
    scale: Tensor

    def transform(self, draws: Tensor) -> Tensor:
        """Draws of the Gaussian from those of a standard normal, shape ``(n, D)``."""
        if self.scale.dim() == 2:
            return self.loc + draws @ self.scale.mT
        return self.loc + draws * self.scale

    def marginal(self, columns: Tensor) -> "Gaussian":
        """The Gaussian of some dimensions."""
        if self.scale.dim() == 1:
            return Gaussian(self.loc[columns], self.scale[columns])
        rows = self.scale[columns]
        return Gaussian(self.loc[columns], torch.linalg.cholesky(rows @ rows.mT))

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        diagonal = self.scale.diagonal() if self.scale.dim() == 2 else self.scale
        return diagonal.log().sum() + 0.5 * len(self.loc) * _LOG_2PI_E

    def elbo(self, density: Density, draws: Tensor) -> float:
        """Mean of the log density over draws, plus the entropy (nats); -inf where that is not a number."""
        with torch.no_grad():
            value = float(density(self.transform(draws)).mean() + self.entropy())
        return value if math.isfinite(value) else -math.inf

    @torch.no_grad()
    def room(self, density: Density, draws: Tensor) -> float:
        """How far the ELBO is from the evidence, half the variance of log p - log q (nats); infinite if no number."""
        log_prob = density(self.transform(draws)) + 0.5 * draws.square().sum(-1)
        value = 0.5 * float(log_prob.var())
        return value if math.isfinite(value) else math.inf


def best_gaussian(
    density: Density, start: Gaussian, *, deadline: Deadline | None = None
) -> Gaussian:
    """The Gaussian of the largest ELBO that is found from ``start`` and from Laplace's approximation.

    Args:
        density: unnormalised log density of points ``(n, D)``, shape ``(n,)``, differentiable.
        start: where to start; its scale decides between a triangular and a diagonal one.
        deadline: after which the search ends with what it has; None is 30 s of processor time.

    Returns:
        A Gaussian whose ELBO, on draws that were not used to find it, is at least that of ``start``.
    """
    deadline = Deadline(SEARCH_SECONDS) if deadline is None else deadline
    size = len(start.loc)
    few = normal_draws(max(32, size), start.loc, seed=0)
    many = normal_draws(max(256, 8 * size), start.loc, seed=1)
    judges = normal_draws(max(512, 8 * size), start.loc, seed=2)

    def elbo(gaussian: Gaussian) -> float:
        return gaussian.elbo(density, judges)

    def better(candidate: Gaussian, draws: Tensor, iterations: int = MAX_ITERATIONS) -> Gaussian:
        return max(improved(density, candidate, draws, iterations, deadline), candidate, key=elbo)

    laplace = _laplace(density, start, deadline.part(SHARE_FOR_LAPLACE))
    starts = [start] if laplace is None else sorted([start, laplace], key=elbo, reverse=True)
    rough = better(starts[0], few)
    found = better(rough, many)
    for other in starts[1:]:
        is_near = found.room(density, judges) < LITTLE_ROOM
        other_rough = better(other, few, FEW_ITERATIONS if is_near else MAX_ITERATIONS)
        if elbo(other_rough) > elbo(rough):
            found = max(better(other_rough, many), found, key=elbo)
    return found


def improved(
    density: Density, start: Gaussian, draws: Tensor, max_iterations: int, deadline: Deadline
) -> Gaussian:
    """The ELBO over fixed draws raised by L-BFGS, in the units of the start: ``loc = loc_0 + S_0 m``, ``S = S_0 T``.

    Args:
        density: as for :func:`best_gaussian`.
        start: the Gaussian to begin with, whose kind of scale is kept.
        draws: of a standard normal, shape ``(n, D)``.
        max_iterations: of L-BFGS.
        deadline: after which it ends with the best so far.
    """
    size = len(start.loc)
    full = start.scale.dim() == 2
    rows, columns = torch.tril_indices(size if full else 0, size, -1)

    def gaussian(parameters: Tensor) -> Gaussian:
        m, log_diagonal, lower = parameters.tensor_split([size, 2 * size])
        if not full:
            return Gaussian(start.loc + start.scale * m, start.scale * log_diagonal.exp())
        triangle = log_diagonal.exp().diag().index_put((rows, columns), lower)
        return Gaussian(start.loc + start.scale @ m, start.scale @ triangle)

    def loss(parameters: Tensor) -> Tensor:
        now = gaussian(parameters)
        return -density(now.transform(draws)).mean() - now.entropy()

    zeros = start.loc.new_zeros(2 * size + len(rows))
    return gaussian(minimized(loss, zeros, max_iterations, deadline))


@torch.no_grad()
def _laplace(density: Density, start: Gaussian, deadline: Deadline) -> Gaussian | None:
    """The Gaussian of a mode and its curvature; None where there is none."""

    def loss(offset: Tensor) -> Tensor:
        return -density((start.loc + offset)[None])[0]

    mode = start.loc + minimized(loss, torch.zeros_like(start.loc), 500, deadline)
    shrink = torch.cat([0.5 ** torch.arange(20.0), torch.zeros(1)]).to(mode)
    for _ in range(20):  # Newton's steps, as L-BFGS ends early on badly scaled densities
        try:
            hessian, gradient = _curvature(density, mode)
        except RuntimeError:  # something in the model has no second derivative
            return None
        factor, failed = torch.linalg.cholesky_ex(-hessian)
        if int(failed) or not bool(factor.isfinite().all()):
            return None
        step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        if not float(gradient @ step) > 1e-8:
            break
        along = mode + shrink[:, None] * step
        mode = along[int(density(along).nan_to_num(nan=-math.inf).argmax())]
    covariance = torch.cholesky_inverse(factor)
    if start.scale.dim() == 1:
        return Gaussian(mode, covariance.diagonal().sqrt())
    scale, failed = torch.linalg.cholesky_ex(covariance)
    return None if int(failed) else Gaussian(mode, scale)


def _curvature(density: Density, point: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and gradient of the log density at a point; NaN where it cannot be differentiated twice."""
    size = len(point)
    points = point.detach().expand(size, size).clone().requires_grad_()
    with torch.enable_grad():
        (gradients,) = torch.autograd.grad(density(points).sum(), points, create_graph=True)
        (hessian,) = torch.autograd.grad(gradients.diagonal().sum(), points)
    return 0.5 * (hessian + hessian.mT), gradients[0].detach()


def minimized(
    loss: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int, deadline: Deadline
) -> Tensor:
    """L-BFGS from ``start``; the best point seen before the deadline.

    Its first step has length one, whatever the function; where that or a later one leads to what is no number, the
    line search ends at once. It then begins anew at the best point, with a first step a tenth as long.
    """
    import scipy.optimize  # changes the filters of warnings

    best: list[Any] = [math.inf, start]
    left_the_finite = False

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal left_the_finite
        if deadline.is_over:
            raise TimeoutError
        parameters = torch.from_numpy(x).to(start).requires_grad_()
        with torch.enable_grad():
            value = loss(parameters)
            (gradient,) = torch.autograd.grad(value, parameters)
        found = float(value.detach())
        if not (math.isfinite(found) and bool(gradient.isfinite().all())):
            left_the_finite = True
            return 1e30, np.zeros_like(x)  # the line search steps back
        if found < best[0]:
            best[:] = found, parameters.detach()
        return found, gradient.double().cpu().numpy()

    with contextlib.suppress(TimeoutError):
        size = abs(value_and_gradient(start.double().cpu().numpy())[0])
        for first_step in FIRST_STEPS:
            left_the_finite, origin = False, best[1].double().cpu().numpy()

            def in_steps(
                y: np.ndarray, origin: np.ndarray = origin, unit: float = first_step
            ) -> tuple[float, np.ndarray]:
                value, gradient = value_and_gradient(origin + unit * y)
                return value, unit * gradient

            scipy.optimize.minimize(
                in_steps,
                np.zeros_like(origin),
                jac=True,
                method="L-BFGS-B",
                options={
                    "maxiter": max_iterations,
                    "maxcor": 20,
                    "ftol": SETTLED / max(size, 1.0),
                    "gtol": 1e-6 * first_step,
                },
            )
            if not left_the_finite:
                break
    return best[1]
