r"""Densities of two rings: the program of Pyro's notebook "Normalizing Flows - Introduction", with either import.

Three flows, each in Pyro's own ``TransformedDistribution`` and a training loop of a few lines:

- an element-wise spline: its ``log_prob`` has a value for every coordinate, and the loss is a mean over coordinates;
- a spline coupling: a value for every point;
- p(x_1) p(x_2 | x_1), with a spline of x_2 whose context is x_1, sampled by ``condition(x_1).sample((n,))``.

Nothing but the module of the transforms differs::

    python -m models.pyro_notebooks.flows_intro --transforms pyro
    python -m models.pyro_notebooks.flows_intro --transforms flowkit
"""

import argparse
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_flowkit.transforms

TRANSFORMS: dict[str, ModuleType] = {
    "pyro": pyro.distributions.transforms,
    "flowkit": pyro_flowkit.transforms,
}


class Trained(NamedTuple):
    """Negative log-densities in nats, by element or by point as the flow has them, and draws of shape ``(n, 2)``."""

    losses: list[float]
    draws: Tensor


def rings(n: int = 1000, *, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Two noisy rings, one half as wide as the other, each coordinate standardised: shape ``(n, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2.0 * math.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.arange(n) < n // 2, 1.0, 0.5)
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    points = points + noise * torch.randn(n, 2, generator=generator)
    return (points - points.mean(0)) / points.std(0)


def descend(
    modules: nn.Module, loss_of: Callable[[], Tensor], *, steps: int, lr: float
) -> list[float]:
    """Adam on a loss; the losses of all steps."""
    optimizer = torch.optim.Adam(modules.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def elementwise(T: ModuleType, data: Tensor, steps: int) -> Trained:
    """Both coordinates on their own."""
    base = dist.Normal(torch.zeros(2), torch.ones(2))
    transform = T.Spline(2, count_bins=16)
    return _joint(dist.TransformedDistribution(base, [transform]), transform, data, steps, 1e-2)


def coupled(T: ModuleType, data: Tensor, steps: int) -> Trained:
    """The second coordinate given the first, by a coupling."""
    base = dist.Normal(torch.zeros(2), torch.ones(2))
    transform = T.spline_coupling(2, count_bins=16)
    return _joint(dist.TransformedDistribution(base, [transform]), transform, data, steps, 5e-3)


def _joint(
    flow: dist.TransformedDistribution, transform: nn.Module, data: Tensor, steps: int, lr: float
) -> Trained:
    def loss() -> Tensor:
        flow.clear_cache()  # Pyro's transforms remember the last log-det
        return -flow.log_prob(data).mean()

    return Trained(
        descend(transform, loss, steps=steps, lr=lr), flow.sample(torch.Size([len(data)]))
    )


def conditional(T: ModuleType, data: Tensor, steps: int) -> Trained:
    """A density of the first coordinate, and one of the second in the context of the first."""
    base = dist.Normal(torch.zeros(1), torch.ones(1))
    first, second = T.spline(1), T.conditional_spline(1, context_dim=1)
    flow_1 = dist.TransformedDistribution(base, [first])
    flow_2 = dist.ConditionalTransformedDistribution(base, [second])
    x_1, x_2 = data[:, :1], data[:, 1:]

    def loss() -> Tensor:
        flow_1.clear_cache()
        return -(flow_1.log_prob(x_1) + flow_2.condition(x_1).log_prob(x_2)).mean()

    losses = descend(nn.ModuleList([first, second]), loss, steps=steps, lr=3e-3)
    count = torch.Size([len(data)])
    drawn_1 = flow_1.sample(count)
    drawn_2 = flow_2.condition(drawn_1).sample(count)
    return Trained(losses, torch.cat([drawn_1, drawn_2], dim=-1))


FLOWS: dict[str, tuple[Callable[[ModuleType, Tensor, int], Trained], int]] = {
    "elementwise": (elementwise, 1001),
    "coupled": (coupled, 5001),
    "conditional": (conditional, 5001),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Trained]:
    """Train the three flows, print their losses, and return what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transforms", choices=TRANSFORMS, default="flowkit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    data = rings(200 if options.fast else 1000)
    results = {}
    for name, (train, steps) in FLOWS.items():
        pyro.set_rng_seed(options.seed)
        results[name] = train(TRANSFORMS[options.transforms], data, 60 if options.fast else steps)
        losses = results[name].losses
        print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    return results


if __name__ == "__main__":
    main()
