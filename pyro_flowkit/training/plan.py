"""A call of ``fit`` resolved: data, objective, start, optimizer, limits and judges, as one frozen plan for the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

from pyro_flowkit.guides.protocols import StartingGuide
from pyro_flowkit.recipe import Recipe
from pyro_flowkit.training.average import Average
from pyro_flowkit.training.beginning import Beginning, begin
from pyro_flowkit.training.callbacks import FitState
from pyro_flowkit.training.checkpoint import Checkpoints
from pyro_flowkit.training.compilation import compile_where_it_pays
from pyro_flowkit.training.data import Batches, RowBatches
from pyro_flowkit.training.ground import Check, Ground, lay_ground, open_objective
from pyro_flowkit.training.identity import check_identity, fingerprint, identity
from pyro_flowkit.training.judge import Judge
from pyro_flowkit.training.limits import Limits, chosen_limits
from pyro_flowkit.training.losses import MaximumLikelihood
from pyro_flowkit.training.optimizer import DEFAULT_LR, add_group, build_optimizer
from pyro_flowkit.training.options import Options
from pyro_flowkit.training.progress import Bar
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.result import versions
from pyro_flowkit.training.schedule import Schedule, kl_weight
from pyro_flowkit.training.tolerance import Tolerance, watch_gap
from pyro_flowkit.training.trackers import safely
from pyro_flowkit.training.validation import Validator
from pyro_flowkit.training.variational import Variational

WINDOW = 100
WINDOW_OF_RECIPE = 50
VALIDATION_ROWS = 100  # at a time, where training has no batch size of its own


@dataclass(frozen=True)
class Plan:
    """What the loop is to do.

    Attributes:
        options: The call.
        state: What callbacks see, before the first step.
        loss: What is trained.
        batches: What it is trained on.
        schedule: Of the optimizer's rates.
        by_recipe: Whether these are those of a recipe.
        limits: When to stop.
        judge: Of states.
        ranks: The processes that share the fit.
        clip_norm: Largest norm of the gradient, or None.
        clip_ratio: The same in units of the median norm of late, or None.
        kl_weight: From step and share of the budget to the weight of the KL terms, or None.
        keep_better: Goes back to the guide's start unless the guide is better; or None.
        tolerance: Watches the gap; or None.
        trackers: Of the history; they never fail.
        checkpoints: Where to write, or None.
        earlier: The content of the checkpoint to go on from, or None.
        extra: What a checkpoint holds besides the state of the loop.
        notes: What was done to the call.
        bar: Shows the progress.
        has_data: Whether the objective is per datum.
        settings: What to tell the trackers of the call.
    """

    options: Options
    state: FitState
    loss: MaximumLikelihood | Variational
    batches: Batches
    schedule: Schedule
    by_recipe: bool
    limits: Limits
    judge: Judge
    ranks: Ranks
    clip_norm: float | None
    clip_ratio: float | None
    kl_weight: Callable[[int, float], float] | None
    keep_better: Callable[[], bool] | None
    tolerance: Tolerance | None
    trackers: Any  # as `safely` makes them
    checkpoints: Checkpoints | None
    earlier: Mapping[str, Any] | None
    extra: dict[str, Any]
    notes: tuple[str, ...]
    bar: Bar
    has_data: bool
    settings: dict[str, Any]


def make_plan(options: Options, bar: Bar) -> Plan:
    """The plan of a call.

    Args:
        options: The call.
        bar: Is opened where the call wants one, and says what takes its time.

    Raises:
        TypeError, ValueError: As :func:`pyro_flowkit.fit` says.
    """
    options, ground = lay_ground(options)
    ranks, batches, recipe = ground.ranks, ground.batches, ground.recipe
    limits, scheduler = chosen_limits(options, recipe, batches)
    if options.progress and ranks.leads:
        bar.open()
    bar.say("running model and guide")
    loss, check = open_objective(options, ground)
    begun, earlier = time.perf_counter(), ground.earlier
    sees_all = isinstance(options.guide, StartingGuide) and not batches.minibatched
    guide: Any = options.guide if sees_all else None
    if guide is not None:
        bar.say("looking for a start")
    beginning = begin(
        loss,
        guide,
        ground.inputs,
        ground.kwargs,
        max_seconds=options.max_seconds,
        earlier=earlier,
        ranks=ranks,
        seed=ground.seed,
    )
    by_recipe = recipe.lr is not None and options.optimizer is None and options.lr is None
    optimizer = _optimizer(options, recipe, loss, guide if beginning.start and by_recipe else None)
    schedule = Schedule(optimizer, scheduler, recipe.warmup_steps if by_recipe else 0)
    if limits.max_seconds is not None and earlier is None:
        taken = ranks.largest(time.perf_counter() - begun)[0]
        limits.max_seconds = max(limits.max_seconds - taken, 0.0)
    elif earlier is not None and options.max_seconds == earlier["max_seconds"][0]:
        limits.max_seconds = earlier["max_seconds"][1]
    notes: tuple[str, ...] = ()
    if options.compile:
        bar.say("compiling")
        notes = (compile_where_it_pays(loss, ground.first),)
    state = FitState(model=options.model, guide=options.guide, optimizer=optimizer)
    state.stop = "interrupted" if beginning.is_interrupted else None
    watch = _watch(options, ground, loss, guide, beginning, limits.max_steps, scheduler)
    clip_norm = recipe.clip_norm if options.clip_norm is None else options.clip_norm
    start, call = beginning.start, fingerprint(batches, ranks)
    bound = (
        {}
        if ground.checkpoints is None
        else _identity(options, ground, loss, optimizer, scheduler, clip_norm)
    )
    if earlier is not None:
        check_identity(earlier["call"], bound, (earlier["versions"], versions()))
    return Plan(
        options=options,
        state=state,
        loss=loss,
        batches=batches,
        schedule=schedule,
        by_recipe=by_recipe,
        limits=limits,
        judge=_judge(options, ground, loss, check, limits.max_steps, watch is not None),
        ranks=ranks,
        clip_norm=clip_norm,
        clip_ratio=recipe.clip_ratio if clip_norm is None else None,
        kl_weight=None if options.kl_schedule is None else kl_weight(options.kl_schedule),
        keep_better=start.keep_better if start is not None and _is_elbo(loss) else None,
        tolerance=watch,
        trackers=safely(options.trackers if ranks.leads else ()),
        checkpoints=ground.checkpoints,
        earlier=earlier,
        extra={
            "row_seed": ground.seed,
            "call": bound,
            "start": None if start is None else start.tensors,
            "max_seconds": [options.max_seconds, limits.max_seconds],
            "versions": versions(),
        },
        notes=notes,
        bar=bar,
        has_data=ground.has_data,
        settings={**call, **options.given_numbers()},
    )


def _optimizer(
    options: Options,
    recipe: Recipe,
    loss: MaximumLikelihood | Variational,
    started: StartingGuide | None,
) -> torch.optim.Optimizer:
    """The optimizer; a guide that has found its start, and whose recipe decides, has rates for its parts."""
    built = build_optimizer(
        options.optimizer, loss.parameters(), options.lr, recipe.lr or DEFAULT_LR
    )
    loss.fresh.clear()
    for parameters, rate in () if started is None else started.parameter_groups():
        add_group(built, parameters, rate)
    return built


def _watch(
    options: Options,
    ground: Ground,
    loss: MaximumLikelihood | Variational,
    guide: StartingGuide | None,
    beginning: Beginning,
    max_steps: int | None,
    scheduler: Any,
) -> Tolerance | None:
    """What watches the gap of a guide that sees all of the data, where there is a way to."""
    if guide is None or not _is_elbo(loss) or beginning.is_interrupted:
        return None
    if beginning.start is None:
        room = guide.room(loss.model, ground.inputs, ground.kwargs)
    else:
        room = beginning.start.room
    planned = max_steps if _is_own_plan(options) else None
    return watch_gap(room, ground.ranks, options.tolerance, planned, scheduler)


def _judge(
    options: Options,
    ground: Ground,
    loss: MaximumLikelihood | Variational,
    check: Check,
    max_steps: int | None,
    is_watched: bool,
) -> Judge:
    """Judges states by what is held out, or by windows of steps."""
    batches, held_out = ground.batches, ground.held_out
    rows = batches.batch_size if isinstance(batches, RowBatches) else VALIDATION_ROWS
    validator = Validator(held_out, rows, ground.place, check) if held_out else None
    window = WINDOW
    if max_steps is not None:  # a twentieth of the fit; noisy means need at least ten steps
        window = max(1 if held_out else 10, min(WINDOW, max_steps // 20))
    if is_watched and _is_own_plan(options):
        window = min(window, WINDOW_OF_RECIPE)
    kind = _average(options, ground.recipe)
    average = None if kind is None else Average(kind)
    return Judge(loss, validator, window, average, ground.ranks)


def _identity(
    options: Options,
    ground: Ground,
    loss: MaximumLikelihood | Variational,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    clip_norm: float | None,
) -> dict[str, Any]:
    """What a checkpoint of this call is bound to."""
    batches, objective = ground.batches, getattr(loss, "objective", loss)
    seed = ground.seed if options.seed is None else options.seed
    settings = {
        "optimizer": type(optimizer).__name__,
        "lr": [group["lr"] for group in optimizer.param_groups],
        "scheduler": scheduler,
        "clip_norm": clip_norm,
        "average": _average(options, ground.recipe),
        "kl_schedule": options.kl_schedule,
        "objective": type(objective).__name__,
        "num_particles": getattr(objective, "num_particles", None),
        "non_finite": options.non_finite,
        "restore_best": options.restore_best,
    }
    programs = (options.model, options.guide)
    return {**fingerprint(batches, ground.ranks), "seed": seed} | identity(
        batches, ground.held_out, options.args, ground.kwargs, programs, settings
    )


def _average(options: Options, recipe: Recipe) -> float | Literal["tail"] | None:
    return recipe.average if options.average is None else options.average


def _is_elbo(loss: MaximumLikelihood | Variational) -> bool:
    return isinstance(loss, Variational) and isinstance(
        loss.objective, Trace_ELBO | TraceGraph_ELBO
    )


def _is_own_plan(options: Options) -> bool:
    """Whether neither the number of steps nor an average is the caller's."""
    return options.max_steps is None and options.max_epochs is None and options.average is None
