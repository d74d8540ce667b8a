r"""The density that a guide has to follow: a model's log joint as a function of the guide's unconstrained latents.

With u the vector of all latents in unconstrained space and z(u) their values,

    log p(x, u) = log p(x, z(u)) + log |det dz/du|
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flowkit.guides.latent_values import unpack
from pyro_flowkit.programs.runs import Program
from pyro_flowkit.programs.sites import latent_names, nesting_of, scored_sites, subsampled_frame
from pyro_flowkit.programs.vectorized import WAYS, Vectorized, Way


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
        """log p(x, u) in nats for ``u`` of shape ``(n, D)``, shape ``(n,)``."""
        values, total = unpack(self._guide, latent)
        try:
            return total + self._program.log_joint(values, self._args, self._kwargs)
        except torch.linalg.LinAlgError:  # a matrix singular in this dtype, far out
            if len(latent) == 1:
                return total * math.nan
        return torch.cat([self(row) for row in latent.split(1)])  # the others have a density
