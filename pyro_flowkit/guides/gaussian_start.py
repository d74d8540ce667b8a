"""The first stage of a guide's training, and its safety net: a Gaussian, found without noise."""

import warnings
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from pyro_flowkit.guides.gaussian import Gaussian, best_gaussian, normal_draws
from pyro_flowkit.guides.latent_density import LatentDensity

if TYPE_CHECKING:
    from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow

NUM_JUDGES = 2048
MAX_LOSS = 0.02  # nats


class GaussianStart:
    """A guide that was put onto the best Gaussian; keeps what is needed to go back there."""

    def __init__(self, guide: "AutoSplineFlow", density: LatentDensity):
        self._guide, self._density = guide, density
        self._state = {name: tensor.clone() for name, tensor in guide.state_dict().items()}

    @classmethod
    def of(cls, guide: "AutoSplineFlow", density: LatentDensity, max_seconds: float) -> Self | None:
        """Put a fresh guide onto the best Gaussian; None, with nothing done, where that does not work."""
        if not density.is_vectorized or not _is_gaussian(guide):
            return None
        affine = guide.affine
        with torch.no_grad():
            scale = affine.scale if affine.kind == "full" else affine.scale.diagonal().clone()
            start = Gaussian(affine.loc.clone(), scale)
        found = best_gaussian(density, start, max_seconds=max_seconds)
        if found is not start:
            affine.restart(found.loc, found.scale)
        return cls(guide, density)

    @torch.no_grad()
    def keep_better(self) -> bool:
        """Go back to the Gaussian, with a warning, if the guide has a smaller ELBO by now.

        Returns:
            Whether the trained guide was kept.
        """
        now = {name: tensor.clone() for name, tensor in self._guide.state_dict().items()}
        trained = self._elbos()
        self._load(self._state)
        gaussian = self._elbos()
        difference = trained - gaussian
        mean = float(difference.mean())
        error = float(difference.std()) / len(difference) ** 0.5
        # far below, the error is large, too, and no excuse; a NaN is none either
        if mean >= -min(2.0 * error, MAX_LOSS):
            self._load(now)
            return True
        warnings.warn(
            f"The spline flow of {type(self._guide).__name__} ended {-mean:.3g} nats below the best Gaussian that was "
            "found, so the guide is that Gaussian now. More particles, more steps or a smaller learning rate may "
            "help.",
            stacklevel=3,
        )
        return False

    def _elbos(self) -> Tensor:
        """log p - log q (nats) at the same quasi-random draws of the base for whatever the guide is now."""
        posterior = self._guide.get_posterior()
        z = normal_draws(NUM_JUDGES // 2, self._guide.affine.loc, seed=3)
        if self._guide.base_kind == "student_t":
            z = posterior.base_dist.sample(z.shape[:1])
        latent, log_prob = posterior._push(z)
        return self._density(latent) - log_prob

    def _load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self._guide.state_dict().items():
            tensor.copy_(state[name])


@torch.no_grad()
def _is_gaussian(guide: "AutoSplineFlow") -> bool:
    """Whether the flow is the identity still; one with a base of Student's t counts: the splines have not begun."""
    z = normal_draws(8, guide.affine.loc, seed=0)
    x = z
    for layer in guide.flow.layers:
        x = layer(x)
    return torch.allclose(x, z, atol=1e-4)
