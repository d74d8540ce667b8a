r"""AmortizedSplineFlow: a guide for local latents, one for each datum of a (subsampled) plate.

With x_i the data, z_i their local latents and t the global ones, in unconstrained space,

    c_i = (encoder(x_i), t),   e ~ base,   z_i = m(c_i) + S(c_i) f(e; c_i),   t ~ global guide,

where f is a conditional spline flow, the identity at first, which waits while m and S go to where the posterior is
(:mod:`pyro_flowkit.head_start`), and t is part of the context only with ``condition_on_global=True``. What is learned
is a function of the data: minibatches may have any size, and the posterior of data that were not seen in training is a
call of the guide.

References:
    Diederik P. Kingma, Max Welling. Auto-Encoding Variational Bayes. ICLR 2014.

    Abhinav Agrawal, Justin Domke. Amortized Variational Inference for Simple Hierarchical Models. NeurIPS 2021.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.amortized_draws import AmortizedDraws
from pyro_flowkit.guides.amortized_summaries import AmortizedSummaries
from pyro_flowkit.guides.component import DEFAULT_INIT_SCALE, check_start
from pyro_flowkit.guides.data_plate import (
    PlateCall,
    choose_plate,
    refuse_other_subsampled,
    split,
    warn_of_untrained,
)
from pyro_flowkit.guides.data_rows import DataRows
from pyro_flowkit.guides.global_spline_flow import GlobalPart, centred
from pyro_flowkit.guides.lazy import lighten
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.guides.masked_rows import MaskedRows
from pyro_flowkit.guides.posterior import AmortizedPosterior, condition
from pyro_flowkit.guides.supports import (
    Edges,
    bijection_to,
    initialisation,
    refuse_changing_supports,
)
from pyro_flowkit.guides.without_masked import whole_model
from pyro_flowkit.head_start import HeadStart
from pyro_flowkit.moves import Stride
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.recipe import Recipe
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.transforms.base import check_size
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine


class AmortizedSplineFlow(GlobalPart, AmortizedDraws, AmortizedSummaries, DataRows):
    """Guide for a model with a latent for every datum::

        def model(x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", N, subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        guide = AmortizedSplineFlow(model, encoder, context_dim=8)

    Args:
        model: a Pyro model. All its continuous latents inside the data's plate are local, the others are global.
        encoder: ``encoder(*args, **kwargs)``, with the model's arguments, gives features of shape
            ``(batch, context_dim)``, a row for each datum: of the batch, or of all data where the model itself draws
            the rows of its plate. A module is part of the guide, and trained and saved with it; a function may call
            ``pyro.module``.
        context_dim: number of features.
        plate: name of the data's plate; None is the only subsampled plate with latents, or the only plate.
        create_plates: gives the guide's plates, from the model's arguments; without it they are made as the model
            makes them.
        global_guide: guide for the global latents, with the model's arguments: an autoguide for
            ``poutine.block(model, hide=[...])``, or a function. None is an :class:`AutoSplineFlow` with antithetic
            particles. Its splines learn nothing until its affine map is near the posterior
            (:mod:`pyro_flowkit.guides.global_spline_flow`), and are frozen if the plate is subsampled at setup, which
            leaves the Gaussian: the noise of minibatches would bend them.
            ``guide.global_guide.flow.requires_grad_()`` lets them learn there, too.
        condition_on_global: let the local latents depend on the draws of the global ones.
        init_loc_fn: per-site initialisation (``pyro.infer.autoguide.initialization``); None is ``init_to_median``.
            The local latents start at its mean over the rows.
        init_scale: initial standard deviation of every unconstrained latent, a float > 0; None is 0.1.
        num_transforms: number of couplings.
        hidden_dims: widths of the conditioners' hidden layers; None is two of 10 for every local latent and number of
            the context, at least 32 and at most 128.
        count_bins: bins of each spline.
        bound: the splines live on ``[-bound, bound]``, in units of the affine map's scale.
        base: "normal" or "student_t" (learned degrees of freedom, 10 at first).
        affine: scale of the affine map, "full" (lower triangular) or "diagonal"; None is "full" up to 32 local latents.
        path_gradient: the sticking-the-landing gradient under ``Trace_ELBO``, of local and global draws together.

    Masked local latents (``poutine.mask``, ``fn.mask``, ``obs_mask``), with masks that may change from call to call: a
    row that is masked as a whole, such as one of padding, has no log q; a part of a row has the guide's initial normal
    density (:mod:`pyro_flowkit.guides.masked_rows`), which the guide can follow if the encoder sees the mask. Both
    count only what nothing else in the model depends on, as in :class:`AutoSplineFlow`. The guide runs the model up to
    its last latent, without gradients, to read the masks, if any local latent has one at setup.

    In a loop of one's own, and in ``fit`` with a rate of one's own, its networks move at a rate of 0.004 at most under
    Adam and its relatives (:mod:`pyro_flowkit.moves`); a trace of ``JitTrace_ELBO`` takes the rate as it is. The
    encoder has that of the optimizer, and at 0.05 may explode by itself.

    Plates around a local latent, other than the data's, are part of its datum and must not be subsampled. Device and
    dtype are those of the model's local latents; ``.to()`` or ``.double()`` before the first call wins. The encoder
    keeps its own unless that was called.

    Raises:
        ValueError: for bad settings or an encoder's output of another shape; at setup, for a support that is
            refused (``docs/howto/supports.md``), no or several plates that could be meant, or a global guide that
            leaves latents out.
        RuntimeError: from whatever needs parameters before setup.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.guides import AmortizedSplineFlow
        >>> def model(x):
        ...     with pyro.plate("data", 1000, subsample_size=len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)
        >>> guide = AmortizedSplineFlow(model, torch.nn.Linear(3, 4), context_dim=4)
        >>> guide(torch.randn(10, 3))["z"].shape
        torch.Size([10])
    """

    _warns_of_other_name = True
    _keep_own_entries = ("global_guide",)

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Tensor],
        *,
        context_dim: int,
        plate: str | None = None,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None = None,
        global_guide: Callable[..., Any] | None = None,
        condition_on_global: bool = False,
        init_loc_fn: Callable[[dict], Tensor] | None = None,
        init_scale: float | None = None,
        num_transforms: int = 4,
        hidden_dims: Sequence[int] | None = None,
        count_bins: int = 8,
        bound: float = 5.0,
        base: Literal["normal", "student_t"] = "normal",
        affine: Literal["full", "diagonal"] | None = None,
        path_gradient: bool = True,
    ):
        check_size("context_dim", context_dim)
        if not callable(encoder):
            raise ValueError(f"Expected encoder to be a module or a function, got {encoder!r}.")
        check_start(init_scale, base)
        if affine not in ("full", "diagonal", None):
            raise ValueError(f'Expected affine to be "full" or "diagonal", got {affine!r}.')
        init_loc_fn = initialisation(init_loc_fn)
        AutoGuide.__init__(self, InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self._conversions = []
        self._plain_model = (model,)
        self._encoder_function = (None if isinstance(encoder, nn.Module) else encoder,)
        self.encoder = encoder if isinstance(encoder, nn.Module) else None
        self.context_dim = context_dim
        self.plate_name = plate
        self.condition_on_global = condition_on_global
        self.init_loc_fn = init_loc_fn
        self.init_scale = DEFAULT_INIT_SCALE if init_scale is None else init_scale
        self.affine_kind = affine
        self.path_gradient = path_gradient
        self._flow_settings: dict[str, Any] = {
            "num_transforms": num_transforms,
            "count_bins": count_bins,
            "bound": bound,
            "base": base,
        }
        SplineFlow(1, **self._flow_settings, hidden_dims=hidden_dims)  # bad settings are said here
        self._hidden_dims = None if hidden_dims is None else list(hidden_dims)
        if global_guide is not None and not isinstance(global_guide, AutoGuide):
            global_guide = AutoCallable(model, global_guide)
        self.global_guide = global_guide

    def setup(self, *args: Any, **kwargs: Any) -> "AmortizedSplineFlow":
        """Run model and encoder once on these arguments and build the parameters, unless that was done before.

        Returns:
            The guide itself.
        """
        if self.prototype_trace is None:
            try:
                self._early_conversions = list(self._conversions)
                self._setup_prototype(*args, **kwargs)
                with poutine.block():
                    self._create_plates(*args, **kwargs)
                    self.sync_with_store()
                    self._setup_global_guide(args, kwargs)
                    features = self._encode(args, kwargs)
                    with self.plates[self._plate] as rows:
                        self._features_of(rows, features)
                warn_of_untrained(features, self)
            except Exception:
                self.prototype_trace = None  # a guide that was refused is not set up
                self._conversions = self._early_conversions
                raise
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        AutoGuide._setup_prototype(self, *args, **kwargs)
        trace = cast(poutine.Trace, self.prototype_trace)
        nodes = [node for _, node in trace.iter_stochastic_nodes()]
        Latents(nodes)  # says which latents cannot be handled
        refuse_changing_supports(trace, self._plain_model[0], args, kwargs)
        self._edges = Edges()
        frame = choose_plate(nodes, self.plate_name)
        self._plate, self._dim = frame.name, frame.dim
        local, others = split(nodes, frame.name)
        refuse_other_subsampled(nodes if self.global_guide is None else local, frame.name)
        self._local, self._global = Latents(local, frame.dim), Latents(others)
        if self.condition_on_global and not others:
            raise ValueError("Expected global latents for condition_on_global=True, got none.")
        self._prototype_call = PlateCall(frame.full_size or frame.size, frame.size)
        self._first_values = {node["name"]: node["value"].detach() for node in others}
        whole = whole_model(self, self._plain_model[0])
        self._masked = MaskedRows(whole, trace, self._local, args, kwargs)
        self._build(self._local.initial(trace.nodes))
        lighten(trace)

    def _build(self, loc: Tensor) -> None:
        size = self._local.size
        context_dim = self.context_dim
        if self.condition_on_global:
            context_dim += self._global.size
        hidden_dims = self._hidden_dims or [min(128, max(32, 10 * (size + context_dim)))] * 2
        flow = SplineFlow(size, context_dim, hidden_dims=hidden_dims, **self._flow_settings)
        # the guide has a map of its own, which starts at the prior's location
        flow.affine = flow.stride = None
        self.flow = flow.to(dtype=loc.dtype, device=loc.device)
        if self._masked.names:
            self.register_buffer("masked_loc", loc.clone())
        kind = self.affine_kind or ("full" if size <= 32 else "diagonal")
        self.affine = ConditionalAffine(
            loc, self.init_scale, context_dim, kind, hidden_dims=hidden_dims
        )
        self.affine.starts_by_draws = False  # but by what the encoder says, without the globals
        self.head_start = HeadStart(self.affine)
        parts: list[list[nn.Module]] = [[self.affine.network], [self.flow.layers, self.flow.base]]
        self.stride = Stride(parts, "an AmortizedSplineFlow")
        self._convert()

    def recipe(self) -> Recipe:
        """What :func:`pyro_flowkit.fit` should do where its caller does not say."""
        return Recipe(lr=3e-3, num_particles=4, scheduler="cosine")

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; ``{site: value}``, with the model's arguments."""
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        self.sync_with_store()
        self._lead()
        plates = self._create_plates(*args, **kwargs)
        result = {}
        global_context = None
        if self.global_guide is not None:
            result.update(self.global_guide(*args, **kwargs))
            if self.condition_on_global:
                global_context = centred(self.global_guide, self._global, result)
        features = self._encode(args, kwargs)
        with plates[self._plate] as rows:
            own_features = self._features_of(rows, features)
            posterior = self._posterior(own_features, global_context)
        self.head_start.give(posterior, self.flow.layers, self.affine)
        self.stride.follow(posterior)
        self.affine.start(own_features)
        masks = self._row_masks(rows, args, kwargs)
        with plates[self._plate], masks.around():
            latent = pyro.sample(
                f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True}
            )
        for site, unconstrained in self._local.unpack(latent):
            value = bijection_to(site.support)(unconstrained)
            log_density: Any = 0.0
            if poutine.get_mask() is not False:
                log_density = masks.log_density(site, unconstrained, value)
            if not is_transformed():
                counted = masks.counted(site, value)
                self._edges.note(site.name, site.support, counted, site.size)
            with ExitStack() as stack:
                stack.enter_context(masks.around())
                for name in site.plates:
                    stack.enter_context(plates[name])
                delta = dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
                result[site.name] = pyro.sample(site.name, delta)
        self._edges.check()
        return result

    def _posterior(self, features: Tensor, global_context: Tensor | None) -> AmortizedPosterior:
        return condition(
            self.flow.base(),
            list(self.flow.layers),
            self.affine,
            features,
            global_context,
            path_gradient=self.path_gradient,
        )

    def get_posterior(
        self, *args: Any, given: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> AmortizedPosterior:
        """Distribution of the unconstrained local latents of these data.

        Args:
            args: the model's arguments.
            given: values of the global latents, where the local ones are conditioned on them; None is their medians.
            kwargs: the model's keyword arguments.

        Returns:
            A flow distribution with a row for each row of the encoder's features and event shape ``(D,)``, D local
            latents in the order of the model; :meth:`unpack` gives their values.
        """
        self._require_setup()
        self.sync_with_store(lend=False)
        global_context = None
        if self.condition_on_global:
            with poutine.block(), fixed_seed(self.affine.weight.device):
                self._create_plates(*args, **kwargs)
                self._lead()
                values = self._global_medians(args, kwargs) if given is None else given
            global_context = centred(self.global_guide, self._global, values)
        return self._posterior(self._encode(args, kwargs), global_context)

    def __getstate__(self) -> dict[str, Any]:
        self._look()
        return {**super().__getstate__(), "_plain_model": (None,)}

    def __deepcopy__(self, memo: dict) -> "AmortizedSplineFlow":
        new = super().__deepcopy__(memo)
        new._plain_model = self._plain_model
        return new
