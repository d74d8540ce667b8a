"""The two objectives of `fit`, each in nats per datum, with one backward pass per step.

    maximum likelihood     -(1/B) sum_b log p(x_b)                   x_b: the rows of the batch
    variational            -ELBO(batch) / N                          N: see plates.effective_size

Dividing by N makes learning rate and clipping independent of the size of the data. Without data
N = 1: the plain ELBO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger

from pyro_flowkit.training.plates import (
    check_plates,
    effective_size,
    latent_names,
    trace_pair,
)
from pyro_flowkit.training.state import modules_of

Batch = tuple[torch.Tensor, ...]


class _ParamCapture(Messenger):
    """Records the unconstrained parameters that a program touches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        # Inside a subsampled plate the value is a slice that remembers the whole.
        whole = getattr(value, "_pyro_unconstrained_param", None)
        self.found[msg["name"]] = value.unconstrained() if whole is None else whole


class _Loss:
    """Modules, parameters and frozen parameters: what both objectives share."""

    def __init__(self, *programs: Any) -> None:
        self.modules = modules_of(*programs)
        self.param_names: dict[str, None] = {}
        self._known: set[int] = set()
        self._parameters: list[torch.Tensor] = []
        self._frozen = [
            parameter
            for module in self.modules
            for parameter in module.parameters()
            if not parameter.requires_grad
        ]

    def parameters(self) -> list[torch.Tensor]:
        """All trainable parameters found so far (one list, which grows)."""
        return self._parameters

    def collect(self, touched: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Takes note of parameters; returns those not known before."""
        new = []
        for name, parameter in touched.items():
            self.param_names[name] = None
            if id(parameter) not in self._known and parameter.requires_grad:
                self._add(parameter)
                new.append(parameter)
        return new

    def _add(self, parameter: torch.Tensor) -> None:
        self._known.add(id(parameter))
        self._parameters.append(parameter)

    def collect_modules(self) -> None:
        """Takes note of the modules' parameters."""
        for module in self.modules:
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in self._known:
                    self._add(parameter)

    def refreeze(self) -> None:
        """Freezes what the caller had frozen: Pyro's param store unfreezes at the first call."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)


class MaximumLikelihood(_Loss):
    """-mean log p(batch) of a flow with an exact `log_prob`."""

    def __init__(self, flow: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__(flow)
        self._flow, self._args, self._kwargs = flow, args, kwargs

    def prepare(self, batch: Batch, data_size: int, check: bool) -> None:
        """Lists the parameters, after a first evaluation that may create some.

        Raises:
            ValueError: If the first batch holds NaN, or `log_prob` is not one value per row.
        """
        for tensor in batch:
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ValueError(
                    f"expected data without NaN, got {int(tensor.isnan().sum())} NaN among "
                    f"{tensor.numel()} values"
                )
        with torch.no_grad():
            log_prob = self._flow.log_prob(*batch, *self._args, **self._kwargs)
        if batch and log_prob.shape != batch[0].shape[:1]:
            raise ValueError(
                f"expected log_prob of shape {tuple(batch[0].shape[:1])}, one value per row, "
                f"got {tuple(log_prob.shape)}"
            )
        self.refreeze()
        self.collect_modules()

    def backward(self, batch: Batch) -> tuple[float, list[torch.Tensor]]:
        """One evaluation with gradients; returns (loss, new parameters)."""
        loss = -self._flow.log_prob(*batch, *self._args, **self._kwargs).mean()
        loss.backward()
        return loss.item(), []

    def evaluate(self, batch: Batch) -> float:
        """The loss without gradients."""
        return -float(self._flow.log_prob(*batch, *self._args, **self._kwargs).mean())


class Variational(_Loss):
    """-ELBO / N of a Pyro model and guide."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        has_guide: bool,
    ) -> None:
        super().__init__(model, guide)
        self._model, self._guide = model, guide
        self._args, self._kwargs, self._has_guide = args, kwargs, has_guide
        self._normalizer = 1.0
        self._sizes: dict[int, float] = {}
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

    def prepare(self, batch: Batch, data_size: int, check: bool) -> None:
        """Runs model and guide once: creates lazy parameters, checks plates, finds N.

        Raises:
            ValueError: If there is no guide but a latent site, or the plates are wrong.
        """
        with _ParamCapture() as capture:
            model_trace, guide_trace = self.traces(batch)
        latent = [] if self._has_guide else latent_names(model_trace)
        if latent:
            raise ValueError(
                f"expected a guide for the latent sites of the model, got guide=None and {latent}"
            )
        if batch:
            if check:
                check_plates(model_trace, guide_trace, len(batch[0]), data_size)
            self._normalizer = effective_size(model_trace, len(batch[0]))
        self.refreeze()
        self.collect(capture.found)
        self.collect_modules()

    def traces(self, batch: Batch) -> tuple[Any, Any]:
        """Traces of model and guide on a batch, without gradients."""
        return trace_pair(self._model, self._guide, (*batch, *self._args), self._kwargs)

    def backward(self, batch: Batch) -> tuple[float, list[torch.Tensor]]:
        """One evaluation with gradients; returns (loss, new parameters)."""
        with _ParamCapture() as capture:
            if self._differentiable:
                total = self._objective.differentiable_loss(
                    self._model, self._guide, *batch, *self._args, **self._kwargs
                )
            else:
                total = self._objective.loss_and_grads(
                    self._model, self._guide, *batch, *self._args, **self._kwargs
                )
        new = self.collect(capture.found)
        if self._differentiable:
            loss = total / self._normalizer
            loss.backward()
            return loss.item(), new
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._normalizer)
        return float(total) / self._normalizer, new

    def evaluate(self, batch: Batch) -> float:
        """The loss without gradients, per datum of this batch's plate."""
        with poutine.block():
            total = self._objective.loss(
                self._model, self._guide, *batch, *self._args, **self._kwargs
            )
        if not batch:
            return float(total)
        rows = len(batch[0])
        if rows not in self._sizes:
            self._sizes[rows] = effective_size(self.traces(batch)[0], rows)
        return float(total) / self._sizes[rows]
