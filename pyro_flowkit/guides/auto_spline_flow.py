"""AutoSplineFlow: an autoguide over all continuous latents of a model, a spline flow and then a learned affine map.

In unconstrained space the guide is

    z ~ base,    latent = loc + S h(f(z)),

where f is a spline flow and h scales and moves the latents of each site as a function of those of the sites before it
(:mod:`pyro_flowkit.transforms.hierarchical_affine`); both are the identity at first. loc and S (full or diagonal)
are learned: at step 0 the guide is the Gaussian that Pyro's AutoMultivariateNormal and AutoDiagonalNormal start from,
and it only leaves the Gaussians where that raises the ELBO. With ``num_components`` above 1 it is a mixture of such
densities, each with its own flow and affine maps, which start at the posterior's modes
(:mod:`pyro_flowkit.guides.mixture`).

References:
    Abhinav Agrawal, Daniel Sheldon, Justin Domke. Advances in Black-Box VI: Normalizing Flows, Importance Weighting,
    and Optimization. NeurIPS 2020.

    Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing. NeurIPS 2017 (``path_gradient``).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, cast

import torch
from pyro import poutine
from pyro.infer import ELBO, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn

from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.circular import CircularAffine, angular_columns
from pyro_flowkit.guides.component import (
    DEFAULT_INIT_SCALE,
    OtherComponent,
    check_start,
    make_hierarchy,
    paced,
)
from pyro_flowkit.guides.gaussian import Gaussian
from pyro_flowkit.guides.latent_elbo import LatentELBO
from pyro_flowkit.guides.lazy import lighten
from pyro_flowkit.guides.mixture import MixtureWeights
from pyro_flowkit.guides.posterior import GradientNoise
from pyro_flowkit.guides.start import Start
from pyro_flowkit.guides.storage import Storage
from pyro_flowkit.guides.summaries import Summaries
from pyro_flowkit.guides.supports import initialisation
from pyro_flowkit.programs.vectorized import Vectorized
from pyro_flowkit.recipe import Recipe
from pyro_flowkit.transforms.affine import Affine, AffineKind
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine

AFFINE_LR, HIERARCHY_LR = 9e-4, 6e-3
HIDDEN_DIMS = [32, 32]
# up to this many latents matrices with a row and a column for each are cheap
MAX_FULL_DIM = 200


class AutoSplineFlow(Summaries, Start, Storage):
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
            it, as in a hierarchical posterior: those of a Gaussian prior given them, times a Gaussian likelihood;
            without effect for a single site.
        num_components: number of flows, int >= 1; the guide is their mixture, for a posterior with several modes. They
            start at the modes that are found from ``init_loc_fn``, from draws of the prior and from their mirror images
            in unconstrained space; those without a mode of their own start around the largest. A step costs several
            times as much with two components as with one. The weights learn in ``fit``, under ``Trace_ELBO`` and
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
        check_start(init_scale, base)
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
            clip_ratio=8.0,
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
                f"Expected Trace_ELBO or ForwardKL for the {self.num_components} components of "
                f"{type(self).__name__}, got {type(objective).__name__}: their weights are learned by a "
                "score function outside of traces, or at draws that are given"
            )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; ``{site: value}``, with the model's arguments."""
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        self.sync_with_store()
        return super().forward(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self._require_setup()
        self._look()
        return super().state_dict(*args, **kwargs)

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
