r"""NUTS for so many CPU seconds, and how far posterior means and standard deviations are off.

NUTS has no ELBO. What can be compared is what is read from its draws: with m, s the posterior's mean and standard
deviation of an unconstrained latent, and m', s' those of the draws,

    error of the mean = |m' - m| / s,        error of the standard deviation = |s' / s - 1|,

each for the worst of the latents. The reference is exact where the posterior can be drawn from; elsewhere it is an
AutoSplineFlow trained on its own and corrected by importance weights, whose noise is about 0.01.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from models._targets import Target
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_vector import pack

NUM_CHAINS = 2
WARMUP_STEPS = 300
NUM_REFERENCE = 20_000
MIN_DRAWS = 4  # of each chain, for r_hat


@dataclass(frozen=True)
class Chains:
    """What NUTS has drawn.

    Attributes:
        draws: unconstrained, shape ``(chains, draws, D)``; no draws where a chain did not end its warm-up.
        divergences: number of divergent transitions after the warm-up.
    """

    draws: Tensor
    divergences: int

    def numbers(self) -> dict[str, float]:
        """The largest split R-hat, the smallest effective sample size and the divergences; empty without draws."""
        if self.draws.shape[1] < MIN_DRAWS:
            return {}
        statistics = {"chain_dim": 0, "sample_dim": 1}
        return {
            "r_hat": float(split_gelman_rubin(self.draws, **statistics).max()),
            "ESS": float(effective_sample_size(self.draws, **statistics).min()),
            "divergences": self.divergences,
        }


class _Enough(Exception):
    pass


class _Chain:
    """Draws of one chain, taken as they come: MCMC itself ends after a number of them, not after a time."""

    def __init__(self, names: list[str], end: float, max_draws: float):
        self._names, self._end, self._max_draws = names, end, max_draws
        self.draws: list[Tensor] = []

    def hook(self, kernel: Any, params: dict[str, Tensor], stage: str, step: int) -> None:
        if stage.startswith("Sample"):
            flat = [params[name].detach().reshape(-1) for name in self._names]
            self.draws.append(torch.cat(flat))
        if len(self.draws) >= self._max_draws or time.process_time() > self._end:
            raise _Enough


def run_nuts(target: Target, *, seconds: float, steps: int | None, seed: int) -> Chains:
    """Chains one after the other, each with its part of the CPU seconds, the warm-up included.

    Args:
        target: model and data.
        seconds: of CPU time, for all chains together.
        steps: of the warm-up and after it, where the time is not to decide.
        seed: of the draws.
    """
    names = list(_prepared(target)._unconstrained_shapes)
    chains, divergences = [], 0
    for i in range(NUM_CHAINS):
        pyro.set_rng_seed(NUM_CHAINS * seed + i)
        chain = _Chain(names, time.process_time() + seconds / NUM_CHAINS, steps or math.inf)
        kernel = NUTS(target.model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(
            kernel,
            num_samples=10**9,
            warmup_steps=steps or WARMUP_STEPS,
            disable_progbar=True,
            hook_fn=chain.hook,
        )
        with contextlib.suppress(_Enough):
            mcmc.run(*target.args)
        if chain.draws:
            divergences += len(kernel.diagnostics()["divergences"])
        chains.append(chain.draws)
    count = min(map(len, chains))
    draws = [torch.stack(chain[:count]) if count else torch.zeros(0, 1) for chain in chains]
    return Chains(torch.stack(draws), divergences)


def reference(target: Target, train: Callable[[Any], Any]) -> Tensor:
    """Draws of the posterior for others to be compared with, unconstrained, shape ``(n, D)``.

    Args:
        target: model and data.
        train: what trains a guide, where there is no exact way.
    """
    guide = _prepared(target)
    if target.exact_draws is not None:
        values = target.exact_draws(NUM_REFERENCE)
    else:
        train(guide)
        values = guide.resample(NUM_REFERENCE, *target.args, seed=0)
    return pack(guide, values)[0].detach()


def errors(draws: Tensor, exact: Tensor) -> dict[str, float]:
    """Worst errors of means and standard deviations of draws ``(n, D)``; empty for too few of them."""
    if len(draws) < MIN_DRAWS:
        return {}
    scale = exact.std(0)
    return {
        "mean error": float(((draws.mean(0) - exact.mean(0)).abs() / scale).max()),
        "sd error": float((draws.std(0) / scale - 1.0).abs().max()),
    }


def _prepared(target: Target) -> AutoSplineFlow:
    """A guide that knows the names, the order and the supports of the latents."""
    pyro.clear_param_store()
    return AutoSplineFlow(target.model).setup(*target.args)
