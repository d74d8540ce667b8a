"""Plain runs of a model, by Pyro's handlers: with given latents and rows, for one draw or in a plate of draws."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_flowkit.programs.sites import PARTICLES, is_deterministic, scored_sites

Values = dict[str, Tensor]
Program = Callable[..., Any]


class Densities(NamedTuple):
    """What a run says of its sites, by name; of many draws, with one more dimension, the first.

    Attributes:
        unscaled: log-densities (nats), zero where they are masked, before they are scaled; shapes ``(*batch,)``.
        scales: what they are multiplied by, where it is not 1; a recording has those that are tensors.
        values: of sites with densities and, where they are wanted, of deterministic ones.
    """

    unscaled: Values
    scales: dict[str, Any]
    values: Values


def run_given(
    model: Program,
    values: Mapping[str, Tensor],
    args: tuple,
    kwargs: dict,
    *,
    with_deterministic: bool = False,
    at_site: Callable[[str], None] | None = None,
) -> Densities:
    """A run with these values of latents and rows of plates, unseen by handlers around it.

    A scale that under- or overflows far out is a density that is no number there, not an error. ``at_site`` is called
    with the name of each site before its density is computed.
    """
    with poutine.block(), pyro.validation_enabled(False):
        given = poutine.condition(model, data=dict(values))
        trace = poutine.trace(given).get_trace(*args, **kwargs)
        return _densities_of(trace, with_deterministic, at_site)


def _densities_of(
    trace: poutine.Trace, with_deterministic: bool, at_site: Callable[[str], None] | None
) -> Densities:
    found = Densities({}, {}, {})
    for name, site in scored_sites(trace):
        if at_site is not None:
            at_site(name)
        with unvalidated(site["fn"]):
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        found.unscaled[name] = scale_and_mask(log_prob, 1.0, site["mask"])
        if isinstance(site["scale"], Tensor) or site["scale"] != 1.0:
            found.scales[name] = site["scale"]
        found.values[name] = site["value"]
    if with_deterministic:
        for name, site in trace.nodes.items():
            if is_deterministic(site):
                found.values[name] = site["value"]
    return found


def scaled(found: Densities) -> Values:
    """log-densities with their scales, in nats."""
    return {name: value * found.scales.get(name, 1.0) for name, value in found.unscaled.items()}


def each_draw(values: Values) -> list[Values]:
    """The draws, one by one."""
    size = len(next(iter(values.values())))
    return [{name: value[i] for name, value in values.items()} for i in range(size)]


def stacked(runs: list[Densities]) -> Densities:
    """Runs of single draws as one of all; what is no tensor is that of the first."""
    return Densities(
        *(_stacked_values([run[part] for run in runs]) for part in range(len(runs[0])))
    )


def _stacked_values(parts: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, first in parts[0].items():
        if isinstance(first, Tensor):
            found[name] = torch.stack([part[name] for part in parts])
        else:
            found[name] = first
    return found


def own_values(value: Tensor, fn: Any, size: int, nesting: int) -> Tensor:
    """A value in a plate of draws, left of ``nesting`` batch dimensions, as ``(size, *batch, *event)`` of a plain run.

    Args:
        value: of a site; it may be the same for all draws.
        fn: the site's distribution in a plain run.
        size: number of draws.
        nesting: number of batch dimensions beside them.
    """
    full = nesting + 1 + fn.event_dim
    value = value.expand(*(1,) * (full - value.dim()), *value.shape)
    value = value.expand(size, *value.shape[1:])
    return value.reshape(size, *value.shape[full - len(fn.batch_shape) - fn.event_dim :])


@contextlib.contextmanager
def unvalidated(fn: Any) -> Iterator[None]:
    """No look at values in a distribution that was made with validation, as those of ``PyroSample`` are."""
    parts = [fn]
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, Distribution)]
    changed = [part for part in parts if vars(part).get("_validate_args")]
    for part in changed:
        part._validate_args = False
    try:
        yield
    finally:
        for part in changed:
            part._validate_args = True


class BesideEachOther(Messenger):
    """What a plate of draws does, also where there is one already whose plate nobody is to see.

    Args:
        size: number of draws.
        nesting: number of batch dimensions right of them.
    """

    def __init__(self, size: int, nesting: int):
        super().__init__()
        self._frame = CondIndepStackFrame(PARTICLES, -1 - nesting, size, 0, size)

    def _process_message(self, msg: Any) -> None:
        msg["cond_indep_stack"] = (self._frame, *msg["cond_indep_stack"])
        if msg["type"] == "sample":
            BroadcastMessenger._pyro_sample(msg)


def in_plate(model: Program, size: int, nesting: int) -> Program:
    """The model in a plate of draws, to the left of its own."""

    def program(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, size, dim=-1 - nesting):
            return model(*args, **kwargs)

    return program
