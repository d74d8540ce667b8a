"""What the objectives share: running model and guide, and the faces of ``pyro.infer.ELBO``."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from pyro_flowkit.objectives.draws import Detached, Gated
from pyro_flowkit.objectives.scales import ScaleRecorder
from pyro_flowkit.objectives.weights import LogWeights, Run, log_weights
from pyro_flowkit.programs.sites import scored_sites


class WeightedObjective(ELBO):
    """An objective that is a function of the log weights of ``num_particles`` particles.

    Attributes:
        own_gradient: the gradient is the objective's own; ``path_gradient`` of a guide has no part in it.
        takes_draws_as_given: no gradient passes through draws, only log q at them.
    """

    own_gradient = True
    takes_draws_as_given = False
    _remedy_without_inverse = ""
    _least_particles = 1

    def __init__(
        self,
        num_particles: int = 10,
        *,
        plate: str | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
    ):
        least = self._least_particles
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"Expected num_particles to be an int, got {num_particles!r}.")
        if num_particles < least:
            raise ValueError(f"Expected num_particles >= {least}, got {num_particles}.")
        if plate is not None and not isinstance(plate, str):
            raise TypeError(f"Expected plate to be the name of a plate or None, got {plate!r}.")
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        self.plate = plate

    @torch.no_grad()
    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss in nats, without gradients."""
        runs = list(self._get_traces(model, guide, args, kwargs))
        loss = float(self._value(self._log_weights(runs)))
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar with the value of the loss, in nats, and the gradient of the objective."""
        runs = list(self._get_traces(model, guide, args, kwargs))
        for run in runs:
            self._check_draws(run)
        weights = self._log_weights(runs)
        surrogate = self._surrogate(weights, runs)
        loss = self._value(weights).detach() + (surrogate - surrogate.detach())
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss in nats; its gradient is added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Run:
        handler = self._handler() if torch.is_grad_enabled() else Messenger()
        model_scales, guide_scales = ScaleRecorder(), ScaleRecorder()
        unwrapped = poutine.unwrap(guide)
        if isinstance(unwrapped, Messenger):  # a GuideMessenger runs the model by itself
            with guide_scales, handler:
                guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
            model_scales = guide_scales
        else:
            with guide_scales, handler:
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            with model_scales:
                model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            if self.strict_enumeration_warning:
                check_if_enumerated(guide_trace)
        guide_trace = prune_subsample_sites(guide_trace)
        model_trace = prune_subsample_sites(model_trace)
        try:
            guide_trace.compute_log_prob()
        except (KeyError, NotImplementedError) as error:  # a draw that is found in no cache
            raise self._without_inverse(guide_trace) from error
        model_trace.compute_log_prob()
        for trace in (model_trace, guide_trace):
            for site in trace.nodes.values() if is_validation_enabled() else ():
                if site["type"] == "sample":
                    check_site_shape(site, self.max_plate_nesting)
        return Run(model_trace, guide_trace, handler, model_scales.around, guide_scales.around)

    def _without_inverse(self, guide_trace: poutine.Trace) -> ValueError:
        name, site = next((n, s) for n, s in scored_sites(guide_trace) if "log_prob" not in s)
        return ValueError(
            f"Expected guide sites with a log-density at any value, got {type(site['fn']).__name__} at {name!r} with a "
            f"transform that has no inverse (planar, radial, block-autoregressive flows and the like): "
            f"{type(self).__name__} {self._remedy_without_inverse}"
        )

    def _log_weights(self, runs: list[Run]) -> LogWeights:
        stacked = self.vectorize_particles and self.num_particles > 1
        return log_weights(
            runs,
            particle_dim=-int(self.max_plate_nesting) if stacked else None,
            plate=self.plate,
            linear=self._linear,
        )

    @property
    def _linear(self) -> bool:
        """Whether the objective is linear in the log weights."""
        return False

    @abstractmethod
    def _handler(self) -> Gated | Detached | Messenger:
        """What is around the guide while gradients are recorded."""

    @abstractmethod
    def _check_draws(self, run: Run) -> None:
        """Raises ValueError for draws that the gradient cannot deal with."""

    @abstractmethod
    def _value(self, weights: LogWeights) -> Tensor:
        """The loss."""

    @abstractmethod
    def _surrogate(self, weights: LogWeights, runs: list[Run]) -> Tensor:
        """A scalar with the gradient of the loss."""
