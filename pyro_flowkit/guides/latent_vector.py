r"""The vector of all latents in unconstrained space: their values, and the density that a guide has to follow.

With u the vector and z(u) the values, a model's log joint as a function of u is

    log p(x, u) = log p(x, z(u)) + log |det dz/du|
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.guides.without_masked import all_values, ladj_of, vector_of
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.programs.derivative import Differentiated, given
from pyro_flowkit.programs.runs import Program
from pyro_flowkit.programs.sites import latent_names, nesting_of, scored_sites, subsampled_frame
from pyro_flowkit.programs.vectorized import WAYS, Vectorized, Way

CALLS_OF_A_GRAPH = 12  # with a gradient, before one is made that gives both in less time


def unpack(guide: AutoContinuous, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Values of all latents of a guide, and the log-det of getting there.

    Args:
        guide: a guide after its setup.
        latent: unconstrained, shape ``(*sample_shape, D)``.

    Returns:
        ``{site: value}`` of shape ``(*sample_shape, *batch, *event)``, and log|det dvalue/dlatent| in nats, shape
        ``(*sample_shape,)``.
    """
    sample_shape = latent.shape[:-1]
    values: dict[str, Tensor] = {}
    total = latent.new_zeros(sample_shape)
    latent = all_values(guide, latent)
    start = 0
    for name, site in _sites(guide).items():
        shape = tuple(guide._unconstrained_shapes[name])
        size = math.prod(shape)
        unconstrained = latent[..., start : start + size].reshape((*sample_shape, *shape))
        start += size
        transform = bijection_to(site["fn"].support)
        values[name] = transform(unconstrained)
        total = total + ladj_of(guide, name, unconstrained, values[name], len(sample_shape))
    return values, total


def pack(guide: AutoContinuous, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`unpack`.

    Args:
        guide: a guide after its setup.
        values: ``{site: value}`` for every latent, shapes ``(*sample_shape, *batch, *event)``.

    Returns:
        Unconstrained latents ``(*sample_shape, D)``, and log|det dvalue/dlatent| in nats, shape ``(*sample_shape,)``.

    Raises:
        ValueError: for a latent without a value, a value without a latent, or shapes that do not fit.
    """
    sites = _sites(guide)
    if set(values) != set(sites):
        raise ValueError(
            f"Expected a value for each of the latents {sorted(sites)}, got {sorted(values)}."
        )
    sample_shapes = {name: _sample_shape(site, values[name]) for name, site in sites.items()}
    sample_shape = broadcast_shapes(*sample_shapes.values())
    parts, total = [], torch.zeros(())
    for name, site in sites.items():
        transform = bijection_to(site["fn"].support)
        unconstrained = transform.inv(values[name])
        ladj = ladj_of(guide, name, unconstrained, values[name], len(sample_shapes[name]))
        total = total.to(ladj) + ladj
        part = unconstrained.reshape((*sample_shapes[name], -1))
        parts.append(part.expand(*sample_shape, -1))
    return vector_of(guide, torch.cat(parts, dim=-1)), total.expand(sample_shape)


def _sites(guide: AutoContinuous) -> dict[str, Any]:
    return dict(guide.prototype_trace.iter_stochastic_nodes())


def _sample_shape(site: dict[str, Any], value: Tensor) -> tuple[int, ...]:
    shape = tuple(site["value"].shape)
    left = value.dim() - len(shape)
    if left < 0 or tuple(value.shape[left:]) != shape:
        raise ValueError(
            f"Expected a value of shape (*sample_shape, {', '.join(map(str, shape))}) for {site['name']!r}, got "
            f"{tuple(value.shape)}."
        )
    return tuple(value.shape[:left])


def in_words(guide: AutoContinuous, latent: Tensor) -> str:
    """The values of the first latents at a point ``(D,)`` of unconstrained space."""
    values, _ = unpack(guide, latent)
    return ", ".join(f"{name} = {_rounded(value)}" for name, value in list(values.items())[:4])


def _rounded(value: Tensor) -> str:
    numbers = [f"{number:.3g}" for number in value.flatten()[:4].tolist()]
    more = ", ..." if value.numel() > 4 else ""
    return numbers[0] if value.numel() == 1 else f"[{', '.join(numbers)}{more}]"


class LatentDensity:
    """log p(x, u) of a guide's model, differentiable, for many u at a time.

    Args:
        model: a Pyro model.
        guide: a guide for all of its latents, after its setup.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        ways: those to many u at a time that are tried (:mod:`pyro_flowkit.programs.vectorized`).

    Attributes:
        obstacle: why the model is run for one u after the other, for people; None where it is not.

    Raises:
        ValueError: if the model has latents that the guide does not know.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoContinuous,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        ways: Sequence[Way] = WAYS,
    ):
        self._guide = guide
        self._args, self._kwargs = tuple(args), dict(kwargs or {})
        loc = guide._init_loc()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            latent = loc + 0.1 * torch.randn(2, *loc.shape, dtype=loc.dtype).to(loc.device)
            values, _ = unpack(guide, latent)

            def plain_run(program: Program, args: tuple, kwargs: dict) -> poutine.Trace:
                given = poutine.condition(program, data={n: v[0] for n, v in values.items()})
                return poutine.trace(given).get_trace(*args, **kwargs)

            with poutine.block():
                trace = plain_run(model, self._args, self._kwargs)
        unknown = latent_names(trace)
        if unknown:
            raise ValueError(
                f"Expected a guide for every latent of the model, got none for {unknown[0]!r}."
            )
        self._program = Vectorized(
            model,
            plain_run,
            {name: len(trace.nodes[name]["fn"].batch_shape) for name in values},
            nesting_of(trace),
        )
        self._program.settle(values, self._args, self._kwargs, ways)
        self.obstacle = self._obstacle(trace)
        self._differentiated = Differentiated(self._program, partial(unpack, guide))
        self._calls: Counter[int] = Counter()

    def _obstacle(self, trace: poutine.Trace) -> str | None:
        for name, site in scored_sites(trace):
            frame = subsampled_frame(site)
            if frame is not None:
                return (
                    f"site {name!r} is in plate {frame.name!r}, which has {frame.size} of {frame.full_size} rows: its "
                    "density is another one at every run"
                )
        return None if self._program.way != "rows" else self._program.complaint()

    def look_again(self) -> None:
        """Compare with a plain run of the model at the next call: time has passed."""
        self._program.look_again()

    def __call__(self, latent: Tensor) -> Tensor:
        """log p(x, u) in nats for ``u`` of shape ``(n, D)``, shape ``(n,)``.

        For a number of draws that comes again and again with a gradient, both come from a graph of their own.
        """
        if latent.requires_grad and torch.is_grad_enabled() and self.obstacle is None:
            self._calls[len(latent)] += 1
            if self._calls[len(latent)] > CALLS_OF_A_GRAPH:
                with suppress(torch.linalg.LinAlgError):
                    found = self._differentiated(latent, self._args, self._kwargs)
                    if found is not None:
                        return given(latent, *found, self._plain)
        return self._plain(latent)

    def _plain(self, latent: Tensor) -> Tensor:
        values, total = unpack(self._guide, latent)
        try:
            return total + self._program.log_joint(values, self._args, self._kwargs)
        except torch.linalg.LinAlgError:  # a matrix singular in this dtype, far out
            if len(latent) == 1:
                return total * math.nan
        return torch.cat([self._plain(row) for row in latent.split(1)])  # the others have a density
