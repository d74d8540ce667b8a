"""The recipe for a table: start at its Gaussian, train on most rows, let held-out rows judge.

The flow is trained by maximum likelihood in whitened units, where it starts as the Gaussian of maximum likelihood.
Where columns have tails without a variance, the validation rows choose whether it starts at Student's t instead. They
choose the step whose parameters are kept, and in the end whether the flow is kept at all: it must gain more on them
than two standard errors of its gain, or else the density is the Gaussian itself.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_flowkit.tables.atoms import AtomHeads
from pyro_flowkit.tables.columns import Table
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import FlowSettings, TableFlow
from pyro_flowkit.tables.heavy_tails import HEAVY, has_heavy_tails
from pyro_flowkit.tables.order import order_columns
from pyro_flowkit.tables.preparation import Preparation
from pyro_flowkit.tables.rows import RowDensity
from pyro_flowkit.tables.split import Split, per_original
from pyro_flowkit.training import FitResult, fit

LEARNING_RATE = 5e-3
BATCH_SIZE = 256
CLIP_NORM = 5.0
DECAY_ROWS = 8000  # up to so many rows the decay of weights is 1; beyond, the rows hold the networks themselves
DEFAULT_SECONDS = 80.0
DEFAULT_EPOCHS = 16
LEAST_STEPS, MOST_STEPS = 500, 2000
PATIENCE = 8  # validations without a gain, of the steps that the rows decide about
JUDGES = 8  # validation rows; fewer are no judges of a flow
VALIDATION_SHARE = 0.1  # of the time of training, for choosing the step
LEAST_VALIDATION_ROWS = 1024
SCORED_ROWS = 20_000  # of those that trained


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
        result: the course of the training; None where there were too few rows for it.
        log_prob: of the density, and gaussian_log_prob of the Gaussian: by "train", "validation" and "test", each shape
            ``(rows,)`` in nats; of many training rows the first 20,000.
        copy_of: which row of the table each of them is a copy of, itself if of none; by part.
        log_scale: sum of the logarithms of the columns' standard deviations.
        is_flow: whether what was trained is kept, rather than the Gaussian.
    """

    density: RowDensity
    settings: FlowSettings
    result: FitResult | None
    log_prob: dict[str, Tensor]
    gaussian_log_prob: dict[str, Tensor]
    copy_of: dict[str, np.ndarray]
    log_scale: float
    is_flow: bool


class _Model(nn.Module):
    """What is trained: a flow that sees fresh noise in the columns of integers at every call, and heads for atoms."""

    def __init__(self, flow: TableFlow | None, heads: AtomHeads | None, noise_map: Tensor):
        super().__init__()
        self.flow, self.heads = flow, heads
        self.register_buffer("noise_map", noise_map)
        self.noise_map: Tensor

    def log_prob(self, w: Tensor, *given: Tensor) -> Tensor:
        if self.noise_map.shape[1]:
            noise = torch.rand(len(w), self.noise_map.shape[1], dtype=w.dtype) - 0.5
            w = w + noise @ self.noise_map.mT
        total = w.new_zeros(len(w)) if self.flow is None else self.flow.log_prob(w)
        return total if self.heads is None else total + self.heads.log_prob(w, *given)


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
    flow: nn.Module, decay: float, params: list[Tensor], *, lr: float
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


def validation_rows(steps: int | None, batch_size: int) -> int:
    """How many rows choose the step: a row that is trained on costs three of them, and ``fit`` validates 20 times."""
    between = 100 if steps is None else min(100, max(1, steps // 20))
    return max(LEAST_VALIDATION_ROWS, int(VALIDATION_SHARE * 3 * between * batch_size))


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
    values = table.values[split.train]
    plain = [i for i, name in enumerate(table.columns) if name not in table.atoms]
    preparation = Preparation.of(
        values[:, plain],
        tuple(table.columns[i] for i in plain),
        tuple(table.discrete[i] for i in plain),
    )
    parts = {
        "train": split.train[:SCORED_ROWS],
        "validation": split.validation,
        "test": split.test,
    }
    rows = {name: torch.from_numpy(table.values[part]) for name, part in parts.items()}
    copy_of = {name: split.copy_of[part] for name, part in parts.items()}
    gaussian = _with_heads(RowDensity(preparation), table, values)
    gaussian_log_prob = {name: gaussian.log_prob(part) for name, part in rows.items()}

    def gains(differences: Tensor) -> bool:
        return is_gain(per_original(differences, copy_of["validation"]))

    kept, result = gaussian, None
    if len(np.unique(copy_of["validation"])) >= JUDGES:
        start = _with_heads(RowDensity(preparation), table, values)
        if plain:
            try:
                held_out = rows["validation"][:, plain]
                start = _start(
                    values[:, plain], held_out, preparation, settings, options.seed, gains
                )
                start = _with_heads(start, table, values)
            except ValueError as error:
                raise TableError(str(error)) from error
            if start.flow is not None:
                settings = start.flow.settings
        result = _fit(start, table, split, options, progress)
        if gains(start.log_prob(rows["validation"]) - gaussian_log_prob["validation"]):
            kept = start
    return Trained(
        kept,
        settings,
        result,
        {name: kept.log_prob(part) for name, part in rows.items()},
        gaussian_log_prob,
        copy_of,
        preparation.log_scale
        + (0.0 if gaussian.heads is None else gaussian.heads.log_scale(values)),
        kept is not gaussian,
    )


def _seen(density: RowDensity, values: np.ndarray) -> tuple[Tensor, ...]:
    """What a model sees of rows of shape ``(N, D)``: w, and of columns with atoms the scaled value and its kind."""
    preparation, heads = density.preparation, density.heads
    plain = values if heads is None else values[:, heads.plain]
    middle = 0.5 * torch.tensor(preparation.discrete, dtype=torch.float64)
    w = preparation.to_flow(torch.from_numpy(plain) + middle).float()
    return (w,) if heads is None else (w, heads.scaled(values), heads.kinds(values))


def _with_heads(density: RowDensity, table: Table, values: np.ndarray) -> RowDensity:
    """The density with fresh heads for the columns with atoms, if there are any."""
    if not table.atoms:
        return density
    heads = AtomHeads(table.columns, table.atoms)
    heads.start(values, _seen(replace(density, heads=heads), values)[0], table.values)
    return replace(density, heads=heads)


def _start(
    values: np.ndarray,
    held_out: Tensor,
    preparation: Preparation,
    settings: FlowSettings,
    seed: int,
    gains: Callable[[Tensor], bool],
) -> RowDensity:
    """A fresh flow over columns without atoms, in the units that its base goes with."""

    def flow(prepared: Preparation, base: str, degrees: Tensor | None = None) -> RowDensity:
        (seen,) = _seen(RowDensity(prepared), values)
        order = order_columns(seen, seed=seed)
        pyro.set_rng_seed(seed)
        made = TableFlow(len(order), replace(settings, order=order, base=base), degrees)
        return RowDensity(prepared, made)

    whitened = preparation.to_flow(torch.from_numpy(values)).numpy()
    if settings.base == "student_t" or (settings.base is None and has_heavy_tails(whitened)):
        robust, degrees = preparation.robust(values)
        heavy = flow(robust, "student_t", degrees)
        if settings.base is not None or (
            degrees.min() < HEAVY
            and gains(heavy.log_prob(held_out) - RowDensity(preparation).log_prob(held_out))
        ):
            return heavy
    return flow(preparation, settings.base or "normal")


def _fit(
    start: RowDensity, table: Table, split: Split, options: TrainOptions, progress: bool
) -> FitResult:
    """Train flow and heads of a density in place."""
    seen = _seen(start, table.values[split.train])
    chosen = _seen(start, table.values[split.validation])
    model = _Model(start.flow, start.heads, start.preparation.noise_map().float())
    count = len(split.train)
    batch_size = min(options.batch_size, max(1, count // 4))
    steps, seconds, patience = options.steps, options.seconds, None
    if steps is None and seconds is None:
        steps, seconds = default_steps(count, batch_size), DEFAULT_SECONDS
        patience = PATIENCE
    judges = validation_rows(steps, batch_size)
    with _one_thread(), warnings.catch_warnings():
        # that a flow overfits in the end, the step that is kept and the verdict say
        warnings.filterwarnings("ignore", message="the validation objective per datum has fallen")
        return fit(
            model,
            data=seen,
            val_data=tuple(part[:judges] for part in chosen),
            max_steps=steps,
            max_seconds=seconds,
            patience=patience,
            batch_size=batch_size,
            lr=options.lr,
            scheduler="cosine",
            clip_norm=CLIP_NORM,
            optimizer=partial(_optimizer, model, weight_decay(count)),
            seed=options.seed,
            progress=progress,
        )


def is_gain(differences: Tensor) -> bool:
    """Whether the mean of paired differences exceeds two standard errors; False where any is not finite.

    Of few rows the quantile of Student's t that belongs to two standard errors counts. Of twenty
    and more it is enough if that holds with the tenth that gains most cut down to what the next gains: a few rows that
    gain very much would hide the gain of all in the standard error.
    """
    from scipy import stats  # its import adds to the filters of warnings

    count = len(differences)
    if count < 2 or not bool(differences.isfinite().all()):
        return False
    needed = float(stats.t.ppf(stats.norm.cdf(2.0), count - 1)) / math.sqrt(count)
    judged = [differences]
    if count >= 20:
        most = differences.double().quantile(0.9, interpolation="lower")
        judged.append(differences.clamp(max=float(most)))
    return any(float(d.mean()) > needed * float(d.std()) for d in judged)
