"""How guides map real numbers onto the support of a latent, and what is said where that does not work.

A guide maps onto the support that a latent has at setup. So a support has to be one that real numbers can be mapped
onto, and the same at every call; where it is not, the error names the latent and the way out. There is a table
of supports in ``docs/howto/supports.md``. PyTorch's registry is left alone: :func:`bijection_to` looks there for what
it does not know.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints, transforms
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import (
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    StackTransform,
    Transform,
)

from pyro_flowkit.guides.bijections import (
    Between,
    CorrCholesky,
    HalfLine,
    LowerCholesky,
    PositiveDefinite,
    StickBreaking,
)
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.warning import warn

MOVE = 0.1  # of the unconstrained latents, as the first draws of a guide are
CHECK_EVERY = 100  # calls, as each check waits for the device
MAX_EDGE_RATE = 5e-4
MEMORY = 0.99


def _independent(support: Any) -> Transform:
    return IndependentTransform(
        bijection_to(support.base_constraint), support.reinterpreted_batch_ndims
    )


def _correlation(_: Any) -> Transform:
    return ComposeTransform([CorrCholesky(), transforms.CorrMatrixCholeskyTransform().inv])


def _cat(support: Any) -> Transform:
    return CatTransform([bijection_to(c) for c in support.cseq], support.dim, support.lengths)


def _stack(support: Any) -> Transform:
    return StackTransform([bijection_to(c) for c in support.cseq], support.dim)


_BIJECTIONS: dict[type, Callable[[Any], Transform]] = {
    type(constraints.positive): lambda support: HalfLine(support.lower_bound),
    type(constraints.nonnegative): lambda support: HalfLine(support.lower_bound),
    constraints.less_than: lambda support: HalfLine(support.upper_bound, direction=-1),
    constraints.interval: lambda support: Between(support.lower_bound, support.upper_bound),
    constraints.half_open_interval: lambda support: Between(
        support.lower_bound, support.upper_bound
    ),
    type(constraints.simplex): lambda _: StickBreaking(),
    type(constraints.corr_cholesky): lambda _: CorrCholesky(),
    type(constraints.corr_matrix): _correlation,
    type(constraints.lower_cholesky): lambda _: LowerCholesky(),
    type(constraints.positive_definite): lambda _: PositiveDefinite(),
    type(constraints.positive_semidefinite): lambda _: PositiveDefinite(),
    constraints.independent: _independent,
    constraints.cat: _cat,
    constraints.stack: _stack,
    MixtureSameFamilyConstraint: lambda support: bijection_to(support.base_constraint),
}


def bijection_to(support: constraints.Constraint) -> Transform:
    """The bijection from real numbers onto a support, the same function as ``torch.distributions.biject_to`` has.

    Raises:
        NotImplementedError: for a support without one.
    """
    if type(support) in _BIJECTIONS:
        return _BIJECTIONS[type(support)](support)
    return biject_to(support)


def bijection_of(site: dict[str, Any]) -> Transform:
    """The same for the support of a latent.

    Args:
        site: a sample site of a trace.

    Raises:
        ValueError: for a support without one; it names the latent and says what to do instead.
    """
    name, fn = site["name"], site["fn"]
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        kind = type(getattr(fn, "base_dist", fn)).__name__
        raise ValueError(
            f"Expected a support for {name!r}, got {kind}, which has none: give its class the property "
            "support, one of pyro.distributions.constraints."
        ) from None
    try:
        with helpful_support_errors(site):
            return bijection_to(support)
    except NotImplementedError:
        raise ValueError(
            f"Expected a support that real numbers can be mapped onto for {name!r}, got {support!r}: sample real "
            "numbers, and compute the latent from them in the model, or hide it from the guide "
            f"(poutine.block(model, hide=[{name!r}]))."
        ) from None


def initialisation(init_loc_fn: Callable[..., Any] | None) -> Callable[[dict[str, Any]], Tensor]:
    """An init function for priors that cannot be sampled, too.

    Args:
        init_loc_fn: that of the user; None is the prior's median, or the image of the origin where it has none.
    """
    return partial(_initialise, init_loc_fn)


def _initialise(init_loc_fn: Callable[..., Any] | None, site: dict[str, Any]) -> Tensor:
    try:
        with warnings.catch_warnings():  # the sample of a Wishart only gives the shape
            warnings.filterwarnings("ignore", "Singular sample detected")
            return (init_to_median if init_loc_fn is None else init_loc_fn)(site)
    except NotImplementedError:
        transform = bijection_of(site)
        if init_loc_fn is not None:
            raise ValueError(
                f"Expected init_loc_fn to give a value for {site['name']!r}, got none, as "
                f"{type(site['fn']).__name__} cannot be sampled: use init_to_value, or leave init_loc_fn out."
            ) from None
    shape = site["fn"].batch_shape + site["fn"].event_shape
    return cast(Tensor, transform(torch.zeros(transform.inverse_shape(shape))))


def refuse_changing_supports(
    trace: poutine.Trace, model: Callable[..., Any], args: tuple, kwargs: dict
) -> None:
    """Raise a ValueError if the support of a latent follows other latents, parameters or random numbers.

    The model is run once more, with other values of the latents, unless all bounds are plain numbers.

    Args:
        trace: a prototype, with its distributions.
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    sites = dict(trace.iter_stochastic_nodes())
    supports = {name: site["fn"].support for name, site in sites.items()}
    if not any(_has_tensors(support) for support in supports.values()):
        return
    device = next(iter(sites.values()))["value"].device
    with fixed_seed(device, seed=1):
        values = {name: _moved(site) for name, site in sites.items()}
        with torch.enable_grad(), poutine.block(), pyro.validation_enabled(False):
            try:
                moved = poutine.trace(poutine.condition(model, data=values)).get_trace(
                    *args, **kwargs
                )
            except Exception:  # training will say what is wrong with such a model
                return
    for name, support in supports.items():
        if name in moved.nodes and not _is_same(support, moved.nodes[name]["fn"].support):
            raise ValueError(
                f"Expected the support of {name!r} to be the same at every call, got {support!r}, which follows "
                "other latents, parameters or random numbers: sample it on a fixed support, and move it in the model, "
                f'such as {name} = low + (high - low) * pyro.sample("{name}_unit", dist.Uniform(0.0, 1.0)).'
            )


@torch.no_grad()
def _moved(site: dict[str, Any]) -> Tensor:
    transform = bijection_of(site)
    unconstrained = transform.inv(site["value"])
    return cast(Tensor, transform(unconstrained + MOVE * torch.randn_like(unconstrained)))


def _has_tensors(support: Any) -> bool:
    if isinstance(support, list | tuple):
        return any(_has_tensors(part) for part in support)
    if isinstance(support, constraints.Constraint):
        return any(_has_tensors(part) for part in vars(support).values())
    return isinstance(support, Tensor)


def _is_same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return not second.requires_grad and torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(
            _is_same(*pair) for pair in zip(first, second, strict=True)
        )
    if isinstance(first, constraints.Constraint):
        return all(_is_same(part, vars(second).get(key)) for key, part in vars(first).items())
    return not isinstance(first, int | float) or first == second


class Edges:
    """How often draws reach the last value that their dtype can hold, where the bound loses mass; warns once a latent.

    A device is asked only at every hundredth call.
    """

    def __init__(self) -> None:
        self._rates: dict[str, Tensor] = {}
        self._calls = 0
        self._warned: set[str] = set()

    @torch.no_grad()
    def note(self, name: str, support: Any, value: Tensor, size: int) -> None:
        """Take in draws of a latent.

        Args:
            name: of the latent.
            support: of the latent.
            value: draws, with any particles and rows to the left.
            size: number of values in one draw.
        """
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        transform = bijection_to(support)
        if name in self._warned or not hasattr(transform, "at_edge"):
            return
        hits = transform.at_edge(value).sum() * (size / max(1, value.numel()))
        rate = self._rates.get(name)
        self._rates[name] = hits if rate is None else torch.lerp(hits, rate.to(hits), MEMORY)

    def check(self) -> None:
        """Warn at every hundredth call; to be called once for each call of the guide."""
        self._calls += 1
        if self._calls % CHECK_EVERY == 0:
            self.warn()

    def warn(self) -> None:
        """Warn of the latents whose draws are at the edge too often."""
        for name, rate in self._rates.items():
            if name not in self._warned and float(rate) > MAX_EDGE_RATE:
                self._warned.add(name)
                warn(
                    f"Expected draws of {name!r} within the numbers of their dtype, got {float(rate):.2g} values a "
                    "draw at the edge of its support: what lies beyond is cut off, and ELBO and evidence are too "
                    "low. Run model and guide in float64 (torch.set_default_dtype(torch.float64)), which reaches "
                    "nearer to 0, or let the model sample a logarithm or logit."
                )
