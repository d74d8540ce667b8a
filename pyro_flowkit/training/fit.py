"""``fit``: one call from a model, a guide and data to trained parameters and an honest history."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuide

from pyro_flowkit.flow import Flow
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training.arguments import (
    as_tensors,
    check_args,
    check_callbacks,
    check_finite_rows,
    check_optimizer,
    check_programs,
    check_rows_of_model,
    warn_of_far_rows,
    whole,
)
from pyro_flowkit.training.average import Average
from pyro_flowkit.training.callbacks import FitState
from pyro_flowkit.training.checkpoint import open_checkpoints
from pyro_flowkit.training.compilation import compile_where_it_pays
from pyro_flowkit.training.data import LoaderBatches, RowBatches, open_batches
from pyro_flowkit.training.device import chosen_device, move_modules, moved
from pyro_flowkit.training.identity import check_identity, fingerprint, identity
from pyro_flowkit.training.judge import Judge
from pyro_flowkit.training.loop import Limits, Loop
from pyro_flowkit.training.losses import MaximumLikelihood, Variational
from pyro_flowkit.training.names import separate_names
from pyro_flowkit.training.objective import chosen_loss, recipe_of
from pyro_flowkit.training.optimizer import add_group, build_optimizer, parameters_of
from pyro_flowkit.training.pacing import paced
from pyro_flowkit.training.progress import Bar
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.restarts import best_of
from pyro_flowkit.training.result import FitResult, versions
from pyro_flowkit.training.schedule import Schedule, kl_weight
from pyro_flowkit.training.tolerance import watch_gap
from pyro_flowkit.training.trackers import safely
from pyro_flowkit.training.validation import Validator

DEFAULT_LR = 3e-3
DEFAULT_CAP = 20_000
DEFAULT_PATIENCE = 5
WINDOW = 100
WINDOW_OF_RECIPE = 50
VALIDATION_ROWS = 100  # at a time, where training has no batch size of its own
GAUSSIAN_SECONDS = 30.0
SHARE_FOR_GAUSSIAN = (
    0.9  # of max_seconds, where the search needs so much: without it a flow gets no farther
)


@torch.enable_grad()
def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *,
    data: Any = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    objective: ELBO | Literal["likelihood"] | None = None,
    num_particles: int | None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    val_data: Any = None,
    val_fraction: float = 0.0,
    optimizer: Callable[..., Any] | None = None,
    lr: float | None = None,
    scheduler: str | Callable[[torch.optim.Optimizer], Any] | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    restore_best: bool = True,
    average: float | Literal["tail"] | None = None,
    non_finite: str = "skip",
    kl_schedule: Callable[[int], float] | tuple[float, float] | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    compile: bool = False,
    check_plates: bool = True,
    trackers: Sequence[Any] = (),
    checkpoint_dir: Any = None,
    checkpoint_every: float = 600,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    tolerance: float | None = None,
    restarts: int = 1,
) -> FitResult:
    """Trains a flow by maximum likelihood, or a Pyro model and guide by variational inference.

    ``fit(flow, data=x)`` with a module that has ``log_prob`` (a ``SplineFlow``) maximises the mean of
    ``flow.log_prob(x)``; a ``ContinuousFlow`` is trained by flow matching, unless
    ``objective="likelihood"``. ``fit(model, guide, ...)`` maximises the ELBO; a Pyro model without latents
    needs no guide. With data the objective is counted per datum: the estimate of the full-data
    ELBO divided by the number of data, so that learning rate and clipping do not depend on it.
    Without data (``args`` only) it is the plain ELBO.

    A minibatch stands for all rows only if the model says so:
    ``pyro.plate("data", len(data), subsample_size=len(batch))``. With all sites of model and guide in that plate, as
    in a VAE, ``pyro.plate("data", len(batch))`` does as well.

    With neither ``max_steps`` nor ``max_epochs`` the guide's ``recipe()`` decides if it has one. The fit then stops by
    itself, as soon as the gap between log evidence and ELBO is surely below ``tolerance``; the rate begins to fall, and
    the end comes nearer, when a constant one brings the gap no lower (:mod:`pyro_flowkit.training.tolerance`). Without
    a recipe the rate is constant until the objective stops improving (5 windows of 100 steps, or 5
    validations), drops tenfold, twice, and the fit ends at the third such plateau, or after 20,000
    steps.

    An objective that falls far below its best (by validation or, without it, by the medians of windows) is said
    in a RuntimeWarning and in the result's ``divergence``: by more than 1 nat and a multiple of all that it had
    fluctuated before, twice in a row or at the end.

    Under ``torchrun`` the same call is data-parallel: parameters are those of the first process, noise is independent,
    gradients are averaged. ``batch_size`` counts the rows of all processes together; without minibatches each sees all
    data, and adds its own particles. A DataLoader or a function gives each process its own batches. The first process
    alone writes files and shows the bar.

    Args:
        model: A flow with ``log_prob(*batch, *args)``, or a Pyro model.
        guide: Its guide. Options that are None are read from the fields of ``guide.recipe()`` where
            there is one: max_steps, lr, num_particles, scheduler, clip_norm. An ``AutoSplineFlow`` that
            sees all of the data at every step starts at the best Gaussian found without noise, whose
            location and log scale at each site follow those before it in a line; where it must, nearly all of
            max_seconds is used for that. It ends there, too, with best_step = 0, unless the flow is better. A guide
            that was trained before goes on from there, and does not end below it either.
        data: Tensor with ``N`` rows, or a tuple of such tensors, or numpy arrays or pandas' frames of numbers in their
            place. Its batches are the leading positional arguments of model and guide; of a dict of arrays its keys
            say which (they are the model's first parameters, the guide's have the same order). Rows are reshuffled
            every epoch as a function of (seed, epoch); a remainder of fewer than ``batch_size`` rows is left out of
            that epoch. Or a ``DataLoader`` of such batches, or a function from the step (from 0) to a batch.
        args: Further positional arguments.
        kwargs: Keyword arguments.
        objective: "likelihood" for that of a ``ContinuousFlow``; of a Pyro model an instance of ``pyro.infer.ELBO``,
            default ``Trace_ELBO(num_particles)``. Its particles run at once, whatever the style of the model: as a
            recording of its tensor operations, or in a plate, where that gives the log-densities of plain runs
            (:mod:`pyro_flowkit.programs.vectorized`).
        num_particles: Particles of the default objective; default 1. Where they cannot run at once they run one
            after the other, of a recipe's at most 8, with a warning that says why.
        max_steps: Number of optimizer steps.
        max_epochs: Number of passes over data.
        max_seconds: Wall-clock limit; the schedule ends with it. What a fit took before it was resumed counts.
        batch_size: Rows per step; default all.
        val_data: Held-out rows: a tensor, a tuple of tensors, or a ``DataLoader``.
        val_fraction: Share of data to hold out instead. A plate of the size of all data then stands for the rest.
        optimizer: A callable ``params -> torch.optim.Optimizer``; ``lr`` is passed on if given. Default
            Adam. Parameters that first appear later join its first group.
        lr: Initial learning rate; default 3e-3.
        scheduler: "cooldown" (constant, over the last 10 % to zero), "flat_cosine" (constant, from
            40 % on to zero), "cosine" (to zero), "constant", "step" (a tenth at 50 %, again at
            80 %), "plateau", or a callable ``optimizer -> LRScheduler``, advanced at every step.
            Default "cooldown" with a limit on steps, epochs or seconds, otherwise "plateau".
        clip_norm: Largest norm of the gradient; default no clipping.
        patience: Stop after so many judgements without improvement by 1e-4 nats. A judgement is a
            validation or, without validation data, the mean over a window of steps that must also
            exceed its standard error; there are about 20, at most 100 steps apart. None goes on to
            the limit, since a rate that falls late improves late, but stops as "diverged" after 5
            judgements in a row far below the best.
        restore_best: Return the state with the best validation objective, or without validation
            the last state whose window is not significantly worse than the best window.
        average: A number in (0, 1), the decay of an exponential moving average of the parameters,
            or "tail", their mean over the second half of the steps. Validations judge the average,
            and it is what the fit ends with (with validation and restore_best, the best of them).
        non_finite: "skip" leaves out steps with a non-finite loss or gradient and stops with the
            best state after 10 in a row; "raise" raises FloatingPointError at the first. Both name
            the parameter, site or row where the numbers stop being finite.
        kl_schedule: Weight of the log-probabilities of latent sites, log p(z) - log q(z), in the
            objective: a function from the step (from 0) to the weight, or ``(w, share)``, from w in
            a line to 1 over that share of the budget, then 1. Until it is 1 the recorded "elbo" is
            the weighted objective, and no state is taken for the best.
        seed: If given, ``pyro.set_rng_seed(seed)`` is called at the start; also orders the rows.
        device: Where to compute: a device, or "auto" for the GPU if there is one. Model, guide, data
            and the tensors among args and kwargs are moved there. None leaves all where they are.
        compile: Compile the ``log_prob`` of a flow with an exact likelihood, or for an AutoSplineFlow
            the model's density with its derivative, by ``torch.compile``, if a trial shows that it
            gains a tenth or more; that takes half a minute or so, less from its cache. The
            result's ``notes`` say what was done; without a C++ compiler fit goes on as it is.
        check_plates: Compare the plates with the data on the first batch.
        trackers: Where the history goes while the fit runs: ``CsvTracker``, ``TensorBoardTracker``,
            ``MLflowTracker``, ``WandbTracker``, or anything with their three methods.
        checkpoint_dir: A folder for checkpoints, of one fit at a time: of the state between two steps, the two
            newest. They hold plain tensors, are written whole or not at all, and are
            written at the end and at an interruption, too.
        checkpoint_every: Seconds between checkpoints.
        resume: Go on from the newest readable checkpoint in checkpoint_dir, if there is one. The
            result is that of an uninterrupted fit, bit for bit, unless it depends on the time
            (max_seconds). Call with the same arguments and a model and guide built in the same way: other data, args,
            settings, structure or library versions, or a model whose objective is another one at the checkpoint, are
            an error that says what differs. Free are max_steps, max_epochs, max_seconds, patience, tolerance,
            trackers, callbacks, progress, device, compile, check_plates and checkpoint_every. A DataLoader is run
            through up to the batch where the fit had been.
        callbacks: ``Callback`` objects.
        progress: Show a bar; False is silent.
        tolerance: Nats of KL that may be left to gain when the fit of an ``AutoSplineFlow`` stops by itself: the gap is
            estimated by importance sampling after every window of steps. None is 0.01 where none of
            max_steps, max_epochs and average is given, and no such stop where one is. 0 goes on to the recipe's end.
        restarts: Number of starts of an ``AutoSplineFlow``: its own, then draws of the prior. The best is kept, and the
            result's ``restarts`` have ELBO and log evidence of all: separate modes share the posterior's mass in
            proportion to these. max_seconds is shared among them; checkpoints have a folder each.

    Returns:
        A ``FitResult``. Modules are in eval mode afterwards. Ctrl-C returns what there is, with
        ``stop_reason="interrupted"``, once a step is done (at once if pressed again, later than a double press).

    Raises:
        TypeError: If model, guide, data, args, objective, optimizer, callbacks or the scheduler's result are of the
            wrong kind, or a count is no integer.
        ValueError: If numbers are out of range, plates do not match the data, guide and model differ in their latent
            sites, no parameter is trainable, ``TraceMeanField_ELBO`` meets an ``AutoContinuous``, or a
            checkpoint does not fit the call or is damaged.
        FloatingPointError: With ``non_finite="raise"``.
        LostRankError: If another process of a distributed fit has ended.
    """
    check_programs(model, guide)
    check_args(args)
    check_callbacks(callbacks)
    check_optimizer(optimizer)
    max_steps, batch_size = whole("max_steps", max_steps), whole("batch_size", batch_size)
    max_epochs, patience = whole("max_epochs", max_epochs), whole("patience", patience)
    num_particles = whole("num_particles", num_particles)
    if whole("restarts", restarts) != 1:
        return best_of(restarts, fit, dict(locals()))
    data = as_tensors(data, model)
    val_data = as_tensors(val_data, model, "val_data")
    numbers = {
        "max_steps": max_steps,
        "max_epochs": max_epochs,
        "max_seconds": max_seconds,
        "lr": lr,
        "clip_norm": clip_norm,
        "patience": patience,
    }
    _check_tolerance(tolerance)
    _check_options(numbers, checkpoint_every, non_finite)
    place = chosen_device(device)
    ranks = Ranks.join(place)
    checkpoints, earlier = open_checkpoints(checkpoint_dir, checkpoint_every, resume, ranks)
    if seed is not None:
        pyro.set_rng_seed(seed)
    drawn = float(torch.randint(2**31, ())) if seed is None else seed
    row_seed = int(ranks.largest(drawn)[0]) if earlier is None else earlier["row_seed"]
    move_modules(place, model, guide)
    separate_names(model, guide)
    args = tuple(moved(tuple(args), place))
    keywords: dict[str, Any] = moved(dict(kwargs or {}), place)
    recipe = recipe_of(guide)

    batches, held_out = open_batches(
        moved(data, place),
        moved(val_data, place),
        val_fraction,
        batch_size,
        row_seed,
        place,
        (ranks.number, ranks.count),
    )
    has_data = not isinstance(batches, RowBatches) or bool(batches.rows)
    first = batches[0]
    if guide is None and isinstance(model, Flow):
        for name, rows in (("data", getattr(batches, "rows", ())), ("val_data", held_out)):
            if isinstance(rows, tuple) and rows:
                check_finite_rows(rows, name)
        if isinstance(batches, LoaderBatches):
            check_finite_rows(first, "batch 0 of the DataLoader")
            batches.check = check_finite_rows
    if guide is None and first:
        warn_of_far_rows(model, first[0])

    # Limits: the caller's, then the recipe's, then a cap with stopping at plateaus.
    limits = Limits(max_steps, max_seconds, patience)
    if max_epochs is not None:
        if batches.steps_per_epoch is None:
            raise ValueError(
                f"expected data with a known number of batches for max_epochs={max_epochs}, got a source without len()"
            )
        by_epochs = max_epochs * batches.steps_per_epoch
        if max_steps is None or by_epochs < max_steps:
            limits.max_steps, limits.steps_reason = by_epochs, "max_epochs"
    scheduler = scheduler or getattr(recipe, "scheduler", None)
    if limits.max_steps is None:
        limits.max_steps = getattr(recipe, "max_steps", None)
    if limits.max_steps is None and max_seconds is None:
        limits.max_steps = DEFAULT_CAP
        scheduler = scheduler or "plateau"
        if patience is None and scheduler in ("plateau", "constant"):
            limits.patience, limits.patience_reason = DEFAULT_PATIENCE, "converged"
    scheduler = scheduler or "cooldown"
    if clip_norm is None:
        clip_norm = getattr(recipe, "clip_norm", None)

    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        getattr(guide, "setup", guide)(*first, *args, **keywords)
        move_modules(place, guide)
    loss = chosen_loss(
        model, guide, first, args, keywords, objective=objective, num_particles=num_particles
    )
    if isinstance(loss, MaximumLikelihood):
        if kl_schedule is not None:
            raise ValueError(f"expected no kl_schedule for maximum likelihood, got {kl_schedule!r}")
        if not has_data and not args:
            raise ValueError("expected data for maximum likelihood, got none")
    elif kl_schedule is not None and isinstance(objective, JitTrace_ELBO):
        raise ValueError(
            "expected an objective without jit for kl_schedule, got JitTrace_ELBO: a trace keeps the first weight"
        )
    loss.set_mode(training=True)
    sizes = None
    if batches.size is not None:
        taken_off = len(held_out[0]) if val_fraction else 0
        sizes = batches.size, batches.size + taken_off
    loss.prepare(first, sizes, check_plates)
    if isinstance(loss, Variational) and isinstance(batches, RowBatches) and batches.rows:
        check_rows_of_model(loss, batches.rows, batches.batch_size)
    if kl_schedule is not None and isinstance(loss, Variational) and loss.enumerated:
        raise ValueError(
            f"expected no kl_schedule with enumerated sites, which have no weight of their own, got {loss.enumerated}"
        )
    begun = time.perf_counter()
    start, interrupted = None, False
    if isinstance(guide, AutoSplineFlow) and recipe.gaussian_start and not batches.minibatched:
        inputs = (*first, *args)
        if earlier is None:
            seconds = min(GAUSSIAN_SECONDS, SHARE_FOR_GAUSSIAN * (max_seconds or math.inf))
            try:
                start = guide.start_at_gaussian(model, inputs, keywords, max_seconds=seconds)
            except KeyboardInterrupt:
                interrupted = True
        elif earlier["start"] is not None:
            start = guide.start_at_gaussian(model, inputs, keywords, found=earlier["start"])
    if not loss.parameters():
        raise ValueError("expected at least one trainable parameter in model or guide, got none")
    if ranks.count > 1:
        ranks.broadcast(loss.tensors().values())
        # each process has searched for itself
        if isinstance(guide, AutoSplineFlow) and start is not None and earlier is None:
            start = guide.start_at_gaussian(model, inputs, keywords, found=guide.state_dict())
        if ranks.number > 0:
            noise = np.random.SeedSequence([row_seed, ranks.number]).generate_state(1)
            pyro.set_rng_seed(int(noise[0]))
    built = build_optimizer(
        optimizer, loss.parameters(), lr, getattr(recipe, "lr", None) or DEFAULT_LR
    )
    loss.fresh.clear()
    if isinstance(guide, AutoSplineFlow) and start and optimizer is None and lr is None:
        affine = [component.affine for component in guide.components]
        hierarchies = [c.hierarchy for c in guide.components if c.hierarchy is not None]
        add_group(built, parameters_of(affine), recipe.affine_lr)
        if hierarchies:
            add_group(built, parameters_of(hierarchies), recipe.hierarchy_lr)
    if limits.max_seconds is not None and earlier is None:
        taken = ranks.largest(time.perf_counter() - begun)[0]
        limits.max_seconds = max(limits.max_seconds - taken, 0.0)
    notes = (compile_where_it_pays(loss, first),) if compile else ()

    state = FitState(model=model, guide=guide, optimizer=built)
    state.stop = "interrupted" if interrupted else None
    is_elbo = isinstance(loss, Variational) and isinstance(
        loss.objective, Trace_ELBO | TraceGraph_ELBO
    )
    watch = None
    is_own_plan = max_steps is None and max_epochs is None and average is None
    window = _window(limits.max_steps, bool(held_out))
    if (
        isinstance(guide, AutoSplineFlow)
        and is_elbo
        and not batches.minibatched
        and not interrupted
    ):
        room = guide.room(model, (*first, *args), keywords) if start is None else start.room
        watch = watch_gap(
            room, ranks, tolerance, limits.max_steps if is_own_plan else None, scheduler
        )
    chunk = batches.batch_size if isinstance(batches, RowBatches) else VALIDATION_ROWS
    call = fingerprint(batches, ranks)
    bound: dict[str, Any] = {}
    if checkpoints is not None:
        bound = {**call, "seed": row_seed if seed is None else seed} | identity(
            batches,
            held_out,
            args,
            keywords,
            (model, guide),
            {
                "optimizer": type(built).__name__,
                "lr": [group["lr"] for group in built.param_groups],
                "scheduler": scheduler,
                "clip_norm": clip_norm,
                "average": average,
                "kl_schedule": kl_schedule,
                "objective": type(getattr(loss, "objective", loss)).__name__,
                "num_particles": getattr(getattr(loss, "objective", None), "num_particles", None),
                "non_finite": non_finite,
                "restore_best": restore_best,
            },
        )
    loop = Loop(
        loss,
        batches,
        built,
        Schedule(built, scheduler),
        limits,
        ranks=ranks,
        judge=Judge(
            loss,
            Validator(held_out, chunk, place) if held_out else None,
            window if watch is None or not is_own_plan else min(window, WINDOW_OF_RECIPE),
            None if average is None else Average(average),
            ranks,
        ),
        kl_weight=None if kl_schedule is None else kl_weight(kl_schedule),
        clip_norm=clip_norm,
        restore_best=restore_best,
        non_finite=non_finite,
        callbacks=tuple(callbacks),
        trackers=safely(trackers if ranks.leads else ()),
        checkpoints=checkpoints,
        extra={
            "row_seed": row_seed,
            "call": bound,
            "start": None if start is None else start.tensors,
            "max_seconds": [max_seconds, limits.max_seconds],
            "versions": versions(),
        },
        keep_better=start.keep_better if start is not None and is_elbo else None,
        tolerance=watch,
        notes=notes,
        state=state,
        bar=Bar(progress and ranks.leads, limits.max_steps, has_data),
    )
    if earlier is not None:
        check_identity(earlier["call"], bound, (earlier["versions"], versions()))
        given, left = earlier["max_seconds"]
        if max_seconds == given:
            limits.max_seconds = left
        loop.load(earlier)
    settings = {**call, **{k: v for k, v in numbers.items() if v}}
    by_recipe = recipe is not None and optimizer is None and lr is None
    with paced(guide, built, by_recipe=by_recipe):
        return loop.run(settings)


def _window(max_steps: int | None, validated: bool) -> int:
    """Steps per judgement: a twentieth of the fit, at most 100; noisy means need at least ten."""
    if max_steps is None:
        return WINDOW
    return max(1 if validated else 10, min(WINDOW, max_steps // 20))


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"expected tolerance >= 0 nats, got {tolerance}")


def _check_options(
    numbers: Mapping[str, float | None], checkpoint_every: float, non_finite: str
) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} > 0, got {value}")
    if not checkpoint_every >= 0:
        raise ValueError(f"expected checkpoint_every >= 0 seconds, got {checkpoint_every}")
    if non_finite not in ("skip", "raise"):
        raise ValueError(f"expected non_finite to be 'skip' or 'raise', got {non_finite!r}")
