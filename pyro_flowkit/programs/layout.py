"""The sites of a model as a plain run has them, but for what differs from draw to draw."""

from collections.abc import Callable, Collection, Hashable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flowkit.programs.recording import MAX_GRAPHS, signature
from pyro_flowkit.programs.runs import Program
from pyro_flowkit.programs.sites import PARTICLES, is_deterministic, is_scored


class Layout(NamedTuple):
    """A site as a plain run has it, but for what differs from draw to draw.

    Attributes:
        kind: "latent", "observed", "deterministic", "subsample" (some rows of a plate) or "plate" (all of its rows).
        fn: its distribution.
        stack: its plates.
        scale: what its density is multiplied by; 1 for a tensor.
        infer: what is said of it for inference.
    """

    kind: str
    fn: Any
    stack: tuple
    scale: float
    infer: dict[str, Any]


class DrawnRows(Messenger):
    """Takes note of the plates whose rows the model leaves to be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and site_is_subsample(msg):
            self.names.add(msg["name"])


def layouts(
    trace: poutine.Trace, latents: Collection[str], plates: Collection[str]
) -> dict[str, Layout]:
    """The sites of a trace that a run of the model gives, in their order.

    Args:
        trace: of a plain run.
        latents: names of the latents, whatever the trace has them for.
        plates: names of those whose rows are drawn.
    """
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site_is_subsample(site):
            if name not in plates:
                continue
            size = site["fn"].size
            kind = "subsample" if (site["fn"].subsample_size or size) < size else "plate"
        elif is_deterministic(site):
            kind = "deterministic"
        elif name in latents:
            kind = "latent"
        elif is_scored(site):
            kind = "observed"
        else:
            continue
        stack = tuple(frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES)
        infer = dict(site["infer"] or {})
        scale = 1.0 if isinstance(site["scale"], Tensor) else site["scale"]
        found[name] = Layout(kind, site["fn"], stack, scale, infer)
    return found


class Layouts:
    """The sites of a model, for arguments of one shape and another.

    Args:
        model: a Pyro model.
        plain_run: gives a trace of a program for arguments ``(args, kwargs)``, with values for all latents.
        latents: their names.
    """

    def __init__(
        self,
        model: Program,
        plain_run: Callable[[Program, tuple, dict], poutine.Trace],
        latents: Collection[str],
    ):
        self._model, self._plain_run, self._latents = model, plain_run, latents
        self._known: dict[Hashable, dict[str, Layout]] = {}

    def of(self, args: tuple, kwargs: dict) -> dict[str, Layout]:
        """Those for arguments of these shapes."""
        key = signature(args, kwargs)
        if key not in self._known:
            while len(self._known) >= MAX_GRAPHS:
                del self._known[next(iter(self._known))]
            with poutine.block(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                drawn = DrawnRows()
                trace = self._plain_run(drawn(self._model), args, kwargs)
                self._known[key] = layouts(trace, self._latents, drawn.names)
        return self._known[key]
