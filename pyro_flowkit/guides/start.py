"""Where a guide starts: at values of its latents, with angles cut open, or at the Gaussian of another guide."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor, nn

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.guides.circular import CircularAffine, Cut, best_cut, periodic_columns
from pyro_flowkit.guides.draws import Draws
from pyro_flowkit.guides.gaussian import Gaussian
from pyro_flowkit.guides.gaussian_start import GaussianStart
from pyro_flowkit.guides.latent_vector import LatentDensity, pack
from pyro_flowkit.guides.modes import Mode, modes, spread
from pyro_flowkit.guides.posterior import GradientNoise
from pyro_flowkit.guides.room import Room
from pyro_flowkit.guides.supports import bijection_to, initialisation
from pyro_flowkit.ops.quasi_random import normal_draws
from pyro_flowkit.programs.vectorized import Way
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.warning import warn

# a setup looks at a few points only
PRIOR_DRAWS = 10
SECONDS_FOR_MODES = 10.0
WITHOUT_RECORDING: tuple[Way, ...] = ("plate", "rows")


class Start(Draws):
    """The steps of a guide's setup that choose its location, after that of the prototype."""

    _mode_locs: list[Tensor]
    _make_flow: Callable[[Tensor], tuple[nn.Module, nn.Module | None]]
    _warm_start: Any

    @classmethod
    def from_guide(cls, guide: Any, **settings: Any) -> Self:
        """A guide that starts as the Gaussian which another one has learned.

        Args:
            guide: a trained AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal or AutoLowRankMultivariateNormal;
                its model is taken over.
            settings: those of the constructor, without ``init_loc_fn`` and ``init_scale``. A scale that is "diagonal"
                or "low_rank" starts at the marginal standard deviations of a Gaussian with correlations.

        Raises:
            ValueError: for another guide, one that was never called, or settings that the Gaussian decides.
        """
        decided = {"init_loc_fn", "init_scale"} & set(settings)
        if decided:
            raise ValueError(
                f"Expected the guide to say where to start, got {sorted(decided)}, too."
            )
        if settings.get("num_components", 1) != 1:
            raise ValueError(
                f"Expected num_components=1, got {settings['num_components']!r}: one Gaussian is no start for several "
                "components. AutoSplineFlow(model, num_components=...) looks for one for each."
            )
        warm_start = gaussian_of(guide)
        new = cls(guide.model, init_loc_fn=initialisation(None), **settings)
        new._warm_start = warm_start
        return new

    def _start_warm(self, sizes: dict[str, int], gaussian: Gaussian) -> None:
        own = {name: shape.numel() for name, shape in self._unconstrained_shapes.items()}
        if own != sizes:
            raise ValueError(
                f"Expected the latents of the guide to start from, {sizes} (site: unconstrained values), got {own}."
            )
        if self.idle is not None:
            gaussian = gaussian.marginal(self.idle.columns)
        self.affine.restart(gaussian.loc, gaussian.scale)
        if isinstance(self.affine, CircularAffine):
            self.affine.centre.copy_(gaussian.loc[self.affine.columns])

    def _choose_loc(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Where ``init_loc_fn`` says; without one the prior's medians, unless the origin is the better start.

        The median of a vague prior may be far out, or underflow. A start where a derivative is no number is none: then
        it is a draw of the prior.
        """
        loc = self._init_loc()
        model, is_given = self._given
        if is_given:
            return loc
        density = LatentDensity(model, self, args, kwargs, WITHOUT_RECORDING)
        candidates = {"the prior's medians": loc, "the origin": torch.zeros_like(loc)}
        tried = {name: self._tried(density, at) for name, at in candidates.items()}
        if not any(is_smooth for is_smooth, _ in tried.values()):
            for i, at in enumerate(self._prior_draws(model, args, kwargs, loc)):
                name = f"draw {i + 1} of the prior"
                candidates[name], tried[name] = at, self._tried(density, at)
        best = max(tried, key=lambda name: tried[name])
        if not tried[best][0]:
            warn(self._no_start(density, candidates, best))
        if best != "the prior's medians":
            self._start_at(candidates[best])
        return candidates[best]

    def _tried(self, density: LatentDensity, loc: Tensor) -> tuple[bool, float]:
        """Whether a start has a density with a gradient at draws around it, and its ELBO (nats)."""
        gaussian = Gaussian(loc, torch.full_like(loc, self.init_scale))
        draws = gaussian.transform(normal_draws(8, loc, seed=0))
        log_prob, gradient = _with_gradient(density, draws)
        elbo = float(log_prob.mean() + gaussian.entropy())
        return bool(gradient.isfinite().all()), elbo if math.isfinite(elbo) else -math.inf

    def _other_starts(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """Draws of the prior, where there may be a way to another mode; none where a caller said where to start.

        Several components are at the modes already.
        """
        if self.num_components > 1:
            return [loc.to(self._init_loc()) for loc in self._mode_locs]
        _, is_given = self._given
        if is_given or self._warm_start is not None or isinstance(self.affine, CircularAffine):
            return []
        return self._prior_draws(model, args, kwargs, self._init_loc())

    def find_start(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        max_seconds: float | None = None,
        found: Mapping[str, Tensor] | None = None,
    ) -> GaussianStart | None:
        """Move the affine map of a fresh guide to the best Gaussian for the model, before training.

        A guide that was trained already stays where it is.

        Args:
            model: the model that the guide will be trained on, usually its own.
            args: its arguments, with all of the data.
            kwargs: its keyword arguments.
            max_seconds: of the search for that Gaussian, by the clock on the wall; it ends after 30 s of processor time
                in any case.
            found: the ``tensors`` of an earlier start, to go on from there without a search; the guide is left alone.

        Returns:
            What to call after the training, so that it does not end below this start; None, with nothing done, where
            the model cannot be run for many draws at a time.
        """
        self._require_setup()
        density = LatentDensity(model, self, args, kwargs)
        if found is not None:
            return GaussianStart(self, density, found)
        other_starts = partial(self._other_starts, model, tuple(args), dict(kwargs or {}))
        return GaussianStart.of(self, density, max_seconds, other_starts)

    def room(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Room | None:
        """What the guide has left to gain on a model; None where that is not run for many draws at a time."""
        self._require_setup()
        density = LatentDensity(model, self, args, kwargs)
        return Room(self, density) if density.obstacle is None else None

    def check_restarts(self) -> None:
        """Raise a ValueError for a guide with several components, which are at the modes already."""
        if self.num_components > 1:
            raise ValueError(
                f"Expected num_components=1 for several starts, got {self.num_components}: the components of "
                f"{type(self).__name__} start at the modes that are found."
            )

    def restart(self, number: int, *args: Any, **kwargs: Any) -> None:
        """Begin anew, at a draw of the prior: as fresh as after the setup, but for where it starts.

        Args:
            number: which draw, from 1.
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        self._require_setup()
        model = self._given[0]
        loc = self._prior_draws(model, args, kwargs, self._init_loc(), number)[-1]
        flow, hierarchy = self._make_flow(loc)
        self.flow.load_state_dict(flow.state_dict())
        if self.hierarchy is not None and hierarchy is not None:
            self.hierarchy.load_state_dict(hierarchy.state_dict())
        self._start_at(loc)
        self.affine.restart(loc, torch.full_like(loc, self.init_scale))
        self._noise_squares.copy_(GradientNoise.at_first())
        self.pace.forget()
        self._given = (model, True)

    def _places(self, loc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Mode]:
        """Where each of several components starts, that of the largest mass first."""
        model = self._given[0]
        draws = self._prior_draws(model, args, kwargs, loc)
        starts = [loc, *draws, *(-draw for draw in draws)]
        density = LatentDensity(model, self, args, kwargs, WITHOUT_RECORDING)
        deadline = Deadline(SECONDS_FOR_MODES)
        found = modes(density, starts, self.init_scale, deadline=deadline)
        self._mode_locs = [mode.gaussian.loc for mode in found]
        return spread(found, self.num_components)

    @torch.no_grad()
    def _prior_draws(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loc: Tensor,
        count: int = PRIOR_DRAWS,
    ) -> list[Tensor]:
        """Starts where the prior is; around the origin where it cannot be drawn from."""
        found = []
        with fixed_seed(loc.device), poutine.block():
            for _ in range(count):
                try:
                    trace = poutine.trace(model).get_trace(*args, **kwargs)
                    names = [name for name, _ in self.prototype_trace.iter_stochastic_nodes()]
                    found.append(pack(self, {n: trace.nodes[n]["value"] for n in names})[0])
                except (NotImplementedError, RuntimeError, ValueError):
                    found.append(torch.randn_like(loc))
        return found

    def _no_start(self, density: LatentDensity, candidates: Mapping[str, Tensor], best: str) -> str:
        """What is wrong with the best start that there is: whose derivative is no number, and where."""
        gradient = _with_gradient(density, candidates[best][None])[1][0]
        bad = [
            f"{site['name']} = {bijection_to(site['fn'].support)(unconstrained).tolist()}"
            for (site, unconstrained), (_, derivative) in zip(
                self._unpack_latent(candidates[best]), self._unpack_latent(gradient), strict=True
            )
            if not bool(derivative.isfinite().all())
        ]
        return (
            "Expected a start where the model's log-density has a derivative, got none among the prior's medians, the "
            f"origin and {PRIOR_DRAWS} draws of the prior. "
            f"At {best} the derivative is no number with respect to {'; '.join(bad) or 'some draws around it'}. Give "
            "init_loc_fn, or rewrite what has an infinite derivative there (the square root of a number that "
            "underflows to 0, for one)."
        )

    def _start_at(self, loc: Tensor) -> None:
        for site, unconstrained in self._unpack_latent(loc):
            site["value"] = bijection_to(site["fn"].support)(unconstrained)

    def _cut(
        self, angular: list[int], loc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Cut:
        """Where to cut the angles among the latents: opposite to a given start, or where there is least mass."""
        model, is_given = self._given
        density = LatentDensity(model, self, args, kwargs, WITHOUT_RECORDING)
        columns = periodic_columns(density, loc, angular)
        if is_given:
            return Cut(columns, loc[columns], loc)
        cut = best_cut(density, loc, columns)
        self._start_at(cut.loc)
        return cut


def _with_gradient(density: LatentDensity, points: Tensor) -> tuple[Tensor, Tensor]:
    """The log-density at points ``(n, D)``, and its derivatives."""
    points = points.detach().clone().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that reads numbers
        log_prob = density(points)
        (gradient,) = torch.autograd.grad(log_prob.sum(), points)
    return log_prob.detach(), gradient


@torch.no_grad()
def gaussian_of(guide: Any) -> tuple[dict[str, int], Gaussian]:
    """Sizes of the latents of a trained guide, ``{site: number of unconstrained values}``, and its Gaussian.

    The Gaussian's scale is triangular where the guide correlates latents, else a diagonal.

    Raises:
        ValueError: for another guide, or one that was never called.
    """
    if isinstance(guide, AutoNormal):
        _require_call(guide)
        pairs = {name: guide._get_loc_and_scale(name) for name in _latents(guide)}
        loc, scale = (
            torch.cat([pair[i].detach().reshape(-1) for pair in pairs.values()]) for i in (0, 1)
        )
        return {name: pair[0].numel() for name, pair in pairs.items()}, Gaussian(loc, scale)
    kinds = (AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal)
    if isinstance(guide, kinds):
        _require_call(guide)
        posterior: Any = guide.get_posterior()
        diagonal = isinstance(guide, AutoDiagonalNormal)
        scale = posterior.stddev if diagonal else posterior.scale_tril
        sizes = {name: math.prod(guide._unconstrained_shapes[name]) for name in _latents(guide)}
        return sizes, Gaussian(posterior.mean.detach().clone(), scale.detach().clone())
    raise ValueError(
        "Expected a trained AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal or AutoLowRankMultivariateNormal, "
        f"got {type(guide).__name__}."
    )


def _require_call(guide: AutoNormal | AutoContinuous) -> None:
    if guide.prototype_trace is None:
        raise ValueError(f"Expected a trained {type(guide).__name__}, got one never called.")


def _latents(guide: AutoNormal | AutoContinuous) -> list[str]:
    trace: Any = guide.prototype_trace
    return [name for name, _ in trace.iter_stochastic_nodes()]
