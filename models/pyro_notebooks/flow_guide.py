r"""An amortised guide by a conditional flow: the program of Pyro's notebook "SVI with a Normalizing Flow guide".

.. math:: z \sim N(0, I_3), \qquad x_j | z \sim N\big((z_1, z_2),\ .01\, C(z_3)\big), \quad j = 1, ..., 5

C has ones on its diagonal and .99 tanh(z_3) beside it. The guide's context is a datum's five pairs, flattened. Nothing
but the constructor of the flow differs; the notebook has Zuko's there::

    python -m models.pyro_notebooks.flow_guide --flow pyro        # Pyro's autoregressive splines
    python -m models.pyro_notebooks.flow_guide --flow flowkit     # SplineFlow
    python -m models.pyro_notebooks.flow_guide --flow transforms  # couplings of pyro_flowkit.transforms in Pyro's class
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn

import pyro_flowkit.transforms as T
from models.pyro_notebooks._flows import TransformFlow
from pyro_flowkit import SplineFlow

LATENTS, REPEATS = 3, 5
CONTEXT = 2 * REPEATS

FLOWS: dict[str, Callable[[Sequence[int]], nn.Module]] = {
    "pyro": lambda hidden_dims: TransformFlow(
        LATENTS,
        [pyro_transforms.conditional_spline_autoregressive(LATENTS, CONTEXT, list(hidden_dims))],
    ),
    "flowkit": lambda hidden_dims: SplineFlow(
        LATENTS, CONTEXT, num_transforms=2, hidden_dims=hidden_dims
    ),
    "transforms": lambda hidden_dims: TransformFlow(
        LATENTS,
        [
            T.iterated(
                2, T.conditional_spline_coupling, LATENTS, CONTEXT, hidden_dims=list(hidden_dims)
            )
        ],
    ),
}


class Trained(NamedTuple):
    """Losses of all steps (nats, all data together), and draws for the first datum, ``(n, 3)``."""

    losses: list[float]
    draws: Tensor


def prior() -> dist.Distribution:
    return dist.Normal(torch.zeros(LATENTS), torch.ones(LATENTS)).to_event(1)


def likelihood(z: Tensor) -> dist.MultivariateNormal:
    """Of one pair, given latents of shape ``(*batch, 3)``."""
    correlation = 0.99 * z[..., 2].tanh()
    one = torch.ones_like(correlation)
    rows = torch.stack([one, correlation, correlation, one], dim=-1)
    return dist.MultivariateNormal(z[..., :2], 1e-2 * rows.unflatten(-1, (2, 2)))


def model(x: Tensor) -> None:
    with pyro.plate("data", x.shape[1]):
        z = pyro.sample("z", prior())
        with pyro.plate("obs", REPEATS):
            pyro.sample("x", likelihood(z), obs=x)


def simulate(n: int, *, seed: int = 0) -> Tensor:
    """Data of shape ``(5, n, 2)``."""
    pyro.set_rng_seed(seed)
    return likelihood(prior().sample(torch.Size([n]))).sample(torch.Size([REPEATS]))


def train(flow: nn.Module, x: Tensor, *, steps: int, num_particles: int = 16) -> Trained:
    """The notebook's loop, with the flow as the guide."""

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", flow(x.transpose(0, 1).flatten(-2)))

    pyro.clear_param_store()
    objective = Trace_ELBO(num_particles=num_particles, vectorize_particles=True)
    svi = SVI(model, guide, ClippedAdam({"lr": 1e-3, "clip_norm": 10.0}), loss=objective)
    losses = [svi.step(x) for _ in range(steps)]
    return Trained(losses, flow(x[:, 0].flatten()).sample(torch.Size([1000])))


def main(argv: Sequence[str] | None = None) -> Trained:
    """Train the guide, print its loss, and return what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flow", choices=FLOWS, default="flowkit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    x = simulate(16 if options.fast else 64)
    pyro.set_rng_seed(options.seed)
    flow = FLOWS[options.flow]((32, 32) if options.fast else (256, 256))
    trained = train(flow, x, steps=100 if options.fast else 4097)
    last = torch.tensor(trained.losses[-max(1, len(trained.losses) // 16) :])
    print(f"{options.flow}: loss {trained.losses[0]:.1f} at first, {last.mean():.2f} at the end")
    return trained


if __name__ == "__main__":
    main()
