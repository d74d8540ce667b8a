r"""Masked latents: which elements of a latent a model gives no density, and whether that makes them flat or idle.

``poutine.mask``, ``fn.mask`` and the ``obs_mask`` of ``pyro.sample`` take elements of a latent out of log p. Two things
can be meant by that, and the model itself says which:

- Nothing else depends on the element: a row that was padded, a place of ``obs_mask`` where there is an observation. It
  is **idle**, and log p says nothing of it. A guide that counts its entropy all the same has an ELBO without limit.
- The rest of the model depends on it. Then its density is **flat**, as for ``dist.Normal(0, 1).mask(False)``, Pyro's
  way of writing an improper prior. It is a latent like any other, with a log q.

So masked elements are tried out at setup: one is idle if the log-density of no site of the model changes by a bit when
it moves.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.util import ignore_jit_warnings
from torch import Tensor
from torch.distributions import IndependentTransform, Transform

from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.programs.sites import Site, is_scored
from pyro_flowkit.seeds import fixed_seed

Masks = dict[str, Tensor]


def kept_elements(site: Site) -> Tensor | None:
    """Which elements of a latent the model gives a density.

    Args:
        site: of a trace, or the message of a sample statement that has passed the model's handlers.

    Returns:
        True where there is one, shape ``(*batch_shape, *reinterpreted)``: a mask inside of ``to_event`` speaks of the
        elements of an event. None if there is no mask at all, not even one that is True everywhere.
    """
    fn, outer = site["fn"], site["mask"]
    inner, count = _inner_mask(fn)
    if outer is None and inner is None:
        return None
    shape = torch.Size((*fn.batch_shape, *fn.event_shape[:count]))
    kept = torch.ones((), dtype=torch.bool) if inner is None else inner
    if outer is not None:
        outer = torch.as_tensor(outer).bool()
        kept = kept.to(outer.device) & outer[(..., *(None,) * count)]
    return kept.detach().expand(shape)


def _inner_mask(fn: Any) -> tuple[Tensor | None, int]:
    """The mask that a distribution has within itself, and how many of its event's dimensions that speaks of."""
    if isinstance(fn, MaskedDistribution):
        inner, count = _inner_mask(fn.base_dist)
        mask = torch.as_tensor(fn._mask)
        mask = mask[(..., *(None,) * count)]
        return mask if inner is None else mask & inner, count
    if isinstance(fn, torch.distributions.Independent):
        inner, count = _inner_mask(fn.base_dist)
        return (None, 0) if inner is None else (inner, count + fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return _inner_mask(fn.base_dist)
    return None, 0


def to_shape(elements: Tensor, shape: Sequence[int]) -> Tensor:
    """Elements of a latent with the shape of its values, constrained or not: one for all that is inside of them."""
    return elements[(..., *(None,) * (len(shape) - elements.dim()))].expand(tuple(shape))


def only(elements: Tensor, value: Tensor, inside: int) -> Tensor:
    """Values with NaN in the place of all other elements, which no comparison finds.

    Args:
        elements: of a latent, shape ``(*batch, *reinterpreted)``.
        value: shape ``(*particles, *batch, *event)``.
        inside: number of dimensions that are inside of an element.
    """
    return value.masked_fill(~elements[(..., *(None,) * inside)], math.nan)


def elementwise_ladj(
    transform: Transform, unconstrained: Tensor, value: Tensor, dim: int
) -> Tensor:
    """log|det dvalue/dunconstrained| in nats, of every element by itself: summed down to ``dim`` dimensions."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    ladj = transform.log_abs_det_jacobian(unconstrained, value)
    return sum_rightmost(ladj, ladj.dim() - dim)


class _Reached(Exception):
    """The last latent was seen."""


class _MaskReader(Messenger):
    """Reads the masks of latents, and stops the model behind the last of them."""

    def __init__(
        self,
        names: Iterable[str],
        values: Mapping[str, Tensor],
        init_loc_fn: Callable[[Site], Tensor] | None,
    ):
        super().__init__()
        self.waiting = set(names)
        self.values = values
        self.init_loc_fn = init_loc_fn
        self.found: dict[str, Tensor | None] = {}

    def _process_message(self, msg: Any) -> None:
        name = msg["name"]
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        if name in self.waiting:
            self.found[name] = kept_elements(msg)
            self.waiting.remove(name)
            if not self.waiting:
                raise _Reached
        if msg["value"] is None and name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        elif msg["value"] is None and name in self.found and self.init_loc_fn is not None:
            msg["value"], msg["done"] = self.init_loc_fn(msg), True


@torch.no_grad()
def read_masks(
    model: Callable[..., Any],
    names: Iterable[str],
    values: Mapping[str, Tensor],
    args: tuple,
    kwargs: dict,
    *,
    device: torch.device,
    init_loc_fn: Callable[[Site], Tensor] | None = None,
) -> dict[str, Tensor | None]:
    """Run a model up to its last latent, and read the :func:`kept_elements` of the latents on the way.

    Args:
        model: the model.
        names: of the latents; those that the model does not come to are left out of the result.
        values: of latents, and rows of plates, that the model meets on the way.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        device: whose random state is left as it was, as is that of the CPU.
        init_loc_fn: gives the values of latents that have none; None draws them.
    """
    reader = _MaskReader(names, values, init_loc_fn)
    try:
        with fixed_seed(device), poutine.block(), reader, ignore_jit_warnings():
            model(*args, **kwargs)
    except _Reached:
        pass
    return reader.found


def flat_elements(
    model: Callable[..., Any],
    prototype: poutine.Trace,
    kept: Mapping[str, Tensor | None],
    args: tuple,
    kwargs: dict,
) -> Masks:
    """Which masked elements the rest of a model depends on, so that their density is flat.

    Args:
        model: the whole model.
        prototype: a trace of the model, or of a part of it.
        kept: the :func:`kept_elements` of latents of the prototype.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Returns:
        ``{site: elements}``, for the sites that have masks.

    Raises:
        ValueError: for a mask that depends on a latent, and for a model that shows nothing but latents.
    """
    flat = {name: torch.zeros_like(mask) for name, mask in kept.items() if mask is not None}
    if not flat:
        return flat
    probe = _Probe(model, prototype, kept, args, kwargs)
    masked = [(name, i) for name in flat for i in _places(~cast(Tensor, kept[name]))]
    if masked and not probe.sees_more:
        raise ValueError(
            f"Expected to see what depends on the masked elements of {masked[0][0]!r}, got a model that shows nothing "
            "but latents: a guide for a part of the latents (poutine.block) belongs into an AutoGuideList."
        )
    if masked:
        for name, touched in probe.with_gradient().items():
            flat[name] = touched & ~cast(Tensor, kept[name])
    masked = [(name, i) for name, i in masked if not flat[name].reshape(-1)[i]]
    waiting = [masked] if masked else []
    while waiting:
        elements = waiting.pop()
        if probe.is_blind_to(elements):
            continue
        if len(elements) == 1:
            ((name, i),) = elements
            flat[name].view(-1)[i] = True
        else:
            half = len(elements) // 2
            waiting += [elements[:half], elements[half:]]
    return flat


class _Probe:
    """The log-densities of all sites of a model, at two points each with some elements here and there."""

    @torch.no_grad()
    def __init__(
        self,
        model: Callable[..., Any],
        prototype: poutine.Trace,
        kept: Mapping[str, Tensor | None],
        args: tuple,
        kwargs: dict,
    ):
        self._model, self._args, self._kwargs = model, args, kwargs
        latents = {name: prototype.nodes[name] for name in kept}
        self._supports = {name: node["fn"].support for name, node in latents.items()}
        self._kept = kept
        loc = {
            name: bijection_to(node["fn"].support).inv(node["value"].detach())
            for name, node in latents.items()
        }
        self._device = next(iter(loc.values())).device
        with fixed_seed(self._device):
            near = {name: u + 0.1 * torch.randn_like(u) for name, u in loc.items()}
            self._there = {name: u + torch.randn_like(u) for name, u in loc.items()}
        self._others = _drawn(prototype, loc)  # rows of subsampled plates, too
        first = self._trace(loc)
        self._others.update(_drawn(first, loc))
        # whether there is anything that could depend on the latents
        self.sees_more = bool(self._densities(first).keys() - loc.keys() - self._others.keys())
        self._points = [(u, self._densities(self._trace(u))) for u in (loc, near)]
        self._densities(self._trace(self._there))

    @torch.no_grad()
    def is_blind_to(self, elements: Sequence[tuple[str, int]]) -> bool:
        """Whether no density changes when these elements move, ``(site, index among its elements)``."""
        moved: Masks = {}
        for name, mask in self._kept.items():
            indices = [i for of, i in elements if of == name]
            if mask is not None and indices:
                moved[name] = torch.zeros_like(mask).reshape(-1)
                moved[name][indices] = True
                moved[name] = moved[name].reshape(mask.shape)
        for here, expected in self._points:
            point = {
                name: torch.where(to_shape(moved[name], u.shape).to(u.device), self._there[name], u)
                if name in moved
                else u
                for name, u in here.items()
            }
            try:
                trace = self._trace(point)
            except (
                ValueError,
                RuntimeError,
                ArithmeticError,
            ):  # it depends on them, and fails there
                return False
            got = self._densities(trace)
            if got.keys() != expected.keys():
                return False
            if not all(_same(got[name], expected[name]) for name in got):
                return False
        return True

    def _densities(self, trace: poutine.Trace) -> dict[str, Tensor]:
        for name, mask in self._kept.items():
            if name in trace.nodes and not same_mask(kept_elements(trace.nodes[name]), mask):
                raise ValueError(
                    f"Expected the mask of {name!r} to be data, got one that depends on latents: which elements have a "
                    "density must be known to a guide."
                )
        return {
            name: site["log_prob"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and "log_prob" in site
        }

    def with_gradient(self) -> Masks:
        """Elements with a derivative that is not zero, so that they need no trial; none if a model cannot tell."""
        here, _ = self._points[-1]
        point = {name: u.detach().requires_grad_() for name, u in here.items()}
        try:
            with torch.enable_grad():
                log_probs = self._densities(self._trace(point)).values()
                total = torch.stack([log_prob.sum() for log_prob in log_probs]).sum()
                found = torch.autograd.grad(total, list(point.values()), allow_unused=True)
        except RuntimeError:
            return {}
        touched: Masks = {}
        for name, gradient in zip(point, found, strict=True):
            mask = self._kept[name]
            if mask is not None and gradient is not None:
                some = gradient.isfinite() & (gradient != 0)
                touched[name] = some.reshape(*mask.shape, -1).any(-1).to(mask.device)
        return touched

    def _trace(self, point: Mapping[str, Tensor]) -> poutine.Trace:
        values = {name: bijection_to(self._supports[name])(u) for name, u in point.items()}
        with fixed_seed(self._device), poutine.block(), pyro.validation_enabled(False):
            model = poutine.condition(self._model, data={**values, **self._others})
            trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob(lambda _, site: is_scored(site))
        return trace


def _places(elements: Tensor) -> list[int]:
    return elements.reshape(-1).nonzero().squeeze(-1).tolist()


def _drawn(trace: poutine.Trace, without: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and name not in without
    }


def same_mask(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two masks of a latent have the same elements."""
    if first is None or second is None:
        other = second if first is None else first
        return other is None or bool(other.all())
    return first.shape == second.shape and bool((first == second.to(first.device)).all())


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(
        ((first == second) | (first.isnan() & second.isnan())).all()
    )
