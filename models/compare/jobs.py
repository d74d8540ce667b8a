"""The models of the comparison, each trained and scored by one call that another process can make."""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from models import density
from models.compare.recipes import Request
from models.vae import POSTERIORS, VAE, train_prior
from models.vae.data import Prepared
from models.vae.options import parser
from models.vae.program import FAST_STEPS, fitted, prepared_data, vae_settings
from models.vae.report import FAST_SAMPLES
from models.vae.storage import start_from
from pyro_flowkit import SplineFlow
from pyro_flowkit.diagnostics import heldout_log_prob, inference_gaps, pointwise_bounds
from pyro_flowkit.training import FitResult, fit

GAUSSIAN, SPLINE_FLOW = "Gaussian", "spline flow"
NUM_SAMPLES = 1000
NUM_DRAWN = 20
CODE_DRAWS = 50
DENSITY_EPOCHS = 16


@dataclass(frozen=True)
class Job:
    """One training: of the density of this name, or of a VAE with this prior and posterior."""

    name: str
    seed: int
    prior: str = ""
    posterior: str = ""

    @property
    def is_plain(self) -> bool:
        return self.name == PLAIN


@dataclass(frozen=True)
class Outcome:
    """A trained model's numbers.

    Attributes:
        job: the model.
        scores: of the test rows, from ``heldout_log_prob`` or ``pointwise_bounds``.
        samples: draws, for a VAE the means of the data given the codes that were drawn, shape ``(n, D)``.
        seconds: CPU time of the training.
        history: objective and learning rate per step, empty for a closed form.
        validation: objective on the validation rows, likewise.
        reasons: of the plain VAE, see :func:`reasons_of`.
    """

    job: Job
    scores: xr.Dataset
    samples: np.ndarray
    seconds: float
    history: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    reasons: xr.Dataset | None = None


def vae_name(prior: str, posterior: str) -> str:
    """How a VAE is called in table, figure and text."""
    return f"VAE, {prior} prior, {posterior} posterior"


PLAIN = vae_name("standard", "normal")
FLOW_PRIOR, FLOW_POSTERIOR = vae_name("flow", "normal"), vae_name("standard", "flow")
BOTH = vae_name("flow", "flow")


def model_names(request: Request) -> list[str]:
    """In the order of the table."""
    densities = [GAUSSIAN, SPLINE_FLOW] if request.recipe.has_densities else []
    return [PLAIN, FLOW_POSTERIOR, FLOW_PRIOR, BOTH, *densities]


def jobs_of(request: Request) -> list[Job]:
    """All trainings, the slowest first."""
    vaes = [(p, q) for q in reversed(POSTERIORS) for p in ("flow", "standard")]
    jobs = [Job(vae_name(p, q), seed, p, q) for p, q in vaes for seed in request.seeds]
    if request.recipe.has_densities:
        jobs += [Job(name, seed) for name in (SPLINE_FLOW, GAUSSIAN) for seed in request.seeds]
    return jobs


def run_all(request: Request, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Yields the outcomes as they come.

    With one process all stays in this one; otherwise each model has a process of its own with one thread.
    """
    if request.processes == 1:
        for job in jobs:
            yield run(job, request)
        return
    # spawn, since a forked child of a process that has used PyTorch's threads can hang
    with ProcessPoolExecutor(
        request.processes, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        running = [pool.submit(run, job, request) for job in jobs]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def run(job: Job, request: Request) -> Outcome:
    """Trains one model and scores it on the test rows."""
    pyro.clear_param_store()
    pyro.set_rng_seed(job.seed)
    args = vae_arguments(job, request)
    prepared = prepared_data(args)
    test = prepared.test[: request.recipe.bound_rows]
    if job.name == GAUSSIAN:
        return _gaussian(job, prepared, test)
    if job.name == SPLINE_FLOW:
        return _spline_flow(job, prepared, test, request.fast)
    return _vae(job, args, prepared, test, request)


def vae_arguments(job: Job, request: Request) -> Namespace:
    """What ``python -m models.vae`` reads from its command line for this VAE."""
    options = [*request.recipe.vae_options, "--seed", str(job.seed)]
    if job.prior:
        options += ["--prior", job.prior, "--posterior", job.posterior]
    return parser().parse_args([*options, *(["--fast"] if request.fast else [])])


def _gaussian(job: Job, prepared: Prepared, test: Tensor) -> Outcome:
    steps = range(DENSITY_EPOCHS * prepared.batches.per_epoch)
    gaussian = density.gaussian(torch.cat([prepared.batches(step) for step in steps]))
    samples = gaussian.sample((NUM_DRAWN,)).numpy()
    return Outcome(job, heldout_log_prob(gaussian, test.double()), samples, 0.0, {}, {})


def _spline_flow(job: Job, prepared: Prepared, test: Tensor, fast: bool) -> Outcome:
    flow = SplineFlow(
        test.shape[-1], num_transforms=4, hidden_dims=[128, 128], dropout=0.2, seed=job.seed
    )
    flow.standardize(prepared.reference, "full")
    began = time.process_time()
    result = fit(
        flow,
        data=prepared.batches,
        val_data=prepared.val,
        max_steps=FAST_STEPS if fast else 800,
        lr=3e-3,
        scheduler="cosine",
        clip_norm=10.0,
        seed=job.seed,
        progress=False,
    )
    seconds = time.process_time() - began
    samples = flow.sample(NUM_DRAWN).numpy()
    return _outcome(job, heldout_log_prob(flow, test), samples, seconds, result)


def _vae(job: Job, args: Namespace, prepared: Prepared, test: Tensor, request: Request) -> Outcome:
    settings = vae_settings(args, prepared)
    vae = VAE(**settings).standardize(prepared.reference, prepared.standardization)
    began = time.process_time()
    result = fitted(args, vae, prepared, {"seed": job.seed, "progress": False})
    seconds = time.process_time() - began
    vae.eval()
    scores = pointwise_bounds(
        vae.model,
        vae.guide,
        test,
        num_samples=FAST_SAMPLES if request.fast else NUM_SAMPLES,
        seed=job.seed,
    )
    with torch.no_grad():
        samples = vae.decode(vae.p_z().sample((NUM_DRAWN,))).numpy()
    reasons = None
    if job.is_plain:
        flow_prior = VAE(**{**settings, "prior": "flow", "name": "with_flow_prior"})
        reasons = reasons_of(vae, flow_prior, prepared, test, job.seed, request)
    return _outcome(job, scores, samples, seconds, result, reasons)


def reasons_of(
    vae: VAE, flow_prior: VAE, prepared: Prepared, test: Tensor, seed: int, request: Request
) -> xr.Dataset:
    """What of the plain VAE a flow could mend.

    Args:
        vae: the plain VAE, trained.
        flow_prior: a fresh one with a flow prior.
        prepared: its data.
        test: test rows.
        seed: of the training of the prior, and of all draws.
        request: numbers of rows and steps.

    Returns:
        In nats: ``prior_gain`` over ``obs_id``, what the ELBO gains by a flow prior that is fitted to the codes of the
        trained VAE, which stays as it is; and from ``inference_gaps``, of test rows over ``gap_id`` and of training
        rows over ``train_id``, ``approximation_gap``, ``amortization_gap`` and these with the prefix ``train_``.
    """
    start_from(flow_prior, vae)
    train_prior(
        flow_prior,
        prepared.batches,
        prepared.val,
        steps=FAST_STEPS if request.fast else request.recipe.prior_steps,
        seed=seed,
        progress=False,
    )
    flow_prior.eval()
    with torch.no_grad():
        z = vae.q_z(test).sample((CODE_DRAWS,))
        gain = (flow_prior.p_z().log_prob(z) - vae.p_z().log_prob(z)).mean(0)
    rows = request.recipe.gap_rows
    gaps = inference_gaps(
        vae.model,
        vae.guide,
        prepared.test[:rows],
        train_data=prepared.reference[:rows],
        num_samples=FAST_SAMPLES if request.fast else NUM_SAMPLES,
        num_steps=FAST_STEPS if request.fast else 300,
        seed=seed,
    )
    names = ["approximation_gap", "amortization_gap"]
    kept = gaps[[*names, *(f"train_{name}" for name in names)]].rename(obs_id="gap_id")
    return kept.assign(prior_gain=("obs_id", gain.numpy(), {"units": "nats"}))


def _outcome(
    job: Job,
    scores: xr.Dataset,
    samples: np.ndarray,
    seconds: float,
    result: FitResult,
    reasons: xr.Dataset | None = None,
) -> Outcome:
    return Outcome(job, scores, samples, seconds, result.history, result.validation, reasons)
