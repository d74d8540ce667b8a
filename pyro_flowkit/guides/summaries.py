r"""The posterior as an object: what a trained guide knows of the latents, in constrained space.

With u ~ q the guide's unconstrained latents and log w = log p(x, u) - log q(u), the evidence is estimated as

    log p(x) ~ log (1/S) sum_s psis(w)_s

and draws that are resampled by those weights follow the posterior more closely than the guide does, as far as pareto k
allows (:mod:`pyro_flowkit.ops.psis`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyro_flowkit.guides.draws import Draws
from pyro_flowkit.guides.latent_vector import LatentDensity, pack, unpack
from pyro_flowkit.guides.lazy import LazyGuide
from pyro_flowkit.guides.supports import Edges
from pyro_flowkit.ops.psis import log_mean_error, pareto_k_threshold, psis
from pyro_flowkit.pictures import columns_of, draw_panels, first_variables
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.warning import warn

MAX_ROWS = 1000  # that pass through the model at a time


@dataclass(frozen=True)
class Evidence:
    """An importance-sampled estimate of log p(x), in nats.

    Attributes:
        log_evidence: the estimate.
        standard_error: of it, by the delta method; too small where pareto k is above ``pareto_k_threshold``.
        elbo: the lower bound from the same draws.
        elbo_standard_error: of that.
        pareto_k: how heavy the tail of the weights is.
        pareto_k_threshold: up to which the estimate can be trusted with so many draws.
        num_samples: number of draws.
    """

    log_evidence: float
    standard_error: float
    elbo: float
    elbo_standard_error: float
    pareto_k: float
    pareto_k_threshold: float
    num_samples: int

    @property
    def is_reliable(self) -> bool:
        """Whether pareto k is at most its threshold."""
        return self.pareto_k <= self.pareto_k_threshold


class Weighed(LazyGuide):
    """A guide whose draws have importance weights; a base to be named before the others."""

    sync_with_store: Callable[..., None]
    # (args, kwargs, num_samples): draws, and their log weights, float64 on the CPU
    _weigh: Callable[[tuple, dict, int], tuple[Any, Tensor]]
    # (draws, indices): values of the latents at draws that were chosen
    _chosen: Callable[[Any, Tensor], dict[str, Tensor]]

    def evidence(
        self, *args: Any, num_samples: int = 4000, seed: int | None = None, **kwargs: Any
    ) -> Evidence:
        """The evidence log p(x) by importance sampling, with its standard error and pareto k.

        The data of an amortised guide without global latents have weights of their own: the numbers are sums over the
        data, and pareto k is the largest.

        Args:
            args: the model's arguments, with all data.
            num_samples: draws of the guide.
            seed: of the draws, without effect on the generator of the caller; None goes on with that.
            kwargs: the model's keyword arguments.

        Raises:
            RuntimeError: for a guide that was unpickled, and is without its model.
            ValueError: if a log weight is NaN; for an amortised guide also if a plate is subsampled, or model or guide
                cannot be run for many draws at a time.
        """
        with self._seeded(seed):
            _, log_weights = self._weigh(args, kwargs, num_samples)
        return evidence_of(log_weights)

    def resample(
        self,
        num_samples: int,
        *args: Any,
        num_proposals: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draws of the posterior: those of the guide, resampled by their Pareto-smoothed importance weights.

        The data of an amortised guide without global latents have weights of their own.

        Args:
            num_samples: number of draws returned; some are equal.
            args: the model's arguments, with all data.
            num_proposals: draws of the guide among which to choose; None is ten times as many.
            seed: of the draws, without effect on the generator of the caller; None goes on with that.
            kwargs: the model's keyword arguments.

        Returns:
            ``{site: values}`` of shape ``(num_samples, *batch, *event)``. A pareto k above the threshold is a warning:
            the draws are then no better than the guide, where it missed something.

        Raises:
            RuntimeError, ValueError: as :meth:`evidence`.
        """
        proposals = 10 * num_samples if num_proposals is None else num_proposals
        with self._seeded(seed):
            draws, log_weights = self._weigh(args, kwargs, proposals)
            chosen = chosen_by(log_weights, num_samples, type(self).__name__)
        return self._chosen(draws, chosen)

    def _model_for_weights(self, model: Callable[..., Any] | None) -> Callable[..., Any]:
        if model is None:
            raise RuntimeError(
                f"Expected {type(self).__name__} to know its model, got one that was unpickled: use "
                "evidence_bounds(model, guide), or load its state_dict into a guide made with the model."
            )
        return model

    def _seeded(self, seed: int | None) -> AbstractContextManager[None]:
        self._require_setup()
        return nullcontext() if seed is None else fixed_seed(self._device, seed)

    @property
    def _device(self) -> torch.device:
        return next(cast(nn.Module, self.affine).parameters()).device

    def _synchronise(self) -> None:
        self._require_setup()
        self.sync_with_store(lend=False)


class Summaries(Weighed, Draws):
    """Draws, densities, quantiles and evidence of a guide whose posterior is a flow, or a mixture of flows."""

    @torch.no_grad()
    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of all latents, ``{site: values}`` of shape ``(num_samples, *batch, *event)``, without gradients."""
        return unpack(self, self._draw(num_samples))[0]

    def plot(
        self,
        reference: Mapping[str, Any] | None = None,
        *,
        num_samples: int = 2000,
        axes: Any = None,
    ) -> Any:
        """Marginals and pairs of draws, over those of a reference where there is one.

        Args:
            reference: draws of the posterior by site, shape ``(draws, *batch, *event)``, as NUTS gives.
            num_samples: draws of the guide.
            axes: an ``(n, n)`` array of Axes; a new figure by default.

        Returns:
            The ``(n, n)`` array of Axes for the first n <= 8 latents, of those that the reference has.

        Raises:
            ValueError: if a reference has none of the guide's latents.
        """
        draws = {site: value.cpu().numpy() for site, value in self.sample(num_samples).items()}
        columns = {"guide": columns_of(draws)}
        names = list(columns["guide"])
        if reference is not None:
            known = {site: np.asarray(value) for site, value in reference.items() if site in draws}
            columns = {"reference": columns_of(known), **columns}
            names = [name for name in names if name in columns["reference"]]
            if not names:
                raise ValueError(
                    f"Expected draws of some of the latents {sorted(draws)} in the reference, got {sorted(reference)}."
                )
        shown, note = first_variables(names)
        return draw_panels(
            columns,
            shown,
            reference=None if reference is None else "reference",
            axes=axes,
            note=note,
        )

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """log q of values of all latents, in constrained space.

        Args:
            values: ``{site: value}``, shapes ``(*sample_shape, *batch, *event)``, such as :meth:`sample` returns.
            args: the model's arguments, which this guide does not look at.
            kwargs: the model's keyword arguments, likewise.

        Returns:
            log q in nats, shape ``(*sample_shape,)``, differentiable.

        Raises:
            ValueError: for missing or unknown latents, and shapes that do not fit.
        """
        self._synchronise()
        latent, ladj = pack(self, values)
        return self.get_posterior().log_prob(latent) - ladj

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal median of every latent, ``{site: value}``; from fixed draws, so the same at every call."""
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal quantiles of every latent, ``{site: values}`` stacked along a new first dimension.

        They are those of :meth:`FlowDistribution.fixed_draws`, taken in unconstrained space.

        Raises:
            ValueError: for a quantile outside of [0, 1].
        """
        self._synchronise()
        ordered = self.get_posterior().fixed_draws().sort(0).values
        levels = torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1).tolist()
        return unpack(self, torch.stack([_quantile(ordered, level) for level in levels]))[0]

    @torch.no_grad()
    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Marginal medians and standard deviations of the unconstrained latents, shapes ``(D,)``."""
        self._synchronise()
        draws = self.get_posterior().fixed_draws()
        return _quantile(draws.sort(0).values, 0.5), draws.std(0)

    def _chosen(self, latent: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        return unpack(self, latent[chosen.to(latent.device)])[0]

    @torch.no_grad()
    def _weigh(self, args: tuple, kwargs: dict, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws ``(num_samples, D)`` of the unconstrained latents and their log weights, float64 on the CPU."""
        self._synchronise()
        model = self._model_for_weights(self._given[0])
        density = LatentDensity(model, self, args, kwargs)
        posterior = self.get_posterior()
        latent = self._draw(num_samples)
        edges = Edges()
        for name, value in unpack(self, latent)[0].items():
            site = self.prototype_trace.nodes[name]
            counted = self._counted(name, value)
            edges.note(name, site["fn"].support, counted, site["value"].numel())
        edges.warn()
        log_weights = [
            (density(rows).double() - posterior.log_prob(rows).double()).cpu()
            for rows in latent.split(MAX_ROWS)
        ]
        return latent, torch.cat(log_weights)

    @torch.no_grad()
    def _draw(self, num_samples: int) -> Tensor:
        self._synchronise()
        return self.get_posterior().sample((num_samples,))


def evidence_of(log_weights: Tensor) -> Evidence:
    """The evidence from log weights ``(S,)``, or of independent data ``(N, S)``: sums, and the largest pareto k."""
    num_samples = log_weights.shape[-1]
    smoothed, pareto_k = psis(log_weights)
    log_evidence = smoothed.logsumexp(-1) - math.log(num_samples)
    return Evidence(
        log_evidence=float(log_evidence.sum()),
        standard_error=float(log_mean_error(smoothed, log_evidence).square().sum().sqrt()),
        elbo=float(log_weights.mean(-1).sum()),
        elbo_standard_error=float((log_weights.var(-1).sum() / num_samples).sqrt()),
        pareto_k=float(pareto_k.max()),
        pareto_k_threshold=pareto_k_threshold(num_samples),
        num_samples=num_samples,
    )


def chosen_by(log_weights: Tensor, num_samples: int, guide: str) -> Tensor:
    """Indices of draws by their smoothed weights ``(S,)`` or ``(N, S)``: ``(num_samples,)`` or ``(N, num_samples)``.

    Args:
        log_weights: log weights of draws.
        num_samples: number of indices.
        guide: what to call it in the warning of a pareto k above its threshold.
    """
    smoothed, pareto_k = psis(log_weights)
    threshold = pareto_k_threshold(log_weights.shape[-1])
    if not float(pareto_k.max()) <= threshold:
        warn(
            f"The importance weights of {guide} have pareto k {float(pareto_k.max()):.2f}, above {threshold:.2f}: "
            "resampled draws cannot be trusted to follow the posterior. Train longer, or run NUTS in the coordinates "
            "of the guide (NeuTraReparam)."
        )
    return torch.multinomial(smoothed.softmax(-1), num_samples, replacement=True)


def _quantile(ordered: Tensor, level: float) -> Tensor:
    """Linear-interpolated quantile along dim 0 of sorted draws, without ``torch.quantile``'s limit on the size."""
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"Expected quantiles in [0, 1], got {level!r}.")
    position = level * (len(ordered) - 1)
    low = min(int(position), len(ordered) - 2)
    return torch.lerp(ordered[low], ordered[low + 1], position - low)
