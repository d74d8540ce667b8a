"""How a VAE is trained: all by the ELBO, the prior alone on frozen codes, the encoder alone on the model's own samples.

    train            max  E_q[log p(x, z) - log q(z | x)]             over everything
    train_prior      max  E_q[log p(z)]                               over the prior: the rest of the ELBO is constant
    refine_encoder   max  E_p(z) E_p(x | z)[ELBO(x)]                  over the encoder

The encoder learns from training rows, and knows them better than others; data drawn from the model never end.

References:
    Diederik P. Kingma et al. Improved Variational Inference with Inverse Autoregressive Flow. NeurIPS 2016 (free bits).

    Mingtian Zhang, Peter Hayes, David Barber. Generalization Gap in Amortized Inference. NeurIPS 2022.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from models.vae.model import VAE
from pyro_flowkit.training import FitResult, fit

Data = Tensor | Callable[[int], Tensor]

CLIP_NORM = 10.0
LR = 4e-3
STEPS = 3000
WARM_UP_START = 0.1


class Trainable(Protocol):
    """Model and guide of data, such as a VAE, and the number of data that their objective is counted for."""

    data_size: int
    model: Any
    guide: Any


def train(
    vae: Trainable,
    data: Data,
    val_data: Tensor,
    *,
    steps: int | None,
    batch_size: int = 128,
    lr: float = LR,
    kl_warm_up: float = 0.0,
    free_bits: float = 0.0,
    average: float | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> FitResult:
    """Maximise the ELBO; keeps the state that is best on ``val_data``.

    Args:
        vae: the VAE, standardised.
        data: training rows, or a function from the step to a batch of them.
        val_data: validation rows.
        steps: number of steps; None for as many as ``max_seconds`` allows.
        batch_size: rows per step, where data are rows.
        lr: learning rate at the start; it falls to zero along a cosine.
        kl_warm_up: share of the training over which the weight of the KL rises from 0.1 to 1.
        free_bits: floor of the KL (nats per datum), of each level where there are several; see :class:`FreeBitsELBO`.
        average: decay of an exponential moving average of the parameters, which is then what is validated and kept.
        seed: of all random numbers.
        progress: show a bar.
        options: further arguments of ``fit``: max_seconds, checkpoint_dir, resume, callbacks, ...
    """
    if isinstance(data, Tensor):
        options["batch_size"] = min(batch_size, len(data))
    return fit(
        vae.model,
        vae.guide,
        data=data,
        val_data=val_data,
        max_steps=steps,
        objective=FreeBitsELBO(free_bits, vae.data_size) if free_bits else None,
        lr=lr,
        scheduler="cosine",
        clip_norm=CLIP_NORM,
        kl_schedule=(WARM_UP_START, kl_warm_up) if kl_warm_up else None,
        average=average,
        seed=seed,
        progress=progress,
        **options,
    )


def train_prior(
    vae: VAE,
    batches: Callable[[int], Tensor],
    val_data: Tensor,
    *,
    steps: int,
    lr: float = LR,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fit a flow prior to the codes of a trained encoder, which stays as it is, and so does the decoder.

    Raises:
        ValueError: if the prior is no flow.
    """
    if vae.prior is None:
        raise ValueError("Expected a flow prior to train on codes, got the standard normal")
    vae.eval()

    def codes(step: int) -> Tensor:
        return _codes(vae, batches(step), seed=step)

    return fit(
        vae.prior,
        data=codes,
        val_data=_codes(vae, val_data, seed=0),
        max_steps=steps,
        lr=lr,
        scheduler="cosine",
        clip_norm=CLIP_NORM,
        seed=seed,
        progress=progress,
    )


@torch.no_grad()
def _codes(vae: VAE, x: Tensor, seed: int) -> Tensor:
    with _seeded(seed):
        return vae.q_z(x).sample()


def refine_encoder(
    vae: VAE,
    val_data: Tensor,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = LR / 4,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Tune the encoder on data drawn from the model itself; prior and decoder stay as they are.

    The state that is best on ``val_data``, which are real, is kept; if none is better than the beginning, that is.
    """

    def samples(step: int) -> Tensor:
        with _seeded(step), _in_eval_mode(vae):
            return vae.sample(batch_size)

    kept = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    parts = (vae.encoder, vae.heads, vae.posterior)
    encoder = [p for part in parts for p in part.parameters()]
    before = _validation(vae, val_data)
    # the others have gradients, too, but nobody to take a step by them
    result = fit(
        vae.model,
        vae.guide,
        data=samples,
        val_data=val_data,
        max_steps=steps,
        optimizer=lambda parameters, lr: torch.optim.Adam(encoder, lr=lr),
        lr=lr,
        scheduler="cosine",
        seed=seed,
        progress=progress,
    )
    if _validation(vae, val_data) < before:
        vae.load_state_dict(kept)
        result.best_step = 0
    return result


def _validation(vae: VAE, x: Tensor) -> float:
    """ELBO (nats per datum), with the same noise at every call."""
    with _seeded(0), _in_eval_mode(vae):
        return float(torch.cat([vae.elbo(rows) for rows in x.split(1000)]).mean())


class FreeBitsELBO(Trace_ELBO):
    r"""The ELBO in which a KL below a floor costs as much as the floor, and so is not pushed any lower.

    .. math:: E_q[\log p(x \mid z)] - \sum_l \max(\lambda, \mathrm{KL}_l)

    with KL_l, of each level of latents where there are several, as the mean over the batch of log q - log p, over all
    latents of the level together: for a flow there is no KL of each dimension. Its ``loss``, which validates, is that
    of the plain ELBO.

    Args:
        floor: lambda, in nats per datum.
        data_size: number of data that the objective is counted for.

    Raises:
        ValueError: if the floor is not positive.
    """

    def __init__(self, floor: float, data_size: int):
        super().__init__()
        if not floor > 0:
            raise ValueError(f"Expected free bits > 0, got {floor}")
        self.total = floor * data_size

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        observed = model_trace.log_prob_sum(lambda name, site: site["is_observed"])
        loss, surrogate = -float(observed.detach()), -observed
        for name, site in guide_trace.nodes.items():
            if site["type"] != "sample":
                continue
            prior = model_trace.nodes[name]["log_prob_sum"]
            kl = float((site["log_prob_sum"] - prior).detach())
            loss += max(kl, self.total)
            if kl >= self.total:
                surrogate = surrogate + site["score_parts"].entropy_term.sum() - prior
        return loss, surrogate


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
