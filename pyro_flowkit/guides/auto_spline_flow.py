"""AutoSplineFlow: an autoguide over all continuous latents of a model, a spline flow and then a learned affine map.

In unconstrained space the guide is

    z ~ base,    latent = loc + S h(f(z)),

where f is a spline flow and h scales and moves the latents of each site as a function of those of the sites before it
(:class:`~pyro_flowkit.transforms.HierarchicalAffine`); both are the identity at first. loc and S (full or diagonal)
are learned: at step 0 the guide is the Gaussian that Pyro's AutoMultivariateNormal and AutoDiagonalNormal start from,
and it only leaves the Gaussians where that raises the ELBO. With ``num_components`` above 1 it is a mixture of such
densities, each with its own flow and affine maps, which start at the posterior's modes
(:mod:`pyro_flowkit.guides.mixture`).

References:
    Abhinav Agrawal, Daniel Sheldon, Justin Domke. Advances in Black-Box VI: Normalizing Flows, Importance Weighting,
    and Optimization. NeurIPS 2020.

    Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing. NeurIPS 2017 (``path_gradient``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn

from pyro_flowkit._pyro import StoreModule
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.circular import CircularAffine, angular_columns
from pyro_flowkit.guides.component import (
    Component,
    OtherComponent,
    layers_of,
    look_all,
    make_hierarchy,
    paced,
)
from pyro_flowkit.guides.gaussian import Gaussian
from pyro_flowkit.guides.gaussian_start import GaussianStart
from pyro_flowkit.guides.kernel_draw import kernel_draw
from pyro_flowkit.guides.latent_density import LatentDensity
from pyro_flowkit.guides.latent_elbo import LatentELBO
from pyro_flowkit.guides.lazy import LazyGuide, lighten
from pyro_flowkit.guides.mixture import MixturePosterior, MixtureWeights
from pyro_flowkit.guides.pace import Pace
from pyro_flowkit.guides.posterior import GradientNoise, GuidePosterior
from pyro_flowkit.guides.recipe import Recipe
from pyro_flowkit.guides.room import Room
from pyro_flowkit.guides.start import Start
from pyro_flowkit.guides.storage import Storage
from pyro_flowkit.guides.summaries import Summaries
from pyro_flowkit.guides.supports import initialisation
from pyro_flowkit.guides.warm_start import gaussian_of
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.programs.vectorized import Vectorized
from pyro_flowkit.transforms.affine import Affine, AffineKind
from pyro_flowkit.transforms.compose import Compose
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine
from pyro_flowkit.warning import warn

DEFAULT_INIT_SCALE = 0.1
AFFINE_LR, HIERARCHY_LR = 9e-4, 6e-3
HIDDEN_DIMS = [32, 32]
# up to this many latents matrices with a row and a column for each are cheap
MAX_FULL_DIM = 200


class AutoSplineFlow(LazyGuide, Summaries, Start, Storage, StoreModule):
    """Guide for a model with continuous latents; takes the place of ``AutoNormal`` and its relatives::

        guide = AutoSplineFlow(model)
        svi = SVI(model, guide, Adam({"lr": 3e-3}), Trace_ELBO())

    Args:
        model: a Pyro model. Its structure and latent dimension are fixed by the first call, or by :meth:`setup`.
        init_loc_fn: per-site initialisation (``pyro.infer.autoguide.initialization``); None is the prior's median or
            the origin of unconstrained space, whichever has the larger ELBO.
        init_scale: initial standard deviation of every unconstrained latent, a float > 0; None is 0.1.
        num_transforms: number of couplings.
        hidden_dims: widths of the conditioners' hidden layers; None is ``[32, 32]``.
        count_bins: bins of each spline.
        bound: the splines live on ``[-bound, bound]``, in units of the affine map's scale. Heavy tails need the room.
        base: "normal" or "student_t" (learned degrees of freedom, 10 at first).
        affine: scale of the affine map, "full", "diagonal" or "low_rank" (diagonal times identity plus rank 8); None
            is "full" for up to 200 latents and "diagonal" for more. Beyond 200 latents permutations take the place of
            the learned matrices between the couplings.
        hierarchical: let location and scale of the latents of a site depend on the sites that the model samples before
            it, as in a hierarchical posterior; without effect for a single site.
        num_components: number of flows, int >= 1; the guide is their mixture, for a posterior with several modes. They
            start at the modes that are found from ``init_loc_fn``, from draws of the prior and from their mirror images
            in unconstrained space; those without a mode of their own start around the largest. A step costs about
            three times as much with two components as with one. The weights learn in ``fit``, under ``Trace_ELBO`` and
            under ``ForwardKL``; objectives that differentiate through draws alone do not teach them. Not for angles,
            nor for ``from_guide``, ``JitTrace_ELBO`` and NeuTra.
        path_gradient: the sticking-the-landing gradient under ``Trace_ELBO`` (see
            :class:`~pyro_flowkit.FlowDistribution`), except at steps where it would be the noisier one, as it is far
            from the posterior (:mod:`pyro_flowkit.guides.posterior`).

    In a loop of one's own the guide watches its steps: at any rate from 1e-3 to 5e-2, from one particle on, under Adam,
    ``ClippedAdam`` or SGD with momentum it moves no farther than its parts bear (:mod:`pyro_flowkit.guides.pace`). The
    gradients of its parameters are in units of their size for that. Under ``JitTrace_ELBO``, whose trace never calls
    the guide again, it takes the rate as it is, and the path gradient only while the flow bends little.

    Device and dtype are those of the model's latents; ``.to()`` or ``.double()`` before the first call wins.

    Angles (latents with the prior ``VonMises``, ``SineBivariateVonMises`` or ``SineSkewed``, in a model whose density
    does not change by whole turns of them) live on a circle, not on the real line that Pyro has for them: their values
    lie within half a turn of a centre, opposite to where there is least of the posterior's mass, or at the value that
    ``init_loc_fn`` gives, until ``fit`` finds a better one. On the line the ELBO would be no bound
    (:mod:`pyro_flowkit.guides.circular`).

    Masked latents (``poutine.mask``, ``fn.mask``, ``obs_mask``): an element that is masked, and that nothing else in
    the model depends on, is no part of the guide. It has the value of ``init_loc_fn``, and neither log p nor log q: a
    row that was padded, or what ``obs_mask`` has in the place of an observation. A masked element that the model
    depends on has a flat density, as Pyro's ``dist.Normal(0, 1).mask(False)``, and a log q like every other latent.
    Which is which is settled at setup; a call with another mask is an error (:mod:`pyro_flowkit.guides.masked`).

    Raises:
        ValueError: for bad settings; at setup, for a latent whose support real numbers cannot be mapped onto (discrete,
            a sphere) or that follows other latents, and for latents inside a subsampled plate, with what to do
            instead (``docs/howto/supports.md`` has a table); for a mask that is not that of the setup.
        RuntimeError: at setup for a model without latents, and from whatever needs parameters before setup.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.guides import AutoSplineFlow
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoSplineFlow(model).setup()
        >>> guide.sample(5)["mu"].shape
        torch.Size([5])
    """

    _warns_of_other_name = True
    _sees_to_its_pace = True
    _runs_in_the_kernel = True
    latent_dim: int
    _init_loc: Callable[[], Tensor]
    _create_plates: Callable[..., Any]
    _cond_indep_stacks: dict[str, Any]
    _unconstrained_shapes: dict[str, torch.Size]
    hierarchy: HierarchicalAffine | None

    _noise_squares: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[[dict], Tensor] | None = None,
        init_scale: float | None = None,
        num_transforms: int = 4,
        hidden_dims: Sequence[int] | None = None,
        count_bins: int = 8,
        bound: float = 10.0,
        base: Literal["normal", "student_t"] = "normal",
        affine: AffineKind | None = None,
        hierarchical: bool = True,
        num_components: int = 1,
        path_gradient: bool = True,
    ):
        if init_scale is not None and not (isinstance(init_scale, float) and init_scale > 0):
            raise ValueError(f"Expected init_scale to be a float > 0, got {init_scale!r}.")
        if base not in ("normal", "student_t"):
            raise ValueError(f'Expected base to be "normal" or "student_t", got {base!r}.')
        if affine not in (None, "full", "diagonal", "low_rank"):
            raise ValueError(
                f'Expected affine to be "full", "diagonal", "low_rank" or None, got {affine!r}.'
            )
        if type(num_components) is not int or num_components < 1:
            raise ValueError(f"Expected num_components to be an int >= 1, got {num_components!r}.")
        AutoContinuous.__init__(self, model, init_loc_fn=initialisation(init_loc_fn))
        self._given = (model, init_loc_fn is not None)
        # how training went, not what was learned: no part of the state_dict, but of checkpoints
        self.register_buffer("_noise_squares", GradientNoise.at_first(), persistent=False)
        self._said_undefined = False
        self._warm_start: tuple[dict[str, int], Gaussian] | None = None
        self.base_kind = base
        self.init_scale = DEFAULT_INIT_SCALE if init_scale is None else init_scale
        self._affine_kind = affine
        self._hierarchical = hierarchical
        self.num_components = num_components
        self.path_gradient = path_gradient
        self._flow_settings: dict[str, Any] = {
            "num_transforms": num_transforms,
            "hidden_dims": HIDDEN_DIMS if hidden_dims is None else hidden_dims,
            "count_bins": count_bins,
            "bound": bound,
            "base": base,
        }
        SplineFlow(1, **self._flow_settings)  # bad settings are said here, not at the first call
        self._conversions: list[Callable[[Tensor], Tensor]] = []

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

    def setup(self, *args: Any, **kwargs: Any) -> "AutoSplineFlow":
        """Run the model once on these arguments and build the parameters; nothing happens if that was done before.

        Returns:
            The guide itself.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            with poutine.block():
                self._create_plates(*args, **kwargs)
                self.sync_with_store()
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            self._refuse_subsampled_latents()
            self._leave_out_idle(args, kwargs)
        except Exception:
            self.prototype_trace = None  # a guide that was refused is not set up
            raise
        angular = angular_columns(self)
        lighten(cast(poutine.Trace, self.prototype_trace))
        loc = self._choose_loc(args, kwargs)
        self._noise_squares = self._noise_squares.to(loc)
        self.flow, self.hierarchy = self._make_flow(loc)
        kind = self._scale_kind()
        cut = self._cut(angular, loc, args, kwargs) if angular else None
        if cut is not None and cut.columns:
            if self.num_components > 1:
                raise ValueError(
                    f"Expected num_components=1 for a model with angles, got {self.num_components}: an angle is cut "
                    "open at one place, and components in different modes would need several."
                )
            self.affine = CircularAffine(cut, self.init_scale, kind)
        else:
            self.affine = Affine(loc, self.init_scale, kind)
        if self._warm_start is not None:
            self._start_warm(*self._warm_start)
        self.pace = paced(self.flow, self.hierarchy, self.affine, is_active=self._sees_to_its_pace)
        self.others = nn.ModuleList()
        if self.num_components > 1:
            self._add_components(loc, args, kwargs)
        self._convert()

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments that make another guide like this, as numbers and text; not ``init_loc_fn``."""
        flow = {**self._flow_settings, "hidden_dims": list(self._flow_settings["hidden_dims"])}
        return {
            **flow,
            "init_scale": self.init_scale,
            "affine": self._affine_kind,
            "hierarchical": self._hierarchical,
            "num_components": self.num_components,
            "path_gradient": self.path_gradient,
        }

    def _scale_kind(self) -> AffineKind:
        return self._affine_kind or ("diagonal" if self.latent_dim > MAX_FULL_DIM else "full")

    def _make_flow(self, loc: Tensor) -> tuple[SplineFlow, HierarchicalAffine | None]:
        """What a component has before its last layer."""
        mixing: Literal["permute", "lu"] = "permute" if self.latent_dim > MAX_FULL_DIM else "lu"
        flow = SplineFlow(self.latent_dim, mixing=mixing, **self._flow_settings)
        sizes = list(self._site_sizes().values())
        hierarchy = make_hierarchy(sizes, loc) if self._hierarchical else None
        return flow.to(dtype=loc.dtype, device=loc.device), hierarchy

    def _add_components(self, loc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start every component at a mode, with weights by the modes' masses."""
        self.mixture = MixtureWeights(self.num_components, loc)
        for _ in range(self.num_components - 1):
            affine = Affine(loc, self.init_scale, self._scale_kind())
            self.others.append(OtherComponent(*self._make_flow(loc), affine))
        places = self._places(loc, args, kwargs)
        with torch.no_grad():
            for component, place in zip(self.components, places, strict=True):
                component.affine.raw_loc.copy_(place.gaussian.loc / component.affine.rate)
        self.mixture.restart(place.elbo for place in places)

    @property
    def components(self) -> list[Component]:
        """The parts of every component; those of the first are the guide's own."""
        self._require_setup()
        first = Component(self.flow, self.hierarchy, self.affine, self.pace, self._noise_squares)
        return [first, *(cast(OtherComponent, other).component for other in self.others)]

    def _refuse_subsampled_latents(self) -> None:
        for name, stack in self._cond_indep_stacks.items():
            for frame in stack:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f"Expected every latent outside of subsampled plates, got {name!r} inside plate "
                        f"{frame.name!r}, which subsamples {frame.size} of {frame.full_size}: a guide without "
                        "amortisation would tie the slots of a minibatch to the latents of other rows. Use "
                        "AmortizedSplineFlow, or the whole plate."
                    )

    def recipe(self) -> Recipe:
        """What :func:`pyro_flowkit.fit` should do where its caller does not say."""
        return Recipe(
            lr=3e-3,
            num_particles=128,
            scheduler="flat_cosine",
            warmup_steps=30,
            max_steps=4000,
        )

    def parameter_groups(self) -> list[tuple[list[Tensor], float]]:
        """The rates of the affine maps and of the hierarchical ones, for ``fit``.

        The first move ten times as far in a step of a given rate, and need less once they have started at the best
        Gaussian. The outputs of the second are divided by the square root of the number of their terms.
        """
        rates = (
            ([component.affine for component in self.components], AFFINE_LR),
            ([component.hierarchy for component in self.components], HIERARCHY_LR),
        )
        groups = [
            ([p for part in parts if part is not None for p in part.parameters()], rate)
            for parts, rate in rates
        ]
        return [(parameters, rate) for parameters, rate in groups if parameters]

    def find_start(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        max_seconds: float = 30.0,
        found: Mapping[str, Tensor] | None = None,
    ) -> GaussianStart | None:
        """Move the affine map of a fresh guide to the best Gaussian for the model, before training.

        A guide that was trained already stays where it is.

        Args:
            model: the model that the guide will be trained on, usually its own.
            args: its arguments, with all of the data.
            kwargs: its keyword arguments.
            max_seconds: of the search for that Gaussian.
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

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; ``{site: value}``, with the model's arguments."""
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        self.sync_with_store()
        return super().forward(*args, **kwargs)

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
        self._require_setup()
        if self._runs_in_the_kernel and self.num_components == 1:
            self._look()
            found = kernel_draw(
                self.flow.base,
                self._layers(),
                self._gradient_noise(),
                self._say_undefined,
                num_samples=num_samples,
                path_gradient=self.path_gradient,
            )
            if found is not None:
                if torch.is_grad_enabled():
                    self._drew(num_samples)
                return *found, None
        posterior = self.get_posterior()
        if torch.is_grad_enabled():
            self._drew(num_samples)
        if isinstance(posterior, MixturePosterior):
            return posterior.stratified(num_samples)
        latent = posterior.rsample((num_samples,))
        parts = posterior.score_parts(latent)
        return latent, parts.log_prob, cast(Tensor, parts.entropy_term), None

    def elbo(self, program: Vectorized, num_particles: int) -> LatentELBO | None:
        """The objective for this guide and its model at many draws, without handlers; None if it has none."""
        if (
            program.way != "graph" or self.idle is not None
        ):  # the handlers compare masks at every call
            return None
        return LatentELBO(program, num_particles)

    def check_objective(self, objective: ELBO) -> None:
        """Raise a ValueError unless it knows score functions, or takes draws as given: components need that."""
        by_score = isinstance(objective, Trace_ELBO) and not isinstance(objective, JitTrace_ELBO)
        if self.num_components == 1 or by_score:
            return
        if not getattr(objective, "takes_draws_as_given", False):
            raise ValueError(
                f"expected Trace_ELBO or ForwardKL for the {self.num_components} components of "
                f"{type(self).__name__}, got {type(objective).__name__}: their weights are learned by a "
                "score function outside of traces, or at draws that are given"
            )

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

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self._require_setup()
        self._look()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self._stored_values_taken()
        return loaded

    def _stored_values_taken(self) -> None:
        for pace in self._paces():
            pace.forget()

    def __getstate__(self) -> dict[str, Any]:
        if self.prototype_trace is not None:
            self._look()
        return {**super().__getstate__(), "_given": (None, self._given[1])}

    def __deepcopy__(self, memo: dict) -> Self:
        new = super().__deepcopy__(memo)
        new._given = self._given
        return new
