r"""The posterior of a datum set free from the encoder: the family that a guide chooses from.

An encoder says the numbers of a distribution for every datum: location and scale, or the context of
a flow. The family is what these numbers can be, whatever the encoder says of them; the weights of a
flow are the same for all data and belong to the family. Freed, the numbers of every datum are
offsets from the encoder's, zero at first, in units of the encoder's own posterior:

    loc = loc_0 + scale_0 m,   scale = scale_0 exp(r)          Normal, StudentT, LogNormal, ...
    loc = loc_0 + L_0 m,       L = L_0 lower(r)                with a scale_tril
    loc = loc_0 + sd_0 m,      factor = factor_0 + sd_0 f      with a cov_factor
    a = a_0 exp(r),            b = b_0 exp(r + u m)            Gamma, Beta; u = sd of log(a / b)
    context = context_0 + s c                                  flows; s the spread over the data
    T(T^-1(parameter_0) + r)                                   others; T = transform_to(...)

so that one learning rate serves sharp and wide posteriors.

Where a site follows the draw of another one, as z1 of q(z2 | x) q(z1 | z2, x), the offsets of a datum are
the same for all of these draws: what the encoder says of z1 given z2 is moved and widened as a whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.programs.sites import innermost, is_point_mass, scored_sites
from pyro_flowkit.transforms.conditional import ConditionedTransform

ENCODER = "encoder"
"""Where a trace has the encoder's own distribution of a site with a ``Conditional`` posterior."""

_SAME = 1e-3  # nats, and relative
_LEAST_SPREAD = 0.1
_PAIRS = (("concentration", "rate"), ("concentration1", "concentration0"))
_REDUNDANT = {"scale_tril": ("covariance_matrix", "precision_matrix"), "logits": ("probs",)}


@dataclass(frozen=True)
class Family:
    """The distributions that the numbers of every datum can make.

    Attributes:
        zeros: the offsets of the encoder's own posterior.
        axes: the dimension of the data in each of them, negative.
        build: the distribution for offsets of these shapes, or the ``Conditional`` one.
        units: of the contexts of a flow: how far an offset of 1 moves them.
    """

    zeros: tuple[Tensor, ...]
    axes: tuple[int, ...]
    build: Callable[[Sequence[Tensor]], Any]
    units: tuple[Tensor, ...] = ()

    def start(self) -> list[Tensor]:
        """The offsets of the encoder's own posterior, ready to learn."""
        return [zero.clone().requires_grad_() for zero in self.zeros]

    def only(self, offsets: Sequence[Tensor], data: Tensor) -> list[Tensor]:
        """The offsets of these data (a mask), zeros for the others."""
        kept = []
        for offset, axis in zip(offsets, self.axes, strict=True):
            mask = data.to(offset.device).reshape([-1] + [1] * (-axis - 1))
            kept.append(torch.where(mask, offset.detach(), 0.0))
        return kept


@dataclass(frozen=True)
class Conditional:
    """The posterior of a site that follows the draw of another: what is made of the encoder's.

    Attributes:
        name: the site.
        dim: the dimension of the data's plate.
        like: the family of a first run, whose units are those of all.
        rounds: offsets, those of each round upon what the round before it made.
    """

    name: str
    dim: int
    like: Family
    rounds: tuple[tuple[Tensor, ...], ...] = ()

    def of(self, encoder: Any) -> Any:
        """The distribution, from that of the encoder in the same run."""
        fn = encoder
        for offsets in self.rounds:
            fn = family_of(fn, self.name, self.dim, self.like.units).build(offsets)
        return fn.expand(encoder.batch_shape)

    def family(self) -> Family:
        """What can be made of it by offsets of another round."""

        def build(offsets: Sequence[Tensor]) -> Conditional:
            return replace(self, rounds=(*self.rounds, tuple(offsets)))

        return replace(self.like, build=build)


class FreePosterior:
    """A guide in which the distributions of some sites are replaced by free ones.

    Args:
        guide: the guide, whose other statements run as they are.
        posteriors: the distribution of each freed site.
    """

    def __init__(self, guide: Callable, posteriors: Mapping[str, Any]):
        self.guide, self.posteriors = guide, posteriors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Replace(self.posteriors):
            return self.guide(*args, **kwargs)


class _Replace(Messenger):
    def __init__(self, posteriors: Mapping[str, Any]):
        super().__init__()
        self.posteriors = posteriors

    def _pyro_sample(self, msg: Any) -> None:
        posterior = self.posteriors.get(msg["name"])
        if isinstance(posterior, Conditional):
            msg["infer"] = {**msg["infer"], ENCODER: msg["fn"]}
            msg["fn"] = posterior.of(msg["fn"])
        elif posterior is not None:
            msg["fn"] = posterior.expand(msg["fn"].batch_shape)


def local_families(first: Any, second: Any, replayed: Any, dim: int) -> dict[str, Family]:
    """The family of every random site of a guide.

    Args:
        first: a trace of the guide.
        second: another one on the same data, with other draws.
        replayed: another one on the same data, with the draws of the first.
        dim: the dimension of the data's plate.

    Returns:
        Families by the name of the site. Point masses (``Delta``) are no random sites: they follow
        from the others, or stay where the encoder puts them.

    Raises:
        ValueError: if a site cannot be reparametrised or its distribution has no numbers to free,
            if there is none, or if the numbers of a site are not the same for the same draws.
    """
    families = {}
    for name, site in scored_sites(first):
        fn, value = site["fn"], site["value"].detach().clone()
        if site["is_observed"] or is_point_mass(fn):
            continue
        if not fn.has_rsample:
            raise ValueError(
                f"Expected reparametrised draws at site '{name}' of the guide, got "
                f"{_kind(fn)}: its posterior cannot be optimised by gradients of its draws"
            )
        if not _agree(fn, replayed.nodes[name]["fn"], value):
            raise ValueError(
                f"Expected the distribution of site '{name}' of the guide to be given by the data and "
                "the draws of other sites, got another one at a second run: the encoder itself is "
                "random (dropout in training mode?), and the gap of such a guide is not split"
            )
        family = family_of(fn, name, dim)
        if not _agree(fn, family.build(family.zeros).expand(fn.batch_shape), value):
            raise _nothing_to_free(fn, name)
        if not _agree(fn, second.nodes[name]["fn"], value):
            family = Conditional(name, dim, family).family()
        families[name] = family
    if not families:
        raise ValueError(
            "Expected a guide with random latents, got none: a point estimate has no ELBO to split"
        )
    return families


def _agree(fn: Any, other: Any, value: Tensor) -> bool:
    log_probs = fn.log_prob(value), other.log_prob(value)
    return torch.allclose(*log_probs, rtol=_SAME, atol=_SAME, equal_nan=True)


def family_of(fn: Any, name: str, dim: int, units: tuple[Tensor, ...] = ()) -> Family:
    """The family of a distribution, or of a ``Conditional`` one.

    Args:
        fn: has a batch dimension for the data.
        name: of the site.
        dim: that dimension, negative.
        units: those of a family of the same kind; of its own by default.
    """
    if isinstance(fn, Conditional):
        return fn.family()
    if isinstance(fn, torch.distributions.Independent):
        inner = family_of(fn.base_dist, name, dim - fn.reinterpreted_batch_ndims, units)
        count = fn.reinterpreted_batch_ndims
        return _wrapped(inner, lambda base: base.to_event(count))
    if isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask
        return _wrapped(family_of(fn.base_dist, name, dim, units), lambda base: base.mask(mask))
    if isinstance(fn, torch.distributions.TransformedDistribution) and not fn.arg_constraints:
        return _transformed(fn, name, dim, units)
    return _plain(fn, name, dim)


def _wrapped(inner: Family, wrap: Callable[[Any], Any]) -> Family:
    return replace(inner, build=lambda offsets: wrap(inner.build(offsets)))


def _plain(fn: Any, name: str, dim: int) -> Family:
    """A distribution that its constructor makes anew from the arguments that it constrains."""
    names = list(fn.arg_constraints)
    for kept, dropped in _REDUNDANT.items():
        if kept in names:
            names = [argument for argument in names if argument not in dropped]
    try:
        values = {n: getattr(fn, n) for n in names}
        moves = {n: _move(value, fn.arg_constraints[n]) for n, value in values.items()}
    except (AttributeError, NotImplementedError):
        moves = {}
    if not moves:
        raise _nothing_to_free(fn, name)
    zeros = {n: zero for n, (zero, _) in moves.items()}
    move = {n: function for n, (_, function) in moves.items()}
    if "loc" in values and "scale_tril" in values:
        loc, tril = values["loc"], values["scale_tril"]
        lower = transform_to(constraints.lower_cholesky)
        move["loc"] = lambda offset: loc + (tril @ offset.unsqueeze(-1)).squeeze(-1)
        move["scale_tril"] = lambda offset: tril @ lower(offset)
    elif "loc" in values and "cov_factor" in values:
        loc, factor, scale = values["loc"], values["cov_factor"], fn.variance.sqrt()
        move["loc"] = lambda offset: loc + scale * offset
        move["cov_factor"] = lambda offset: factor + scale.unsqueeze(-1) * offset
    elif "loc" in values and "scale" in values:
        loc, scale = values["loc"], values["scale"]
        move["loc"] = lambda offset: loc + scale * offset
        move["scale"] = lambda offset: scale * offset.exp()
    pair = next((pair for pair in _PAIRS if set(pair) <= set(values)), None)
    if pair is not None:
        start, second = (values[n] for n in pair)
        # Along a fixed ratio the width changes, across it the mean.
        variance = 1 / start + (0 if pair[1] == "rate" else 1 / second)
        unit = variance.sqrt().clamp(max=1.0)
        move[pair[1]] = lambda offset: second * (unit * offset).exp()

    def build(offsets: Sequence[Tensor]) -> Any:
        freed = {n: move[n](offset) for n, offset in zip(names, offsets, strict=True)}
        if pair is not None:
            freed[pair[1]] = freed[pair[1]] * freed[pair[0]] / start
        try:
            return type(fn)(**freed)
        except TypeError as error:  # the constructor asks for more
            raise _nothing_to_free(fn, name) from error

    axes = tuple(dim - (zeros[n].dim() - len(fn.batch_shape)) for n in names)
    return Family(tuple(zeros[n] for n in names), axes, build)


def _move(value: Tensor, constraint: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The offset of this value, and the parameter as a function of it."""
    transform = transform_to(constraint)
    origin = transform.inv(value)
    return torch.zeros_like(origin), lambda offset: transform(origin + offset)


def _transformed(fn: Any, name: str, dim: int, given: tuple[Tensor, ...]) -> Family:
    """A flow: its contexts, and its base where that is another one for every datum."""
    base = fn.base_dist
    inner = family_of(base, name, dim) if _differs_by_datum(base, dim) else None
    free_base = inner or Family((), (), lambda offsets: base)
    transforms = list(fn.transforms)
    size = fn.batch_shape[dim]
    contexts = {id(t.context): t.context for t in transforms if _has_context(t, dim - 1, size)}
    if not free_base.zeros and not contexts:
        raise _nothing_to_free(fn, name)
    own = given or tuple(_unit(context) for context in contexts.values())
    units = dict(zip(contexts, own, strict=True))
    count = len(free_base.zeros)
    make = FlowDistribution if isinstance(fn, FlowDistribution) else dist.TransformedDistribution

    def build(offsets: Sequence[Tensor]) -> Any:
        pairs = zip(contexts.items(), offsets[count:], strict=True)
        moved = {key: context + units[key] * offset for (key, context), offset in pairs}
        parts = [
            ConditionedTransform(t.transform, moved[id(t.context)])
            if _has_context(t, dim - 1, size)
            else t
            for t in transforms
        ]
        return make(free_base.build(offsets[:count]), parts)

    return Family(
        (*free_base.zeros, *map(torch.zeros_like, contexts.values())),
        (*free_base.axes, *[dim - 1] * len(contexts)),
        build,
        own,
    )


def _has_context(transform: Any, axis: int, size: int) -> bool:
    """Whether a transform has a context for every datum."""
    if not isinstance(transform, ConditionedTransform):
        return False
    shape = transform.context.shape
    return -axis <= len(shape) and shape[axis] == size


def _unit(context: Tensor) -> Tensor:
    """How far a feature moves in a step: its spread over the data, or its size where it has none."""
    flat = context.reshape(-1, context.shape[-1])
    size = flat.square().mean().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    spread = flat.std(0) if len(flat) > 1 else size.expand(flat.shape[-1])
    return spread.clamp(min=_LEAST_SPREAD * size) / math.sqrt(flat.shape[-1])


def _differs_by_datum(fn: Any, dim: int) -> bool:
    """Whether a distribution has a parameter of its own for every datum.

    One that is shared by all data has been expanded along their dimension.
    """
    while hasattr(fn, "base_dist"):
        dim -= getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    for argument in fn.arg_constraints:
        value = getattr(fn, argument, None)
        if isinstance(value, Tensor):
            axis = dim - (value.dim() - len(fn.batch_shape))
            original = value if value._base is None else value._base
            if -axis <= original.dim() and value.stride(axis) != 0:
                return True
    return False


def _nothing_to_free(fn: Any, name: str) -> ValueError:
    return ValueError(
        "Expected a distribution whose parameters can be set free for every datum (Normal, "
        "MultivariateNormal, ..., or a flow with a context) at site "
        f"'{name}' of the guide, got {_kind(fn)}"
    )


def _kind(fn: Any) -> str:
    return type(innermost(fn) if isinstance(fn, torch.distributions.Independent) else fn).__name__
