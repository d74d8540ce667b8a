"""`fit`: one call from a model, a guide and data to trained parameters and an honest history."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoGuide

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training.callbacks import FitState
from pyro_flowkit.training.data import Batches, as_rows, split_rows
from pyro_flowkit.training.loop import Limits, Loop
from pyro_flowkit.training.losses import MaximumLikelihood, Variational
from pyro_flowkit.training.plates import vectorized_nesting
from pyro_flowkit.training.progress import Bar
from pyro_flowkit.training.result import FitResult
from pyro_flowkit.training.schedule import Schedule
from pyro_flowkit.training.validation import Validator

OptimizerFactory = Callable[..., Any]  # params, lr=... -> torch.optim.Optimizer
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

DEFAULT_LR = 3e-3
DEFAULT_CAP = 20_000
DEFAULT_PATIENCE = 5
WINDOW = 100
GAUSSIAN_SECONDS = 30.0
MAX_SEQUENTIAL = 8


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *,
    data: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    objective: ELBO | None = None,
    num_particles: int | None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    val_data: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    val_fraction: float = 0.0,
    optimizer: OptimizerFactory | None = None,
    lr: float | None = None,
    scheduler: str | SchedulerFactory | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    restore_best: bool = True,
    non_finite: str = "skip",
    seed: int | None = None,
    check_plates: bool = True,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
) -> FitResult:
    """Trains a flow by maximum likelihood, or a Pyro model and guide by variational inference.

    `fit(flow, data=x)` with a module that has `log_prob` (a `SplineFlow`) maximises the mean of
    `flow.log_prob(x)`. `fit(model, guide, ...)` maximises the ELBO; a Pyro model without latents
    needs no guide. With data the objective is counted per datum: the estimate of the full-data
    ELBO divided by the number of data, so that learning rate and clipping do not depend on it.
    Without data (`args` only) it is the plain ELBO.

    A minibatch stands for all rows only if the model says so:
    `pyro.plate("data", len(data), subsample_size=len(batch))`.

    With neither `max_steps` nor `max_epochs` the guide's `recipe()` decides if it has one. Without
    a recipe the rate is constant until the objective stops improving (5 windows of 100 steps, or 5
    validations), drops tenfold, twice, and the fit ends at the third such plateau, or after 20,000
    steps.

    Args:
        model: A flow with `log_prob(*batch, *args)`, or a Pyro model.
        guide: Its guide. Options that are None are read from the fields of `guide.recipe()` where
            there is one: max_steps, lr, num_particles, scheduler, clip_norm. An `AutoSplineFlow` that
            sees all of the data at every step starts at the best Gaussian found without noise, whose
            location and log scale at each site follow those before it in a line; up to a quarter of
            max_seconds is used for that. It ends there, too, with best_step = 0, if the flow gains
            less than 0.02 nats on it.
        data: Tensor with `N` rows, or a tuple of such tensors. Its batches are the leading
            positional arguments of model and guide. Rows are reshuffled every epoch as a function
            of (seed, epoch); a remainder of fewer than `batch_size` rows is left out of that epoch.
        args: Further positional arguments.
        kwargs: Keyword arguments.
        objective: An instance of `pyro.infer.ELBO`; default `Trace_ELBO(num_particles)`, vectorised
            where a check on two particles shows that this leaves the ELBO unchanged.
        num_particles: Particles of the default objective; default 1. Of a recipe's at most 8 are run, with a
            warning, where the model cannot be vectorised over them.
        max_steps: Number of optimizer steps.
        max_epochs: Number of passes over data.
        max_seconds: Wall-clock limit; the schedule ends with it.
        batch_size: Rows per step; default all.
        val_data: Held-out rows, in the form of data.
        val_fraction: Share of data to hold out instead; the plate's size is then that of the rest.
        optimizer: A callable `params -> torch.optim.Optimizer`; `lr` is passed on if given. Default
            Adam. Parameters that first appear later join its first group.
        lr: Initial learning rate; default 3e-3.
        scheduler: "cosine" (to zero), "flat_cosine" (constant, from 40 % on to zero), "constant",
            "step" (a tenth at 50 %, again at 80 %), "plateau", or a callable
            `optimizer -> LRScheduler`, advanced at every step. Default "cosine" with a limit on
            steps, epochs or seconds, otherwise "plateau".
        clip_norm: Largest norm of the gradient; default no clipping.
        patience: Stop after so many judgements without improvement by 1e-4 nats. A judgement is a
            validation or, without validation data, the mean over a window of steps that must also
            exceed its standard error; there are about 20, at most 100 steps apart.
        restore_best: Return the state with the best validation objective, or without validation
            the last state whose window is not significantly worse than the best window.
        non_finite: "skip" leaves out steps with a non-finite loss or gradient and stops with the
            best state after 10 in a row; "raise" raises FloatingPointError at the first.
        seed: If given, `pyro.set_rng_seed(seed)` is called at the start; also orders the rows.
        check_plates: Compare the plates with the data on the first batch.
        callbacks: `Callback` objects.
        progress: Show a bar; False is silent.

    Returns:
        A `FitResult`. Modules are in eval mode afterwards. Ctrl-C returns what there is, with
        `stop_reason="interrupted"`.

    Raises:
        TypeError: If data, objective or the scheduler's result is of the wrong kind.
        ValueError: If numbers are out of range, plates do not match the data, a latent site has no
            guide, no parameter is trainable, or `TraceMeanField_ELBO` meets an `AutoContinuous`.
        FloatingPointError: With `non_finite="raise"`.
    """
    _check_options(max_steps, max_epochs, max_seconds, lr, clip_norm, patience, non_finite)
    if seed is not None:
        pyro.set_rng_seed(seed)
    row_seed = int(torch.randint(2**31, ())) if seed is None else seed
    kwargs = dict(kwargs or {})
    args = tuple(args)
    read_recipe = getattr(guide, "recipe", None)
    recipe: Any = read_recipe() if callable(read_recipe) else None

    rows = () if data is None else as_rows(data)
    held_out = () if val_data is None else as_rows(val_data, "val_data")
    if (held_out or val_fraction) and not rows:
        raise ValueError("expected data for val_data or val_fraction, got data=None")
    if held_out and val_fraction:
        raise ValueError("expected either val_data or val_fraction, got both")
    if held_out and len(held_out) != len(rows):
        raise ValueError(f"expected val_data of {len(rows)} tensors like data, got {len(held_out)}")
    if val_fraction:
        rows, held_out = split_rows(rows, val_fraction, row_seed)
    batches = Batches(rows, batch_size, row_seed)
    first = batches[0]

    # Limits: the caller's, then the recipe's, then a cap with stopping at plateaus.
    limits = Limits(max_steps, max_seconds, patience)
    if max_epochs is not None:
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
    scheduler = scheduler or "cosine"
    if clip_norm is None:
        clip_norm = getattr(recipe, "clip_norm", None)

    loss: MaximumLikelihood | Variational
    if guide is None and isinstance(model, torch.nn.Module) and hasattr(model, "log_prob"):
        if objective is not None or num_particles is not None:
            raise ValueError(
                "expected no objective and no num_particles for maximum likelihood, "
                f"got {objective!r} and {num_particles!r}"
            )
        if not rows and not args:
            raise ValueError("expected data for maximum likelihood, got none")
        loss = MaximumLikelihood(model, args, kwargs)
    else:
        program = _no_guide if guide is None else guide
        if isinstance(program, AutoGuide) and program.prototype_trace is None:
            getattr(program, "setup", program)(*first, *args, **kwargs)
        loss = Variational(model, program, args, kwargs, guide is not None)
        wished = None if objective is not None else getattr(recipe, "num_particles", None)
        loss.objective = _objective(
            objective, num_particles, wished, model, program, (*first, *args), kwargs
        )
    for module in loss.modules:
        module.train()
    loss.prepare(first, batches.size, check_plates)
    begun = time.perf_counter()
    start = None
    if isinstance(guide, AutoSplineFlow) and recipe.gaussian_start and not batches.minibatched:
        quarter = GAUSSIAN_SECONDS if max_seconds is None else max_seconds / 4
        start = guide.start_at_gaussian(
            model, (*first, *args), kwargs, max_seconds=min(GAUSSIAN_SECONDS, quarter)
        )
    params = loss.parameters()
    if not params:
        raise ValueError("expected at least one trainable parameter in model or guide, got none")
    built = _optimizer(optimizer, params, lr, getattr(recipe, "lr", None) or DEFAULT_LR)
    if isinstance(guide, AutoSplineFlow) and start and optimizer is None and lr is None:
        _add_group(built, guide.affine.parameters(), recipe.affine_lr)
        if guide.hierarchy is not None:
            _add_group(built, guide.hierarchy.parameters(), recipe.hierarchy_lr)
    if limits.max_seconds is not None:
        limits.max_seconds = max(limits.max_seconds - (time.perf_counter() - begun), 0.0)

    loop = Loop(
        loss,
        batches,
        built,
        Schedule(built, scheduler),
        limits,
        validator=Validator(held_out, batches.batch_size) if held_out else None,
        window=_window(limits.max_steps, bool(held_out)),
        clip_norm=clip_norm,
        restore_best=restore_best,
        non_finite=non_finite,
        callbacks=tuple(callbacks),
        state=FitState(model=model, guide=guide, optimizer=built),
        bar=Bar(progress, limits.max_steps, bool(rows)),
    )
    result = loop.run()
    if start is not None and isinstance(loss, Variational):
        if isinstance(loss.objective, Trace_ELBO | TraceGraph_ELBO) and not start.keep_better():
            result.best_step = 0
    return result


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""


def _window(max_steps: int | None, validated: bool) -> int:
    """Steps per judgement: a twentieth of the fit, at most 100; noisy means need at least ten."""
    if max_steps is None:
        return WINDOW
    return max(1 if validated else 10, min(WINDOW, max_steps // 20))


def _objective(
    objective: ELBO | None,
    num_particles: int | None,
    wished_particles: int | None,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> ELBO:
    if objective is None:
        particles = num_particles or wished_particles or 1
        nesting = vectorized_nesting(model, guide, args, kwargs) if particles > 1 else None
        if nesting is None:
            if num_particles is None and particles > MAX_SEQUENTIAL:
                warnings.warn(
                    f"Expected a model that runs for many particles at a time, in a plate to the left of its own: this "
                    f"one does not, or not with the same ELBO. A step runs {MAX_SEQUENTIAL} particles one after the "
                    f"other, instead of {particles} at once, which takes longer and gives a noisier gradient.",
                    stacklevel=3,
                )
                particles = MAX_SEQUENTIAL
            return Trace_ELBO(num_particles=particles)
        return Trace_ELBO(particles, max_plate_nesting=nesting, vectorize_particles=True)
    if not isinstance(objective, ELBO):
        raise TypeError(
            f"expected objective to be an instance of pyro.infer.ELBO, got {objective!r}"
        )
    if num_particles is not None and num_particles != objective.num_particles:
        raise ValueError(
            f"expected num_particles of the objective, {objective.num_particles}, "
            f"got num_particles={num_particles}"
        )
    parts = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    for part in parts:
        if isinstance(objective, TraceMeanField_ELBO) and isinstance(part, AutoContinuous):
            raise ValueError(
                f"expected another objective than {type(objective).__name__} for "
                f"{type(part).__name__}, e.g. Trace_ELBO: an AutoContinuous guide writes its sites "
                "as Delta distributions with a log-density, and the analytic KL of a Delta drops "
                "that log-density, so the result would not be the ELBO"
            )
        if (
            getattr(part, "path_gradient", False)
            and not isinstance(objective, Trace_ELBO | TraceGraph_ELBO)
            and not getattr(objective, "own_gradient", False)
        ):
            warnings.warn(
                f"path_gradient of {type(part).__name__} has no effect under "
                f"{type(objective).__name__}: only Trace_ELBO, JitTrace_ELBO and TraceGraph_ELBO use "
                "it. The gradient is the ordinary one; path_gradient=False says so too.",
                stacklevel=3,
            )
    return objective


def _optimizer(
    optimizer: OptimizerFactory | None,
    params: list[torch.Tensor],
    lr: float | None,
    default_lr: float,
) -> torch.optim.Optimizer:
    if optimizer is None:
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
        return torch.optim.Adam(params, lr=default_lr if lr is None else lr, fused=fused)
    built = optimizer(params) if lr is None else optimizer(params, lr=lr)
    if not isinstance(built, torch.optim.Optimizer) or isinstance(built, torch.optim.LBFGS):
        raise TypeError(
            "expected optimizer(params) to return a torch.optim.Optimizer that needs no closure, "
            f"got {type(built).__name__}"
        )
    return built


def _add_group(optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor], lr: float) -> None:
    """Moves parameters into a group with a learning rate of its own."""
    chosen = {id(parameter): parameter for parameter in params}
    group = optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    optimizer.add_param_group({"params": list(chosen.values()), "lr": lr})


def _check_options(
    max_steps: int | None,
    max_epochs: int | None,
    max_seconds: float | None,
    lr: float | None,
    clip_norm: float | None,
    patience: int | None,
    non_finite: str,
) -> None:
    numbers = {
        "max_steps": max_steps,
        "max_epochs": max_epochs,
        "max_seconds": max_seconds,
        "lr": lr,
        "clip_norm": clip_norm,
        "patience": patience,
    }
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} > 0, got {value}")
    if non_finite not in ("skip", "raise"):
        raise ValueError(f"expected non_finite to be 'skip' or 'raise', got {non_finite!r}")
