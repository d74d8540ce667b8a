"""The objectives of ``fit``, each in nats per datum but flow matching, with one backward pass per step.

    maximum likelihood     -(1/B) sum_b log p(x_b)                   x_b: the rows of the batch
    flow matching          (1/B) sum_b |v(x_t, t) - (x_b - z_b)|^2   see ContinuousFlow.matching_loss
    variational            -ELBO(batch) / N                          N: see plates.effective_size

Dividing by N makes learning rate and clipping independent of the size of the data. Without data
N = 1: the plain ELBO. While a KL schedule has a weight w other than 1, the ELBO's terms of latent
sites are multiplied by it:

    E_q[ log p(x | z) + w (log p(z) - log q(z)) ]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO

from pyro_flowkit.guides.latent_elbo import LatentELBO
from pyro_flowkit.guides.recipe import ObjectiveGuide
from pyro_flowkit.programs.derivative import Graph
from pyro_flowkit.programs.modules import DIVIDER, buffers_of, modules_of, registered_modules
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
from pyro_flowkit.training.device import moved
from pyro_flowkit.training.messengers import KLWeight, ParamCapture
from pyro_flowkit.training.state import module_tensors, write_into

Batch = tuple[torch.Tensor, ...]
STORE = "param_store."  # before the names of its entries


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""


class Loss:
    """Modules, parameters and frozen parameters: what both objectives share.

    Attributes:
        modules: The modules that are trained.
        registered: Those that plain functions register by ``pyro.module``, by name.
        learned: The trainable parameters found so far, by name.
        fresh: Those of them that nobody has taken note of yet.
        param_names: Entries of the param store that the programs touched.
        awaited: Values for entries of the param store that do not exist yet.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], *programs: Any) -> None:
        self._args, self._kwargs = args, kwargs
        self.modules = modules_of(*programs)
        self.registered: dict[str, torch.nn.Module] = {}
        self._given = programs
        self.learned: dict[str, torch.Tensor] = {}
        self.fresh: list[torch.Tensor] = []
        self.param_names: dict[str, None] = {}
        self.awaited: dict[str, torch.Tensor] = {}
        self._known: set[int] = set()
        self._familiar: set[str] = set()  # entries of the store that nothing new can be learned of
        self._parameters: list[torch.Tensor] = []
        self._frozen = [
            parameter
            for module in self.modules
            for parameter in module.parameters()
            if not parameter.requires_grad
        ]

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss with its graph, in nats per datum."""
        raise NotImplementedError

    def touch(self, batch: Batch) -> Any:
        """Runs the programs once, without gradients, and takes note of their parameters; what they gave."""
        raise NotImplementedError

    def backward(self, batch: Batch) -> float:
        """One evaluation with gradients; returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        return loss.item()

    def begin_step(self, number: int) -> None:
        """Takes note of how many steps came before the next one."""

    def move_arguments(self, device: torch.device) -> None:
        """Puts the tensors among the arguments after the batch on another device."""
        self._args, self._kwargs = moved(self._args, device), moved(self._kwargs, device)

    def parameters(self) -> list[torch.Tensor]:
        """All trainable parameters found so far (one list, which grows)."""
        return self._parameters

    def names(self) -> dict[int, str]:
        """Name of every trainable parameter, by ``id``."""
        return {id(parameter): name for name, parameter in self.learned.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that training changes, by name: of the modules, and of the param store what the programs touched."""
        tensors = module_tensors(self.modules)
        of_modules = {id(tensor) for tensor in tensors.values()}
        params = pyro.get_param_store()._params
        for name in self.param_names:
            if name in params and id(params[name]) not in of_modules:
                tensors[STORE + name] = params[name]
        tensors |= {STORE + name: buffer for name, buffer in buffers_of(self.registered).items()}
        return tensors

    def set_mode(self, training: bool) -> None:
        """Puts all modules into training or eval mode."""
        for module in (*self.modules, *self.registered.values()):
            module.train(training)

    def load(self, saved: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """Writes what :meth:`tensors` gave; entries of the param store that do not exist yet get theirs when they do.

        Args:
            saved: Tensors by name.
            batch: Any batch, to run the programs on: parameters may depend on the values of others.

        Raises:
            ValueError: If a tensor of a module is missing or has another shape.
        """
        live = self.tensors()
        later = {n: t for n, t in saved.items() if n not in live and n.startswith(STORE)}
        write_into(live, {name: tensor for name, tensor in saved.items() if name not in later})
        self.awaited |= {name.removeprefix(STORE): tensor for name, tensor in later.items()}
        if self.awaited:
            self.touch(batch)

    def _collect(self, touched: dict[str, torch.Tensor]) -> None:
        """Takes note of parameters that the programs touched for the first time."""
        if not touched:
            return
        of_modules = {id(tensor): name for name, tensor in module_tensors(self.modules).items()}
        for name, parameter in touched.items():
            self.param_names[name] = None
            self._familiar.add(name)
            self._add(of_modules.get(id(parameter), STORE + name), parameter)
        if any(DIVIDER in name for name in touched):
            self._find_registered()

    def _find_registered(self) -> None:
        known, self.registered = self.registered, registered_modules(*self._given)
        for name in self.registered.keys() - known.keys():
            self.registered[name].train()
            for path, buffer in buffers_of({name: self.registered[name]}).items():
                if path in self.awaited:
                    buffer.copy_(self.awaited.pop(path))

    def _collect_modules(self) -> None:
        for module, prefix in zip(self.modules, map(str, range(len(self.modules))), strict=True):
            for name, parameter in module.named_parameters():
                self._add(f"{prefix}.{name}", parameter)

    def _add(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.requires_grad and id(parameter) not in self._known:
            self._known.add(id(parameter))
            self._parameters.append(parameter)
            self.learned[name] = parameter
            self.fresh.append(parameter)

    def _refreeze(self) -> None:
        """Freezes what the caller had frozen: Pyro's param store unfreezes at the first call."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)


class MaximumLikelihood(Loss):
    """-mean log p(batch) of a flow with an exact ``log_prob``."""

    def __init__(self, flow: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__(args, kwargs, flow)
        self.model = flow
        self.log_prob: Callable[..., torch.Tensor] = flow.log_prob

    def prepare(self, batch: Batch, sizes: tuple[int, int] | None, check: bool) -> None:
        """Lists the parameters, after a first evaluation that may create some.

        Raises:
            ValueError: If ``log_prob`` is not one value per row.
        """
        log_prob = self.touch(batch)
        if batch and log_prob.shape != batch[0].shape[:1]:
            raise ValueError(
                f"expected log_prob of shape {tuple(batch[0].shape[:1])}, one value per row, "
                f"got {tuple(log_prob.shape)}"
            )

    def touch(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            log_prob = self.row_log_probs(batch)
        self._refreeze()
        self._collect_modules()
        return log_prob

    def row_log_probs(self, batch: Batch) -> torch.Tensor:
        """log p of every row, shape ``(B,)``."""
        return self.log_prob(*batch, *self._args, **self._kwargs)

    def is_finite(self, batch: Batch) -> bool:
        """Whether all rows have finite densities; the caller's random numbers are left alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                return bool(self.row_log_probs(batch).isfinite().all())
            except Exception:  # a module that is given other rows may do anything
                return False

    def loss(self, batch: Batch) -> torch.Tensor:
        return -self.row_log_probs(batch).mean()

    def evaluate(self, batch: Batch) -> float:
        """The loss without gradients."""
        return float(self.loss(batch))


class FlowMatching(MaximumLikelihood):
    """The mean loss of flow matching of a ``ContinuousFlow``, in the place of its log-density."""

    def __init__(self, flow: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__(flow, args, kwargs)
        self.log_prob = lambda *batch, **kwargs: -flow.matching_loss(*batch, **kwargs)


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
                f"expected a guide for the latent sites of the model, got guide=None and {latent}"
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
                f"expected an objective with differentiable_loss, got {type(self._objective).__name__}"
            )
        total = self._total(batch, self._objective.differentiable_loss)
        if not isinstance(total, torch.Tensor):
            raise TypeError(
                "expected a flow with log_prob, or a Pyro model with a density (pyro.sample, pyro.factor), got "
                f"{type(self._given[0]).__name__} without one"
            )
        return total / self._normalizer

    def backward(self, batch: Batch) -> float:
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
