"""The six models of the comparison, each trained and scored by one call that another process can make."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import pyro
import torch
import xarray as xr

from models import density, vae
from models._prepare import FAST_ROWS, dequantized, load
from models.data import Dataset
from pyro_flowkit import SplineFlow
from pyro_flowkit.diagnostics import heldout_log_prob, pointwise_bounds
from pyro_flowkit.training import FitResult, fit

GAUSSIAN, SPLINE_FLOW = "Gaussian", "spline flow"
NUM_SAMPLES = 1000
NUM_DRAWN = 20


@dataclass(frozen=True)
class Job:
    """One model to train: the density of this name, or a VAE with this prior and posterior."""

    name: str
    prior: str = ""
    posterior: str = ""

    @property
    def group(self) -> str:
        """Name of the model's group in a netCDF file."""
        return "".join(c if c.isalnum() else "_" for c in self.name.replace(", ", "_")).lower()


@dataclass(frozen=True)
class Settings:
    """What all jobs share. ``fast`` is a rehearsal on few rows with few steps and draws."""

    seed: int = 0
    fast: bool = False


@dataclass(frozen=True)
class Outcome:
    """A trained model's numbers.

    Attributes:
        job: the model.
        scores: of the test rows, from `heldout_log_prob` or `pointwise_bounds`.
        samples: draws, shape ``(n, D)``.
        seconds: wall-clock time of the training.
        history: objective and learning rate per step, empty for a closed form.
        validation: objective on the validation rows, likewise.
    """

    job: Job
    scores: xr.Dataset
    samples: np.ndarray
    seconds: float
    history: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]


def vae_name(prior: str, posterior: str) -> str:
    """How a VAE is called in table, figure and text."""
    return f"VAE, {prior} prior, {posterior} posterior"


VAES = [Job(vae_name(p, q), p, q) for q in vae.POSTERIORS for p in vae.PRIORS]
JOBS = [Job(GAUSSIAN), Job(SPLINE_FLOW), *VAES]
_SLOWEST_FIRST = (JOBS[1], *reversed(VAES), JOBS[0])


def digits(settings: Settings) -> Dataset:
    """The digits with uniform noise, ``x + u``, on the scale 0 to 17 of their 17 levels."""
    dataset = load("digits", rows=FAST_ROWS if settings.fast else None)
    return dequantized(dataset, copies=2 if settings.fast else 16, seed=settings.seed)


def run_all(
    settings: Settings, *, processes: int, jobs: Sequence[Job] = _SLOWEST_FIRST
) -> Iterator[Outcome]:
    """Yields the outcomes as they come.

    Args:
        settings: what all jobs share.
        jobs: the models, which start in this order.
        processes: how many models to train at a time; 1 stays in this process, otherwise each
            has a process of its own with one thread.
    """
    if processes == 1:
        for job in jobs:
            yield run(job, settings)
        return
    # spawn, since a forked child of a process that has used PyTorch's threads can hang
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        running = [pool.submit(run, job, settings) for job in jobs]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _one_thread() -> None:
    torch.set_num_threads(1)


def run(job: Job, settings: Settings) -> Outcome:
    """Trains one model and scores it on the test rows."""
    pyro.clear_param_store()
    pyro.set_rng_seed(settings.seed)
    dataset = digits(settings)
    if job.name == GAUSSIAN:
        return _gaussian(job, dataset)
    if job.name == SPLINE_FLOW:
        return _spline_flow(job, dataset, settings)
    return _vae(job, dataset, settings)


def _gaussian(job: Job, dataset: Dataset) -> Outcome:
    gaussian = density.gaussian(dataset.train)
    samples = gaussian.sample((NUM_DRAWN,)).numpy()
    scores = heldout_log_prob(gaussian, dataset.test.double())
    return Outcome(job, scores, samples, 0.0, {}, {})


def _spline_flow(job: Job, dataset: Dataset, settings: Settings) -> Outcome:
    flow = SplineFlow(
        dataset.event_size,
        num_transforms=4,
        hidden_dims=[128, 128],
        dropout=0.2,
        seed=settings.seed,
    ).standardize(dataset.train, "full")
    result = fit(
        flow,
        data=dataset.train,
        val_data=dataset.val,
        max_steps=20 if settings.fast else 800,
        batch_size=128,
        lr=3e-3,
        scheduler="cosine",
        clip_norm=10.0,
        seed=settings.seed,
        progress=False,
    )
    scores = heldout_log_prob(flow, dataset.test)
    return _outcome(job, scores, flow.sample(NUM_DRAWN), result)


def _vae(job: Job, dataset: Dataset, settings: Settings) -> Outcome:
    model = vae.VAE(
        dataset.event_size,
        data_size=len(dataset.train),
        latent_dim=8,
        prior=job.prior,
        posterior=job.posterior,
        num_transforms=3,
        prior_dropout=0.1,
        name=job.group,
    ).standardize(dataset.train)
    result = vae.train(
        model,
        dataset.train,
        dataset.val,
        steps=20 if settings.fast else 1000,
        lr=4e-3,
        seed=settings.seed,
        progress=False,
    )
    scores = pointwise_bounds(
        model.model,
        model.guide,
        dataset.test,
        num_samples=50 if settings.fast else NUM_SAMPLES,
        seed=settings.seed,
    )
    return _outcome(job, scores, model.sample(NUM_DRAWN), result)


def _outcome(job: Job, scores: xr.Dataset, samples: torch.Tensor, result: FitResult) -> Outcome:
    seconds = float(result.history["seconds"][-1])
    return Outcome(job, scores, samples.numpy(), seconds, result.history, result.validation)


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """As in the table: densities first, then the VAEs."""
    return sorted(outcomes, key=lambda outcome: JOBS.index(outcome.job))
