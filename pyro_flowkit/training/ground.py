"""What a fit stands on: device, processes, checkpoint, batches, and the objective that the model has for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import JitTrace_ELBO

from pyro_flowkit.flow import Flow
from pyro_flowkit.programs.pairs import set_up
from pyro_flowkit.programs.plates import TrainingRows
from pyro_flowkit.recipe import Recipe, recipe_of
from pyro_flowkit.training.arguments import warn_of_far_rows
from pyro_flowkit.training.checkpoint import Checkpoints, open_checkpoints
from pyro_flowkit.training.data import Batches, RowBatches, open_batches
from pyro_flowkit.training.device import chosen_device, move_modules, moved
from pyro_flowkit.training.finite_rows import (
    check_finite_rows,
    check_rows,
    check_rows_of_program,
    naming_rows,
)
from pyro_flowkit.training.losses import Batch, MaximumLikelihood
from pyro_flowkit.training.names import separate_names
from pyro_flowkit.training.objective import chosen_loss
from pyro_flowkit.training.options import Options
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.variational import Variational

Check = Callable[[Batch, str], None]


@dataclass(frozen=True)
class Ground:
    """What a fit stands on, before there is an objective.

    Attributes:
        place: The device, or None where everything stays where it is.
        ranks: The processes that share the fit.
        checkpoints: Where to write, or None.
        earlier: The content of the checkpoint to go on from, or None.
        seed: Of the order of the rows, and of the other processes' noise.
        batches: What to train on.
        first: The first batch.
        held_out: What to judge by: rows, a DataLoader, or nothing.
        recipe: What the guide, or a flow by matching, says of its training.
        inputs, kwargs: What model and guide are called with at first.
    """

    place: torch.device | None
    ranks: Ranks
    checkpoints: Checkpoints | None
    earlier: dict[str, Any] | None
    seed: int
    batches: Batches
    first: Batch
    held_out: Any
    recipe: Recipe
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def has_data(self) -> bool:
        """Whether there are batches at all."""
        return not isinstance(self.batches, RowBatches) or bool(self.batches.rows)


def lay_ground(options: Options) -> tuple[Options, Ground]:
    """The ground of a call, and the call with its arguments on the device.

    Raises:
        ValueError: As ``fit`` says of device, checkpoints and data.
    """
    place = chosen_device(options.device)
    ranks = Ranks.join(place)
    checkpoints, earlier = open_checkpoints(
        options.checkpoint_dir, options.checkpoint_every, options.resume, ranks
    )
    if options.seed is not None:
        pyro.set_rng_seed(options.seed)
    drawn = float(torch.randint(2**31, ())) if options.seed is None else options.seed
    seed = int(ranks.largest(drawn)[0]) if earlier is None else earlier["row_seed"]
    move_modules(place, options.model, options.guide)
    separate_names(options.model, options.guide)
    args = tuple(moved(tuple(options.args), place))
    kwargs: dict[str, Any] = moved(dict(options.kwargs or {}), place)
    recipe = recipe_of(options.model, options.guide, options.objective)
    batches, held_out = open_batches(
        moved(options.data, place),
        moved(options.val_data, place),
        options.val_fraction,
        options.batch_size,
        seed,
        place,
        (ranks.number, ranks.count),
        wish=recipe.batch_size,
    )
    first = batches[0]
    ground = Ground(
        place,
        ranks,
        checkpoints,
        earlier,
        seed,
        batches,
        first,
        held_out,
        recipe,
        (*first, *args),
        kwargs,
    )
    return replace(options, args=args), ground


def open_objective(
    options: Options, ground: Ground
) -> tuple[MaximumLikelihood | Variational, Check]:
    """The objective, after a first run of model and guide, and what checks rows for it.

    Raises:
        TypeError, ValueError: As ``fit`` says of model, guide, objective, plates and rows.
    """
    model, guide, batches, first = options.model, options.guide, ground.batches, ground.first
    check: Check | None = check_finite_rows if guide is None and isinstance(model, Flow) else None
    if check is not None:
        check_rows(check, batches, first, ground.held_out)
    if guide is None and first:
        warn_of_far_rows(model, first[0])
    with naming_rows(batches, first):
        if set_up(guide, ground.inputs, ground.kwargs):
            move_modules(ground.place, guide)
        sizes, rows = None, None
        if batches.size is not None:
            taken_off = len(ground.held_out[0]) if options.val_fraction else 0
            sizes = batches.size, batches.size + taken_off
            rows = TrainingRows(*sizes) if options.val_fraction else None
        loss = chosen_loss(
            model,
            guide,
            first,
            tuple(options.args),
            ground.kwargs,
            objective=options.objective,
            num_particles=options.num_particles,
            rows=rows,
        )
        _check_objective(options, loss, ground.has_data)
        loss.set_mode(training=True)
        loss.prepare(first, sizes, options.check_plates)
    if check is None:
        size = batches.batch_size if isinstance(batches, RowBatches) else None
        check = partial(check_rows_of_program, loss, size=size)
        check_rows(check, batches, first, ground.held_out)
    if options.kl_schedule is not None and isinstance(loss, Variational) and loss.enumerated:
        raise ValueError(
            f"Expected no kl_schedule with enumerated sites, which have no weight of their own, got {loss.enumerated}"
        )
    return loss, check


def _check_objective(
    options: Options, loss: MaximumLikelihood | Variational, has_data: bool
) -> None:
    if isinstance(loss, MaximumLikelihood):
        if options.kl_schedule is not None:
            raise ValueError(
                f"Expected no kl_schedule for maximum likelihood, got {options.kl_schedule!r}"
            )
        if not has_data and not options.args:
            raise ValueError("Expected data for maximum likelihood, got none")
    elif options.kl_schedule is not None and isinstance(options.objective, JitTrace_ELBO):
        raise ValueError(
            "Expected an objective without jit for kl_schedule, got JitTrace_ELBO: a trace keeps the first weight"
        )
