"""What a guide draws: the distribution of its unconstrained latents, the map from its base, and draws for a step.

With one component the distribution is that of a flow, which a step of training may take from the kernel
(:mod:`pyro_flowkit.guides.kernel_draw`); with more it is a mixture (:mod:`pyro_flowkit.guides.mixture`).
"""

from collections.abc import Iterable
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.component import Component, OtherComponent, layers_of, look_all
from pyro_flowkit.guides.kernel_draw import KernelDraw, kernel_draw
from pyro_flowkit.guides.mixture import MixturePosterior, MixtureWeights
from pyro_flowkit.guides.pace import Pace
from pyro_flowkit.guides.posterior import GradientNoise, GuidePosterior
from pyro_flowkit.guides.without_masked import WithoutMasked
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.compose import Compose
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine
from pyro_flowkit.warning import warn


class Draws(WithoutMasked):
    """Draws of a guide that consists of components, and what watches them."""

    _runs_in_the_kernel = True
    flow: SplineFlow
    hierarchy: HierarchicalAffine | None
    affine: Affine
    pace: Pace
    others: nn.ModuleList
    mixture: MixtureWeights
    base_kind: str
    init_scale: float
    num_components: int
    path_gradient: bool
    _noise_squares: Tensor
    _said_undefined: bool

    @property
    def components(self) -> list[Component]:
        """The parts of every component; those of the first are the guide's own."""
        self._require_setup()
        first = Component(self.flow, self.hierarchy, self.affine, self.pace, self._noise_squares)
        return [first, *(cast(OtherComponent, other).component for other in self.others)]

    def get_base_dist(self) -> dist.TorchDistribution:
        """Distribution of z, event shape ``(latent_dim,)``."""
        self._require_one_map()
        self._look()
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Compose:
        """The map from z to the unconstrained latents, event_dim 1."""
        self._require_one_map()
        self._look()
        return Compose(self._layers())

    def _require_one_map(self) -> None:
        self._require_setup()
        if self.num_components > 1:
            raise ValueError(
                f"Expected num_components=1, got {self.num_components}: a mixture is no map of one base, so that there "
                "are no coordinates for NeuTra. Train a guide with one component for that, with init_loc_fn at one of "
                "the modes, or run NUTS from each; evidence and resample correct a mixture by importance weights."
            )

    def get_posterior(self, *args: Any, **kwargs: Any) -> GuidePosterior | MixturePosterior:
        """Distribution of the unconstrained latents, event shape ``(latent_dim,)``."""
        self._require_setup()
        if self.num_components == 1:
            return self._posterior(self.get_base_dist(), self._layers(), self._gradient_noise())
        self._look()
        each = [
            self._posterior(c.flow.base(), c.layers(), GradientNoise(c.noise_squares))
            for c in self.components
        ]
        return MixturePosterior(each, self.mixture)

    def _posterior(
        self, base: dist.TorchDistribution, layers: list[Any], noise: GradientNoise
    ) -> GuidePosterior:
        posterior = GuidePosterior(base, layers, path_gradient=self.path_gradient)
        posterior.noise = noise
        posterior.on_undefined = self._say_undefined
        return posterior

    def _gradient_noise(self) -> GradientNoise:
        return GradientNoise(self._noise_squares)

    def _layers(self) -> list[Any]:
        """From the base to the unconstrained latents, of the first component."""
        return layers_of(self.flow, self.hierarchy, self.affine)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        latent = super().sample_latent(*args, **kwargs)
        if torch.is_grad_enabled() and not is_transformed():
            self._drew(latent.shape[:-1].numel())
        return latent

    def _drew(self, count: int) -> None:
        for pace in self._paces():
            pace.drew(count)

    def _look(self) -> None:
        look_all(self._paces())

    def _paces(self) -> list[Pace]:
        self._require_setup()
        others = cast(Iterable[OtherComponent], self.others)
        return [self.pace, *(other.pace for other in others)]

    def draw_with_log_prob(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Draws for a step of training, whose parameters are in step with the param store.

        Returns:
            Unconstrained latents ``(num_samples, latent_dim)``, their log-density in nats, the term of log q that
            the gradient of the ELBO goes through, both ``(num_samples,)``, and their weights in the mean, None where
            these are equal: every component has as many draws.
        """
        found = self.draw_by_kernel(num_samples)
        if found is not None:
            return *found.in_graph(), None
        posterior = self.get_posterior()
        if torch.is_grad_enabled():
            self._drew(num_samples)
        if isinstance(posterior, MixturePosterior):
            return posterior.stratified(num_samples)
        latent = posterior.rsample((num_samples,))
        parts = posterior.score_parts(latent)
        return latent, parts.log_prob, cast(Tensor, parts.entropy_term), None

    def draw_by_kernel(self, num_samples: int) -> KernelDraw | None:
        """The same draws with the way back to the parameters; None where the kernel cannot."""
        self._require_setup()
        if not self._runs_in_the_kernel or self.num_components > 1:
            return None
        self._look()
        found = kernel_draw(
            self.flow.base,
            self._layers(),
            self._gradient_noise(),
            self._say_undefined,
            num_samples=num_samples,
            path_gradient=self.path_gradient,
        )
        if found is not None and torch.is_grad_enabled():
            self._drew(num_samples)
        return found

    def _say_undefined(self, gradient: Tensor) -> None:
        """Say once that derivatives at draws, ``(*batch, latent_dim)``, are no numbers in some rows."""
        if self._said_undefined:
            return
        self._said_undefined = True
        is_defined = gradient.isfinite().reshape(-1, gradient.shape[-1])
        marks = torch.where(is_defined.all(0), gradient.new_zeros(()), torch.nan)
        sites = [
            site["name"]
            for site, part in self._unpack_latent(marks)
            if not bool(part.isfinite().all())
        ]
        rows = is_defined.all(-1)
        warn(
            f"At {int((~rows).sum())} of {rows.numel()} draws the model's log-density has no derivative with respect "
            f"to {', '.join(sites)}, as the square root of a number that underflows to 0. Such draws are taken to be "
            "where guide and model agree, which leaves them out of the gradient; this is said once."
        )
