"""Flows, guides and Pyro models in Lightning's ``Trainer``, for jobs that already run there (SLURM, loggers, DDP).

``pyro_flowkit.fit`` is the trainer of this package; this adapter is for those who have one. It needs the extra
``pyro-flowkit[lightning]``, and nothing else of the package imports it.

    module = FlowModule(model, guide, example=x[:100], data_size=len(x))
    lightning.Trainer(max_epochs=20).fit(module, RowLoader(x, batch_size=100))

Lightning keeps no state of random number generators, so a resumed run is another run. Here the noise of a training
step is a function of (seed, number of batches done, rank): the same after a restart, and independent between ranks.
The global generators, which DataLoaders shuffle with, go into the checkpoint. So a run resumed at the end of an epoch
is bit-equal to the uninterrupted one, and with a ``RowLoader`` one resumed in the midst of an epoch, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_flowkit.programs.modules import DIVIDER, copied
from pyro_flowkit.programs.pairs import set_up
from pyro_flowkit.recipe import recipe_of
from pyro_flowkit.training.data import as_batch
from pyro_flowkit.training.losses import STORE
from pyro_flowkit.training.objective import chosen_loss
from pyro_flowkit.training.optimizer import DEFAULT_LR, Factory, build_optimizer
from pyro_flowkit.training.row_loader import RowLoader
from pyro_flowkit.training.schedule import SCHEDULES
from pyro_flowkit.training.state import random_state, set_random_state, write_into
from pyro_flowkit.training.variational import Variational

__all__ = ["FlowModule", "RowLoader"]

OLDEST = (2, 6, 6)


def _check_version(found: str | None) -> None:
    """Refuses a Lightning that is not there or not safe, before any of its code runs."""
    wanted = ".".join(map(str, OLDEST))
    advice = "pip install 'pyro-flowkit[lightning]'"
    if found is None:
        raise ImportError(f"Expected lightning >= {wanted}, got none: {advice}")
    parts = found.split("+")[0].split(".")[:3]
    if tuple(int(part) if part.isdigit() else -1 for part in parts) < OLDEST:
        raise ImportError(
            f"Expected lightning >= {wanted}, got {found}: a checkpoint file could execute code in earlier "
            f"versions. {advice}"
        )


try:
    _found: str | None = version("lightning")
except PackageNotFoundError:
    _found = None
_check_version(_found)

from lightning import LightningModule  # noqa: E402  (not before its version is known)

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

FORMAT = 1
KEY = "pyro_flowkit"
TRAINING, VALIDATION = 0, 1


class FlowModule(LightningModule):
    """A flow, or a Pyro model and guide, as a ``LightningModule``.

    The objectives are those of ``pyro_flowkit.fit``, in nats per datum, and logged as "elbo" (steps) and "validation"
    (with the same noise every time): ``ModelCheckpoint(monitor="validation", mode="max")``. What ``fit`` does besides
    (skipping non-finite steps, the Gaussian start of ``AutoSplineFlow``, choosing the best state) is left to
    Lightning's callbacks.

    All parameters come into being here, from the example, before Lightning asks for them. Frozen ones stay frozen.
    Those that plain functions make by ``pyro.param`` become parameters of this module.

    Args:
        model: A flow with ``log_prob(*batch, *args)``, or a Pyro model.
        guide: Its guide; None for a flow and for a model without latents.
        example: A batch like those that the loader gives (a tensor, or a tuple of tensors), on the model's device.
        data_size: Number of training rows; needed for a Pyro model, unless ``check_plates`` is False.
        args: Further positional arguments of model and guide.
        kwargs: Keyword arguments.
        objective: An instance of ``pyro.infer.ELBO`` with a ``differentiable_loss``; default as in ``fit``.
        num_particles: Particles of the default objective; default the guide's recipe, or 1.
        lr: Initial learning rate; default the recipe of the guide or of a ``ContinuousFlow``, or 3e-3.
        optimizer: A callable ``params -> torch.optim.Optimizer``; ``lr`` is passed on if given. Default Adam.
        scheduler: "cooldown", "flat_cosine", "cosine", "constant" or "step", over the steps of the trainer, or a
            callable ``optimizer -> LRScheduler``, advanced at every step. Default the recipe's, or "constant".
        check_plates: Compare the plates with ``data_size`` on the example.
        seed: Of the noise; default drawn from PyTorch's generator.

    Raises:
        TypeError: If the example or the objective is of the wrong kind.
        ValueError: If the plates do not match ``data_size``, a latent site has no guide, no parameter is trainable, or
            a plain function uses ``pyro.module`` with a network that belongs to no module.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        *,
        example: Tensor | tuple[Tensor, ...],
        data_size: int | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        objective: ELBO | None = None,
        num_particles: int | None = None,
        lr: float | None = None,
        optimizer: Factory | None = None,
        scheduler: str | SchedulerFactory | None = None,
        check_plates: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        batch = as_batch(example, "example")
        call = ((*batch, *args), dict(kwargs or {}))
        set_up(guide, *call)
        recipe = recipe_of(model, guide, objective)
        self._lr, self._default_lr = lr, recipe.lr or DEFAULT_LR
        self._factory = optimizer
        self._scheduler = scheduler or recipe.scheduler or "constant"
        if not callable(self._scheduler) and self._scheduler not in SCHEDULES:
            raise ValueError(
                f"Expected scheduler to be one of {', '.join(SCHEDULES)}, got {self._scheduler!r}"
            )
        self._total_steps = float("nan")
        self._seed = int(torch.randint(2**31, ())) if seed is None else seed
        self._batches_done = 0
        self._checked_gradients = False
        loss = chosen_loss(
            model,
            guide,
            batch,
            tuple(args),
            call[1],
            objective=objective,
            num_particles=num_particles,
        )
        if isinstance(loss, Variational):
            if check_plates and data_size is None:
                raise ValueError("Expected data_size, to compare the plates with it, got None")
            if not hasattr(loss.objective, "differentiable_loss"):
                raise TypeError(
                    "Expected an objective with differentiable_loss, which Lightning needs, "
                    f"got {type(loss.objective).__name__}"
                )
        loss.set_mode(training=True)
        sizes = None if data_size is None else (data_size, data_size)
        loss.prepare(batch, sizes, check_plates)
        self._loss = loss
        self.programs = nn.ModuleList(loss.modules)
        self.store = nn.ParameterDict()
        self._adopt_store_parameters()
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                "Expected at least one trainable parameter in model or guide, got none"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, in nats per datum.

        Raises:
            ValueError: If a parameter comes into being that the example did not show.
        """
        rows = as_batch(batch, "every batch")
        with self._noise(TRAINING, self._batches_done):
            loss = self._loss.loss(rows)
        self._batches_done += 1
        if self._loss.fresh:
            known = {id(parameter) for parameter in self.parameters()}
            late = [n for n, p in self._loss.learned.items() if id(p) not in known]
            raise ValueError(
                f"Expected all parameters to come into being with the example, got {', '.join(late)} later"
            )
        self.log("elbo", -loss.detach(), prog_bar=True, batch_size=len(rows[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the objective of a batch, the same noise for it every time."""
        rows = as_batch(batch, "every batch")
        with self._noise(VALIDATION, batch_idx):
            value = -self._loss.evaluate(rows)
        self.log("validation", value, prog_bar=True, batch_size=len(rows[0]), sync_dist=True)

    def on_after_backward(self) -> None:
        """Checks, once, that no gradient went to a tensor that no optimizer holds.

        Raises:
            ValueError: If one did: strategies that shard parameters replace them, and Pyro's own modules go on
                with those of the param store.
        """
        if self._checked_gradients:
            return
        self._checked_gradients = True
        groups = [g for optimizer in self.trainer.optimizers for g in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        params = pyro.get_param_store()._params
        used = [name for name in self._loss.param_names if name in params]
        lost = [n for n in used if params[n].grad is not None and id(params[n]) not in held]
        if lost:
            raise ValueError(
                f"Expected the optimizer to hold the parameters of the param store, got others for {', '.join(lost)}: "
                "they would not be trained. A strategy that shards parameters takes flows and the guides of this "
                "package; Pyro's own guides need one that does not, such as ddp"
            )

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule that goes on at every step."""
        params: list[Tensor] = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(self._factory, params, self._lr, self._default_lr)
        if self._scheduler == "constant":
            return optimizer
        if callable(self._scheduler):
            schedule = self._scheduler(optimizer)
        else:
            factor = SCHEDULES[self._scheduler]
            # The total is not known before the loader is; all schedules begin at 1.
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: factor(min(step / self._total_steps, 1.0)) if step else 1.0
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Learns how many steps there will be."""
        self._total_steps = self.trainer.estimated_stepping_batches
        if self._total_steps == float("inf") and isinstance(self._scheduler, str):
            if self._scheduler != "constant":
                raise ValueError(
                    f"Expected max_steps or max_epochs of the trainer for scheduler={self._scheduler!r}, got none"
                )

    def setup(self, stage: str) -> None:
        """Puts the arguments where the module will be."""
        self._loss.move_arguments(self.trainer.strategy.root_device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state of the random numbers and of buffers in no ``state_dict``, as plain tensors and numbers."""
        checkpoint[KEY] = {
            "format": FORMAT,
            "seed": self._seed,
            "batches_done": self._batches_done,
            "buffers": copied(self._unsaved_buffers()),
            "random": {**random_state(), "cuda": []},  # noise on a GPU is seeded at every step
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back; the global generators only where training goes on.

        Raises:
            ValueError: If the checkpoint has none, or in another format.
        """
        saved = checkpoint.get(KEY, {})
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"Expected a checkpoint of a FlowModule, format {FORMAT}, got {saved.get('format')!r}"
            )
        self._seed, self._batches_done = saved["seed"], saved["batches_done"]
        write_into(self._unsaved_buffers(), saved["buffers"])
        if self._trainer is not None and self._trainer.state.fn == "fit":
            set_random_state(saved["random"])

    def _unsaved_buffers(self) -> dict[str, Tensor]:
        """Buffers that a ``state_dict`` leaves out, such as what ``AutoSplineFlow`` measures as it trains."""
        return {
            f"{path}.{name}": buffer
            for path, part in self.programs.named_modules()
            for name, buffer in part.named_buffers(recurse=False)
            if name in part._non_persistent_buffers_set
        }

    @contextmanager
    def _noise(self, *key: int) -> Iterator[None]:
        """Random numbers that are a function of seed, key and rank; the global ones stay where they are."""
        words = np.random.SeedSequence((self._seed, *key, self.global_rank)).generate_state(2)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
            yield

    def _adopt_store_parameters(self) -> None:
        """Makes parameters of this module out of what plain functions made by ``pyro.param``."""
        params, names = pyro.get_param_store()._params, pyro.get_param_store()._param_to_name
        for key, tensor in self._loss.learned.items():
            if not key.startswith(STORE):
                continue
            name = key.removeprefix(STORE)
            if DIVIDER in name:
                raise ValueError(
                    f"Expected the networks of model and guide to belong to a module, got pyro.module"
                    f"({name.split(DIVIDER)[0]!r}, ...) in a plain function: Lightning could neither save its buffers "
                    "nor move it. Make the function a method of an nn.Module that holds the network"
                )
            parameter = nn.Parameter(tensor.detach())
            del names[params[name]]
            params[name], names[parameter] = parameter, name
            self._loss.learned[key] = parameter
            self.store[name.replace(".", "/")] = parameter
        self._loss.fresh.clear()
