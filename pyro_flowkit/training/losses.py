"""The objectives of ``fit``, each in nats per datum but flow matching, with one backward pass per step.

maximum likelihood     -(1/B) sum_b log p(x_b)                   x_b: the rows of the batch
flow matching          (1/B) sum_b |v(x_t, t) - (x_b - z_b)|^2   see ContinuousFlow.matching_loss
variational            -ELBO(batch) / N                          see variational.Variational
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch

from pyro_flowkit.programs.modules import DIVIDER, buffers_of, modules_of, registered_modules
from pyro_flowkit.training.device import moved
from pyro_flowkit.training.state import module_tensors, write_into

Batch = tuple[torch.Tensor, ...]
STORE = "param_store."  # before the names of its entries


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
                f"Expected log_prob of shape {tuple(batch[0].shape[:1])}, one value per row, "
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
