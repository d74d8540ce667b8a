"""``fit``: one call from a model, a guide and data to trained parameters and an honest history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pyro.infer import ELBO

from pyro_flowkit.training.arguments import two_by_place
from pyro_flowkit.training.loop import Loop
from pyro_flowkit.training.options import Options
from pyro_flowkit.training.pacing import paced
from pyro_flowkit.training.plan import make_plan
from pyro_flowkit.training.progress import Bar
from pyro_flowkit.training.restarts import best_of
from pyro_flowkit.training.result import FitResult


@two_by_place
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
    itself, as soon as the gap between log evidence and ELBO is below ``tolerance`` by all that draws of the guide can
    say (a part of the posterior that they do not reach is not in it); the rate begins to fall, and the end comes
    nearer, when a constant one brings the gap no lower (:mod:`pyro_flowkit.training.tolerance`). Without a recipe the
    rate is constant until the objective stops improving (5 windows of 100 steps, or 5 validations), drops tenfold,
    twice, and the fit ends at the third such plateau, or after 20,000 steps. That of a ``ContinuousFlow``'s matching
    falls along a cosine, over 20,000 steps where there is no limit.

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
            there is one, or of the ``recipe()`` of a flow that is trained by matching: max_steps, lr, num_particles,
            scheduler, clip_norm, batch_size, average. An ``AutoSplineFlow`` that
            sees all of the data at every step starts at the best Gaussian found without noise, whose
            location and log scale at each site follow those before it in a line, times a Gaussian that is always the
            same; where it must, nearly all of
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
        batch_size: Rows per step; default all, of a ``ContinuousFlow``'s matching at most 256.
        val_data: Held-out rows: a tensor, a tuple of tensors, or a ``DataLoader``.
        val_fraction: Share of data to hold out instead. A plate of the size of all data then stands for the rest.
        optimizer: A callable ``params -> torch.optim.Optimizer``; ``lr`` is passed on if given. Default
            Adam. Parameters that first appear later join its first group.
        lr: Initial learning rate; default 3e-3, of a ``ContinuousFlow``'s matching 1e-2.
        scheduler: "cooldown" (constant, over the last 10 % to zero), "flat_cosine" (constant, from
            40 % on to zero), "cosine" (to zero), "constant", "step" (a tenth at 50 %, again at
            80 %), "plateau", or a callable ``optimizer -> LRScheduler``, advanced at every step.
            Default "cooldown" with a limit on steps, epochs or seconds, otherwise "plateau". The rates of a guide's
            recipe rise in a line over its first ``warmup_steps`` (30 of an ``AutoSplineFlow``), but for "plateau"
            and a callable.
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
            trackers, callbacks, progress, device, compile, check_plates, checkpoint_every and restarts (each start has
            a folder). A DataLoader is run
            through up to the batch where the fit had been.
        callbacks: ``Callback`` objects.
        progress: Show a bar, which also says what is done before the first step; False is silent.
        tolerance: Nats of KL that may be left to gain when the fit of an ``AutoSplineFlow`` stops by itself: the gap is
            estimated by importance sampling after every window of steps, and must be below it with two standard errors
            in several sets of draws. None is 0.01 where none of max_steps, max_epochs and average is given, and no such
            stop where one is. 0 goes on to the recipe's end.
        restarts: Number of starts of a guide that can begin anew; of an ``AutoSplineFlow`` its own, then draws of the
            prior. The best is kept, and the result's ``restarts`` have ELBO and log evidence of all: separate modes
            share the posterior's mass in proportion to these. max_seconds is shared among them; checkpoints have a
            folder each.

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

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow, fit
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> result = fit(SplineFlow(2), data=x, max_steps=5, seed=0, progress=False)
        >>> result.stop_reason, len(result.history["elbo"])
        ('max_steps', 5)
    """
    options = Options.of(dict(locals()))
    if options.restarts != 1:
        return best_of(options.restarts, fit, vars(options))
    with Bar() as bar:
        plan = make_plan(options.with_tensors(), bar)
        with paced(plan.loss.modules, plan.state.optimizer, by_recipe=plan.by_recipe):
            return Loop(plan).run()
