"""The best posterior of every datum within the family of its guide, by gradients of its ELBO.

Data are independent of each other given the weights, so the optimisation of a batch is that of its
data side by side, under Adam, which scales every number by itself. The gradient is the path
gradient (Roeder et al. 2017): log q is differentiated along the draws alone, so that at the exact
posterior not even noise is left.

Reference:
    Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance
    Gradient Estimators for Variational Inference. NeurIPS 2017.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.local_posterior import (
    ENCODER,
    Conditional,
    Family,
    FreePosterior,
    family_of,
    local_families,
)
from pyro_flowkit.diagnostics.particles import Particles, draw_again, draw_particles
from pyro_flowkit.diagnostics.pointwise import (
    ROWS_AT_ONCE,
    data_plate,
    datum_log_weights,
    draw_pool,
)

ROUNDS = 6
"""Rounds of the optimisation, in each of which offsets start at zero."""

_JUDGING = 50  # draws per datum that judge a round
_DECAY = 0.6  # of the learning rate from round to round


@dataclass(frozen=True)
class LocalProblem:
    """Data whose posteriors are optimised, and how their programs run."""

    model: Callable
    guide: Callable
    rows: tuple[Tensor, ...]
    args: tuple
    kwargs: dict[str, Any]
    like: Particles
    plate: str
    dim: int

    @classmethod
    def of(
        cls,
        model: Callable,
        guide: Callable,
        rows: tuple[Tensor, ...],
        args: tuple,
        kwargs: dict[str, Any],
        plate: str | None,
        vectorize: bool | None,
        like: Particles | None,
    ) -> "LocalProblem":
        call = (model, guide, (*rows, *args), kwargs)
        like = next(
            draw_particles(
                *call,
                num_samples=2,
                chunk_size=2,
                whole_data=False,
                vectorize=vectorize,
                like=like,
            )
        )
        plate, dim = data_plate(like, len(rows[0]), plate)
        return cls(model, guide, rows, args, kwargs, like, plate, dim)

    def log_weights(self, guide: Callable, num_samples: int, seed: int) -> Tensor:
        """Shape ``(data, draws)``; guides of one family get the same noise from the same seed."""
        with evaluation(seed=seed):
            return draw_pool(
                self.model,
                guide,
                self.rows,
                self.args,
                self.kwargs,
                num_samples=num_samples,
                chunk_size=max(1, ROWS_AT_ONCE // len(self.rows[0])),
                plate=self.plate,
                like=self.like,
            ).log_weights

    def optimize(
        self, num_steps: int, lr: float, num_particles: int
    ) -> tuple[FreePosterior, Tensor]:
        """The guide with the best posteriors found, and what the last round gained per datum.

        In every round offsets start at zero, in units of the posteriors found so far: a posterior
        that is far away or very narrow is reached in some rounds. Data that a round made worse are
        put back.
        """
        first = self._guide_trace()
        replayed = self._guide_trace(poutine.replay(self.guide, trace=first))
        families = local_families(first, self._guide_trace(), replayed, self.dim)
        best = FreePosterior(self.guide, {n: f.build(f.zeros) for n, f in families.items()})
        for i in range(ROUNDS):
            offsets = {name: family.start() for name, family in families.items()}
            self._descend(families, offsets, num_steps // ROUNDS, lr * _DECAY**i, num_particles)
            seed = new_seed()
            before = self.log_weights(best, _JUDGING, seed)
            found = {n: f.build(_detached(offsets[n])) for n, f in families.items()}
            after = self.log_weights(FreePosterior(self.guide, found), _JUDGING, seed)
            gain = (after - before).mean(-1)
            better = gain > 0
            found = {n: f.build(f.only(offsets[n], better)) for n, f in families.items()}
            families = {name: family_of(fn, name, self.dim) for name, fn in found.items()}
            best = FreePosterior(self.guide, found)
        return best, gain.where(better, 0.0)

    def _guide_trace(self, guide: Callable | None = None) -> Any:
        trace = poutine.trace(guide or self.guide).get_trace(*self.rows, *self.args, **self.kwargs)
        return prune_subsample_sites(trace)

    def _descend(
        self,
        families: dict[str, Family],
        offsets: dict[str, list[Tensor]],
        num_steps: int,
        lr: float,
        num_particles: int,
    ) -> None:
        leaves = [leaf for own in offsets.values() for leaf in own]
        optimizer = torch.optim.Adam(leaves, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            with torch.enable_grad():
                loss = -self._elbo(families, offsets, num_particles).sum()
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                # A draw outside of the support teaches its datum nothing.
                leaf.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            schedule.step()

    def _elbo(
        self, families: dict[str, Family], offsets: dict[str, list[Tensor]], num_particles: int
    ) -> Tensor:
        """ELBO of every datum, with the path gradient: the offsets are held fixed in log q."""
        posteriors = {name: family.build(offsets[name]) for name, family in families.items()}
        guide = FreePosterior(self.guide, posteriors)
        call = (self.model, guide, (*self.rows, *self.args), self.kwargs)
        log_weights = []
        for particles in draw_again(self.like, *call, num_particles):
            for name, family in families.items():
                site = particles.guide_trace.nodes[name]
                fixed = family.build(_detached(offsets[name]))
                if isinstance(fixed, Conditional):
                    fixed = fixed.of(site["infer"][ENCODER])
                fixed = fixed.expand(site["fn"].batch_shape)
                site["unscaled_log_prob"] = fixed.log_prob(site["value"])
            log_weights.append(datum_log_weights(particles, self.dim, len(self.rows[0])))
        return torch.cat(log_weights).mean(0)


def new_seed() -> int:
    """A seed from the generator that is in use."""
    return int(torch.randint(2**62, ()))


def _detached(offsets: list[Tensor]) -> list[Tensor]:
    return [offset.detach() for offset in offsets]
