"""The ELBO of a Pyro model and guide as an objective of ``fit``, in nats per datum.

    -ELBO(batch) / N                          N: see plates.effective_size

Dividing by N makes learning rate and clipping independent of the size of the data. Without data
N = 1: the plain ELBO. While a KL schedule has a weight w other than 1, the ELBO's terms of latent
sites are multiplied by it:

    E_q[ log p(x | z) + w (log p(z) - log q(z)) ]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO

from pyro_flowkit.guides.latent_elbo import LatentELBO
from pyro_flowkit.guides.protocols import ObjectiveGuide
from pyro_flowkit.programs.derivative import Graph
from pyro_flowkit.programs.pairs import trace_pair
from pyro_flowkit.programs.plates import (
    TrainingRows,
    check_guided,
    check_plates,
    effective_size,
)
from pyro_flowkit.programs.sites import (
    enumerated_names,
    gives_points,
    latent_names,
    scored_sites,
    unscaled_log_prob,
)
from pyro_flowkit.programs.vectorized import Vectorized
from pyro_flowkit.training.losses import Batch, Loss
from pyro_flowkit.training.messengers import KLWeight, ParamCapture
from pyro_flowkit.training.state import module_tensors


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""


class Variational(Loss):
    """-ELBO / N of a Pyro model and guide.

    Attributes:
        model: The model as it is trained, whose plates of all rows stand for those that are trained on.
        is_point: Whether the guide puts every latent at a point, after :meth:`prepare`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        has_guide: bool,
        rows: TrainingRows | None = None,
    ) -> None:
        super().__init__(args, kwargs, model, guide)
        self.model, self._guide = model, guide
        if rows is not None:
            self.model = rows(model)
            if not isinstance(guide, ObjectiveGuide):  # which may be called by other names
                self._guide = rows(guide)
        self._programs = (self.model, self._guide)  # as the objective runs them
        self._vectorized: Callable[..., Any] | None = None
        self._weight: KLWeight | None = None
        self._has_guide = has_guide
        self._normalizer = 1.0
        self._sizes: dict[int, float] = {}
        self.is_point = False
        self.enumerated: list[str] = []  # sites that the objective sums out
        self.objective = Trace_ELBO()

    @property
    def objective(self) -> ELBO:
        """The estimator of the ELBO."""
        return self._objective

    @objective.setter
    def objective(self, objective: ELBO) -> None:
        self._objective = objective
        # Some of Pyro's objectives (TraceGraph_ELBO, RenyiELBO) only offer loss_and_grads.
        self._differentiable = hasattr(objective, "differentiable_loss")

    def run_vectorized(self, program: Vectorized) -> None:
        """Let the objective, whose particles are in a plate, run the model by this program."""
        self._vectorized = program
        self._programs = (program, self._guide)

    @property
    def kl_weight(self) -> float:
        """What the log-probabilities of latent sites are multiplied by in :meth:`loss` and :meth:`backward`."""
        if isinstance(self._objective, LatentELBO):
            return self._objective.kl_weight
        return 1.0 if self._weight is None else self._weight.weight

    @kl_weight.setter
    def kl_weight(self, weight: float) -> None:
        if isinstance(self._objective, LatentELBO):
            self._objective.kl_weight = weight
            return
        if self._weight is None:
            self._weight = KLWeight()
            model, guide = self._programs
            self._programs = self._weight(model), self._weight(guide)
        self._weight.weight = weight

    def prepare(self, batch: Batch, sizes: tuple[int, int] | None, check: bool) -> None:
        """Runs model and guide once: creates lazy parameters, checks plates, finds N.

        Args:
            batch: The first batch.
            sizes: Number of data, and of data with what ``val_fraction`` took off; None where unknown.
            check: Whether to compare the plates with them.

        Raises:
            ValueError: If a latent site has no guide, or the plates are wrong.
        """
        model_trace, guide_trace = self.touch(batch)
        if isinstance(self._objective, TraceEnum_ELBO):
            self.enumerated = enumerated_names(model_trace) + enumerated_names(guide_trace)
        latent = [] if self._has_guide else latent_names(model_trace)
        if latent:
            raise ValueError(
                f"Expected a guide for the latent sites of the model, got guide=None and {latent}"
            )
        if self._has_guide:
            check_guided(model_trace, guide_trace)
            self.is_point = gives_points(guide_trace)
        if batch:
            if check and sizes is not None:
                check_plates(model_trace, guide_trace, len(batch[0]), *sizes)
            self._normalizer = effective_size(model_trace, len(batch[0]))

    def touch(self, batch: Batch) -> tuple[Any, Any]:
        with ParamCapture(self.param_names, self.awaited) as capture:
            traces = self.traces(batch)
        self._refreeze()
        self._collect(capture.found)
        self._collect_modules()
        # Guides of this package have their buffers in the store, too, as entries of the same memory.
        own = {tensor.data_ptr() for tensor in module_tensors(self.modules).values()}
        params = pyro.get_param_store()._params
        self._familiar |= {name for name, entry in params.items() if entry.data_ptr() in own}
        return traces

    def traces(self, batch: Batch) -> tuple[Any, Any]:
        """Traces of model and guide on a batch, without gradients."""
        return trace_pair(self.model, self._guide, (*batch, *self._args), self._kwargs)

    def begin_step(self, number: int) -> None:
        if isinstance(self._objective, LatentELBO):
            self._objective.num_steps = number

    def density_graph(self, batch: Batch) -> Graph | None:
        """The model's density with its derivative as a graph, if steps on such a batch are to use one."""
        if not isinstance(self._objective, LatentELBO):
            return None
        guide: Any = self._guide  # one that such an objective is for
        return self._objective.density_graph(guide, (*batch, *self._args), self._kwargs)

    def is_finite(self, batch: Batch) -> bool:
        """Whether all sites have finite densities on a batch; the caller's random numbers are left alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), pyro.validation_enabled(False):
            try:
                traces = self.traces(batch)
                densities = [
                    unscaled_log_prob(
                        site | {"unscaled_log_prob": site["fn"].log_prob(site["value"])}
                    )
                    for trace in traces
                    for _, site in scored_sites(trace)
                ]
            except Exception:  # a program that is given other rows may do anything
                return False
        return all(bool(density.isfinite().all()) for density in densities)

    def loss(self, batch: Batch) -> torch.Tensor:
        if not self._differentiable:
            raise TypeError(
                f"Expected an objective with differentiable_loss, got {type(self._objective).__name__}"
            )
        total = self._total(batch, self._objective.differentiable_loss)
        if not isinstance(total, torch.Tensor):
            raise TypeError(
                "Expected a flow with log_prob, or a Pyro model with a density (pyro.sample, pyro.factor), got "
                f"{type(self._given[0]).__name__} without one"
            )
        return total / self._normalizer

    def backward(self, batch: Batch) -> float:
        if isinstance(self._objective, LatentELBO):
            return float(self._total(batch, partial(self._objective.step, self._normalizer)))
        if self._differentiable:
            return super().backward(batch)
        total = self._total(batch, self._objective.loss_and_grads)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._normalizer)
        return float(total) / self._normalizer

    def _total(self, batch: Batch, estimate: Callable[..., Any]) -> Any:
        inputs = (*self._programs, *batch, *self._args)
        params = pyro.get_param_store()._params
        if self.awaited or not self._familiar.issuperset(params):
            with ParamCapture(self.param_names, self.awaited) as capture:
                total = estimate(*inputs, **self._kwargs)
            self._collect(capture.found)
            return total
        # All that is in the store is known: what a step adds to it can be told without watching every site.
        total = estimate(*inputs, **self._kwargs)
        if len(params) > len(self._familiar):
            self._collect({name: params[name] for name in params.keys() - self._familiar})
        return total

    def evaluate(self, batch: Batch) -> float:
        """The loss without gradients, per datum of this batch's plate."""
        objective = self._objective
        weight = self.kl_weight
        if isinstance(objective, LatentELBO):
            objective.kl_weight = 1.0
        with poutine.block():
            model = self._vectorized or self.model
            total = objective.loss(model, self._guide, *batch, *self._args, **self._kwargs)
        if isinstance(objective, LatentELBO):
            objective.kl_weight = weight
        if not batch:
            return float(total)
        rows = len(batch[0])
        if rows not in self._sizes:
            self._sizes[rows] = effective_size(self.traces(batch)[0], rows)
        return float(total) / self._sizes[rows]
