"""The recipe for a table: start at its Gaussian, train on most rows, let held-out rows judge.

The flow is trained by maximum likelihood in whitened units, where it starts as the Gaussian of maximum likelihood. The
validation rows choose the step whose parameters are kept, and in the end whether the flow is kept at all: it must gain
more on them than two standard errors of its gain, or else the density is the Gaussian itself.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pyro
import torch
from torch import Tensor, nn

from pyro_flowkit.tables.columns import Table
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import FlowSettings, TableFlow
from pyro_flowkit.tables.order import order_columns
from pyro_flowkit.tables.preparation import Preparation
from pyro_flowkit.tables.rows import RowDensity
from pyro_flowkit.tables.split import Split
from pyro_flowkit.training import FitResult, fit

LEARNING_RATE = 5e-3
BATCH_SIZE = 256
CLIP_NORM = 5.0
DECAY_ROWS = 8000  # up to so many rows the decay of weights is 1; beyond, the rows hold the networks themselves
DEFAULT_SECONDS = 80.0
DEFAULT_EPOCHS = 16
LEAST_STEPS, MOST_STEPS = 500, 2000


@dataclass(frozen=True)
class TrainOptions:
    """How long and how to train; None leaves it to the recipe."""

    steps: int | None = None
    seconds: float | None = None
    batch_size: int = BATCH_SIZE
    lr: float = LEARNING_RATE
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What training a table gives.

    Attributes:
        density: what is kept.
        settings: of the flow, with the order that was found for its columns.
        result: the course of the training.
        log_prob: of the density, and gaussian_log_prob of the Gaussian: by "train", "validation" and "test", each shape
            ``(rows,)`` in nats.
    """

    density: RowDensity
    settings: FlowSettings
    result: FitResult
    log_prob: dict[str, Tensor]
    gaussian_log_prob: dict[str, Tensor]


class _Noisy(nn.Module):
    """A flow that sees fresh noise in the columns of integers at every call."""

    def __init__(self, flow: TableFlow, noise_map: Tensor):
        super().__init__()
        self.flow = flow
        self.register_buffer("noise_map", noise_map)
        self.noise_map: Tensor

    def log_prob(self, w: Tensor) -> Tensor:
        noise = torch.rand(len(w), self.noise_map.shape[1], dtype=w.dtype) - 0.5
        return self.flow.log_prob(w + noise @ self.noise_map.mT)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks of this size lose much by a second thread wherever one thread has to wait for the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optimizer(
    flow: TableFlow, decay: float, params: list[Tensor], *, lr: float
) -> torch.optim.Optimizer:
    """Adam with decoupled decay of the networks' weights, which pulls every coupling towards the identity."""
    networks = {id(p) for name, p in flow.named_parameters() if name.endswith("conditioner.packed")}
    groups = [
        {"params": [p for p in params if id(p) in networks], "weight_decay": decay},
        {"params": [p for p in params if id(p) not in networks], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def weight_decay(rows: int) -> float:
    """Of the networks: 1 for few training rows, where nothing else keeps them from fitting each row, and then less."""
    return min(1.0, (DECAY_ROWS / rows) ** 2)


def default_steps(rows: int, batch_size: int) -> int:
    """So many passes over the rows as flows gain from before they overfit, within limits."""
    wished = math.ceil(DEFAULT_EPOCHS * rows / batch_size)
    return min(max(wished, LEAST_STEPS), MOST_STEPS)


def train(
    table: Table, split: Split, settings: FlowSettings, options: TrainOptions, *, progress: bool
) -> Trained:
    """Train a flow on the training rows; keep it if the validation rows gain by it.

    Args:
        table: checked rows.
        split: which of them are for what.
        settings: structure of the flow.
        options: how long and how to train.
        progress: show a bar.

    Raises:
        TableError: if the settings make no flow.
    """
    preparation = Preparation.of(table.values[split.train], table.columns, table.discrete)
    rows = {
        "train": torch.from_numpy(table.values[split.train]),
        "validation": torch.from_numpy(table.values[split.validation]),
        "test": torch.from_numpy(table.values[split.test]),
    }
    middle = 0.5 * torch.tensor(table.discrete, dtype=torch.float64)
    seen = {name: preparation.to_flow(part + middle).float() for name, part in rows.items()}
    pyro.set_rng_seed(options.seed)
    try:
        settings = replace(settings, order=order_columns(seen["train"], seed=options.seed))
        flow = TableFlow(len(table.columns), settings)
    except ValueError as error:
        raise TableError(str(error)) from error
    noisy = any(table.discrete)
    batch_size = min(options.batch_size, max(1, len(seen["train"]) // 4))
    steps, seconds = options.steps, options.seconds
    if steps is None and seconds is None:
        steps, seconds = default_steps(len(seen["train"]), batch_size), DEFAULT_SECONDS
    with _one_thread():
        result = fit(
            _Noisy(flow, preparation.noise_map().float()) if noisy else flow,
            data=seen["train"],
            val_data=seen["validation"],
            max_steps=steps,
            max_seconds=seconds,
            batch_size=batch_size,
            lr=options.lr,
            scheduler="cosine",
            clip_norm=CLIP_NORM,
            optimizer=partial(_optimizer, flow, weight_decay(len(seen["train"]))),
            seed=options.seed,
            progress=progress,
        )
    gaussian, trained = RowDensity(preparation), RowDensity(preparation, flow)
    gaussian_log_prob = {name: gaussian.log_prob(part) for name, part in rows.items()}
    held_out = rows["validation"]
    gain = trained.log_prob(held_out) - gaussian_log_prob["validation"]
    if is_gain(gain):
        log_prob = {name: trained.log_prob(part) for name, part in rows.items()}
        return Trained(trained, settings, result, log_prob, gaussian_log_prob)
    return Trained(gaussian, settings, result, gaussian_log_prob, gaussian_log_prob)


def is_gain(differences: Tensor) -> bool:
    """Whether the mean of paired differences exceeds two standard errors; False where any is not finite."""
    if len(differences) < 2 or not bool(differences.isfinite().all()):
        return False
    return float(differences.mean()) > 2.0 * float(differences.std()) / math.sqrt(len(differences))
