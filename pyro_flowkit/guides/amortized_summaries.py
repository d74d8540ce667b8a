"""Marginal medians and quantiles of an amortised guide: of the global latents, and of the local ones of any data."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.fixed_draws import global_draws, local_quantiles
from pyro_flowkit.guides.global_context import centred
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.transforms.base import check_floating
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine


class AmortizedSummaries(AutoGuide):
    """What can be asked of a guide for local latents, after its setup, without drawing from it."""

    _require_setup: Callable[[], None]
    sync_with_store: Callable[..., Any]
    _lead: Callable[[], None]
    _encode: Callable[[tuple, dict], Tensor]
    _posterior: Callable[[Tensor, Tensor | None], FlowDistribution]
    _prototype_frames: dict[str, Any]
    _local: Latents
    _global: Latents
    _dim: int
    condition_on_global: bool
    global_guide: Any
    flow: SplineFlow
    affine: ConditionalAffine

    def unpack(self, latent: Tensor) -> dict[str, Tensor]:
        """Values of the local latents, ``{site: value}``, from draws of :meth:`get_posterior`.

        Args:
            latent: unconstrained, shape ``(*sample_shape, batch, D)``.

        Raises:
            ValueError: if they are not in floating point.
        """
        self._require_setup()
        check_floating(latent, "latents")
        return {
            site.name: bijection_to(site.support)(unconstrained)
            for site, unconstrained in self._local.unpack_rows(latent)
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians, ``{site: value}``, of the global latents and of the local latents of these data."""
        values = self.quantiles([0.5], *args, **kwargs)
        return {name: value[0] for name, value in values.items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal quantiles, ``{site: values}`` stacked along a new first dimension.

        Those of local latents come from fixed draws, the same for every row, in unconstrained space; a row for each
        row of the encoder's features.

        Raises:
            ValueError: for a quantile outside of [0, 1].
        """
        self._require_setup()
        self.sync_with_store(lend=False)
        levels = torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"Expected quantiles in [0, 1], got {levels.tolist()}.")
        with poutine.block(), fixed_seed(self.affine.weight.device):
            self._create_plates(*args, **kwargs)
            self._lead()
            features = self._encode(args, kwargs)
            result = self._global_quantiles(levels, args, kwargs)
            context = self._fixed_global_context(args, kwargs)
        latents = local_quantiles(
            self.flow.base(),
            lambda rows: self._posterior(rows, context),
            features,
            levels.to(features),
        )
        result.update(self.unpack(latents))
        return result

    def _global_medians(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        medians = self._global_quantiles(torch.tensor([0.5]), args, kwargs)
        return {name: value[0] for name, value in medians.items()}

    def _global_quantiles(self, levels: Tensor, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        if self.global_guide is None:
            return {}
        try:
            return dict(self.global_guide.quantiles(levels.tolist(), *args, **kwargs))
        except (AttributeError, NotImplementedError):  # not every guide has them
            pass
        values = self._fixed_global_draws(args, kwargs)
        result = {}
        for site in self._global.sites:
            to = bijection_to(site.support)
            unconstrained = to.inv(values[site.name])
            result[site.name] = to(torch.quantile(unconstrained, levels.to(unconstrained), dim=0))
        return result

    def _fixed_global_draws(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        nesting = max([-self._dim, *(-frame.dim for frame in self._prototype_frames.values())])
        program = partial(self.global_guide, *args, **kwargs)
        return global_draws(program, self._global, nesting, self.affine.weight.device)

    def _fixed_global_context(self, args: tuple, kwargs: dict) -> Tensor | None:
        if not self.condition_on_global:
            return None
        draws = self._fixed_global_draws(args, kwargs)
        context = centred(self.global_guide, self._global, draws)
        return context.reshape(-1, 1, self._global.size)
