"""What keeps the idle elements of masked latents (:mod:`pyro_flowkit.guides.masked`) out of a guide's vector.

They have a fixed value, where ``init_loc_fn`` put them, no log p and no log q.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pyro_flowkit.guides.constrained import ConstrainedLatents
from pyro_flowkit.guides.masked import (
    elementwise_ladj,
    flat_elements,
    kept_elements,
    only,
    read_masks,
    same_mask,
    to_shape,
)
from pyro_flowkit.guides.supports import bijection_to

_PLAIN = (bool, int, float, str, bytes, type(None))


class SameCall:
    """Remembers the arguments of the last call: tensors by what they are and whether they were written to.

    Objects that are neither tensors nor plain values may have changed. Copies and pickles remember nothing.
    """

    def __init__(self) -> None:
        self._last: tuple | None = None

    def __call__(self, args: tuple, kwargs: dict) -> bool:
        """Whether these are the arguments of the last call; they are then the last."""
        leaves, structure = tree_flatten((args, kwargs))
        last = self._last
        known = all(isinstance(leaf, _PLAIN) or _has_version(leaf) for leaf in leaves)
        self._last = (structure, [_note(leaf) for leaf in leaves]) if known else None
        if last is None or not known:
            return False
        return structure == last[0] and all(
            _is_same(leaf, note) for leaf, note in zip(leaves, last[1], strict=True)
        )

    def forget(self) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}


def _has_version(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not torch.is_inference(leaf)


def _note(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return weakref.ref(leaf), leaf._version
    return type(leaf), leaf


def _is_same(leaf: Any, note: tuple) -> bool:
    if isinstance(leaf, Tensor):
        refers = isinstance(note[0], weakref.ref)
        return refers and note[1] == leaf._version and note[0]() is leaf
    return note == (type(leaf), leaf)


class Idle(nn.Module):
    """Where the idle elements are among the unconstrained values of all latents, and what they are.

    Args:
        fixed: values of all latents, shape ``(full_size,)``; those of idle elements count.
        active: for each site that has some, which elements are not idle, shape ``(*batch, *reinterpreted)``.
        columns: of the values that are in the guide's vector.
    """

    def __init__(self, fixed: Tensor, active: Mapping[str, Tensor], columns: Tensor):
        super().__init__()
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self._buffer_of = {name: f"active_{i}" for i, name in enumerate(active)}
        for name, buffer in self._buffer_of.items():
            self.register_buffer(buffer, active[name].to(fixed.device), persistent=False)

    fixed: Tensor
    columns: Tensor

    def active(self, name: str) -> Tensor | None:
        """Which elements of a site are not idle; None if all are not."""
        return getattr(self, self._buffer_of[name]) if name in self._buffer_of else None

    def all_of(self, latent: Tensor, fill: Tensor | None = None) -> Tensor:
        """All values, shape ``(*batch, full_size)``, from a guide's vector; ``fill`` is in the idle places."""
        fill = self.fixed.to(latent.dtype) if fill is None else fill
        return fill.expand(*latent.shape[:-1], -1).index_copy(-1, self.columns, latent)


class WithoutMasked(ConstrainedLatents):
    """A guide whose vector is without idle elements; the steps of ``AutoContinuous`` that know of the vector.

    ``_unconstrained_shapes`` stays that of whole sites, ``latent_dim`` is the size of the vector.
    """

    idle: Idle | None
    _masks: dict[str, Tensor | None]
    _same_call: SameCall

    def _leave_out_idle(self, args: tuple, kwargs: dict) -> None:
        """Take the idle elements out, after the prototype's setup, while it has its distributions.

        Raises:
            RuntimeError: if there is nothing left.
            ValueError: see :func:`~pyro_flowkit.guides.masked.flat_elements`.
        """
        self.idle, self._same_call = None, SameCall()
        trace: Any = self.prototype_trace
        nodes = dict(trace.iter_stochastic_nodes())
        self._masks = {name: kept_elements(node) for name, node in nodes.items()}
        model = whole_model(self, self._given[0])
        flat = flat_elements(model, trace, self._masks, args, kwargs)
        active: dict[str, Tensor] = {}
        for name, elements in flat.items():
            active[name] = self._masks[name] | elements.to(self._masks[name].device)  # type: ignore[operator, union-attr]
        active = {name: elements for name, elements in active.items() if not bool(elements.all())}
        self._same_call(args, kwargs)
        if not active:
            return
        loc = self._init_loc()
        parts = []
        for name, shape in self._unconstrained_shapes.items():
            whole = torch.ones((), dtype=torch.bool)
            parts.append(to_shape(active.get(name, whole).to(loc.device), shape).reshape(-1))
        columns = torch.cat([part.to(loc.device) for part in parts]).nonzero().squeeze(-1)
        if not len(columns):
            raise RuntimeError(
                f"{type(self).__name__} expected a latent that the model gives a density, got only masked ones: use an "
                "empty guide instead."
            )
        self.idle = Idle(loc, active, columns)
        self.latent_dim = len(columns)

    def _site_sizes(self) -> dict[str, int]:
        """How many values of each site are in the vector."""
        idle, sizes = self.idle, {}
        for name, shape in self._unconstrained_shapes.items():
            active = None if idle is None else idle.active(name)
            sizes[name] = shape.numel() if active is None else int(to_shape(active, shape).sum())
        return sizes

    def _check_masks(self, args: tuple, kwargs: dict) -> None:
        """Raise a ValueError for masks that are not those of the setup.

        Models without any mask are not run for that, nor is one again with the arguments of the last call.
        """
        masked = [name for name, mask in self._masks.items() if mask is not None]
        model = self._given[0]
        if not masked or model is None or torch.jit.is_tracing():
            return
        if self._same_call(args, kwargs):
            return
        trace: Any = self.prototype_trace
        values = {name: node["value"] for name, node in trace.iter_stochastic_nodes()}
        device = next(iter(values.values())).device
        found = read_masks(model, masked, values, args, kwargs, device=device)
        for name, mask in found.items():
            if not same_mask(mask, self._masks[name]):
                self._same_call.forget()
                raise ValueError(
                    f"Expected the mask of {name!r} to be that of the guide's setup, {_described(self._masks[name])}, "
                    f"got {_described(mask)}: which elements are latents is fixed then. Make a new guide for other "
                    "masks, or use AmortizedSplineFlow for latents of rows."
                )

    def _init_loc(self) -> Tensor:
        return vector_of(self, super()._init_loc())

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        return super()._unpack_latent(all_values(self, latent))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self._check_masks(args, kwargs)
        return super().forward(*args, **kwargs)

    def _log_density(self, site: Any, unconstrained: Tensor, value: Tensor) -> Tensor:
        batch_dim = value.dim() - site["fn"].event_dim
        return -ladj_of(self, site["name"], unconstrained, value, batch_dim)

    def _counted(self, name: str, value: Tensor) -> Tensor:
        active = None if self.idle is None else self.idle.active(name)
        if active is None:
            return value
        site: Any = self.prototype_trace.nodes[name]
        inside = active.dim() - len(site["fn"].batch_shape)
        return only(active, value, site["fn"].event_dim - inside)


def whole_model(guide: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    """The model of the guide that this one is a part of, if it is: a part does not see all that depends on a latent."""
    if guide.master is None:
        return own
    master = guide.master()
    return getattr(master, "_plain_model", (None,))[0] or master.model


def all_values(guide: Any, latent: Tensor) -> Tensor:
    """The unconstrained values of all latents, shape ``(*batch, full_size)``, from a guide's vector ``(*batch, D)``."""
    idle = getattr(guide, "idle", None)
    return latent if idle is None else idle.all_of(latent)


def vector_of(guide: Any, values: Tensor) -> Tensor:
    """The inverse of :func:`all_values`."""
    idle = getattr(guide, "idle", None)
    return values if idle is None else values.index_select(-1, idle.columns)


def ladj_of(guide: Any, name: str, unconstrained: Tensor, value: Tensor, dim: int) -> Tensor:
    """log|det dvalue/dunconstrained| (nats) of the elements of a site that are in the guide's vector.

    Args:
        guide: a guide after its setup.
        name: of the site.
        unconstrained: values of the site.
        value: the same, constrained.
        dim: how many dimensions of the value are kept, from the left.
    """
    site = guide.prototype_trace.nodes[name]
    transform = bijection_to(site["fn"].support)
    idle = getattr(guide, "idle", None)
    active = None if idle is None else idle.active(name)
    if active is None:
        ladj = transform.log_abs_det_jacobian(unconstrained, value)
        return sum_rightmost(ladj, ladj.dim() - dim)
    inside = active.dim() - len(site["fn"].batch_shape)
    batch_dim = value.dim() - site["fn"].event_dim
    ladj = elementwise_ladj(transform, unconstrained, value, batch_dim + inside)
    return sum_rightmost(torch.where(active, ladj, 0.0), batch_dim + inside - dim)


def _described(mask: Tensor | None) -> str:
    if mask is None:
        return "no mask"
    return f"{int(mask.sum())} of {mask.numel()} elements kept, shape {tuple(mask.shape)}"
