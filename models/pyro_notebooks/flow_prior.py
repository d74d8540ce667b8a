"""A VAE with a flow as its prior: the program of Pyro's notebook "VAE with a Normalizing Flow prior".

A Gaussian encoder, a Bernoulli decoder, and between them a prior that is trained along. The images are simulated: black
and white, with one bright bar each. Nothing but the constructor of the prior differs; the notebook has Zuko's there::

    python -m models.pyro_notebooks.flow_prior --flow pyro      # Pyro's masked autoregressive flow
    python -m models.pyro_notebooks.flow_prior --flow flowkit   # SplineFlow
    python -m models.pyro_notebooks.flow_prior --flow normal    # no flow, to see what it gains
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from models.pyro_notebooks._flows import TransformFlow
from pyro_flowkit import SplineFlow

SIDE = 8


def _masked_autoregressive(latent: int, hidden_dims: Sequence[int]) -> TransformFlow:
    layers = [pyro_transforms.affine_autoregressive(latent, list(hidden_dims)) for _ in range(3)]
    return TransformFlow(latent, [layer.inv for layer in layers], owners=layers)


FLOWS: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "pyro": _masked_autoregressive,
    "flowkit": lambda latent, hidden_dims: SplineFlow(
        latent, num_transforms=3, hidden_dims=hidden_dims
    ),
    "normal": lambda latent, hidden_dims: TransformFlow(latent, []),
}


class Trained(NamedTuple):
    """Losses of all epochs (nats per image), and probabilities of images drawn from prior and decoder."""

    losses: list[float]
    images: Tensor


def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class VAE(nn.Module):
    """Encoder, decoder and prior.

    Args:
        prior: calling it gives the distribution of one latent, event shape ``(latent,)``.
        features: pixels of an image.
        latent: size of the latent.
        width: of the hidden layers.
    """

    def __init__(self, prior: nn.Module, features: int, latent: int, width: int):
        super().__init__()
        self.prior = prior
        self.encoder = network(features, width, 2 * latent)
        self.decoder = network(latent, width, features)

    def decode(self, z: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=self.decoder(z)).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("prior", self.prior)
        pyro.module("decoder", self.decoder)
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decode(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("batch", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def bars(n: int, *, seed: int = 0) -> Tensor:
    """Images of one horizontal or vertical bar, with a fiftieth of the pixels flipped: shape ``(n, 64)``, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(SIDE, (n,), generator=generator)
    upright = torch.rand(n, generator=generator) < 0.5
    rows = nn.functional.one_hot(place, SIDE).float()[:, :, None].expand(n, SIDE, SIDE)
    images = torch.where(upright[:, None, None], rows, rows.transpose(1, 2)).flatten(1)
    flipped = torch.rand(images.shape, generator=generator) < 0.02
    return torch.where(flipped, 1.0 - images, images)


def train(vae: VAE, data: Tensor, *, epochs: int, batch_size: int) -> list[float]:
    """The notebook's loop; losses by epoch (nats per image)."""
    pyro.clear_param_store()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=Trace_ELBO())
    losses = []
    for _ in range(epochs):
        batches = data[torch.randperm(len(data))].split(batch_size)
        losses.append(sum(svi.step(x) for x in batches) / len(data))
    return losses


def main(argv: Sequence[str] | None = None) -> Trained:
    """Train the VAE, print its loss, and return what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flow", choices=FLOWS, default="flowkit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    latent, width = (4, 64) if options.fast else (8, 256)
    pyro.set_rng_seed(options.seed)
    prior = FLOWS[options.flow](latent, [width, width])
    vae = VAE(prior, SIDE**2, latent, width)
    data = bars(256 if options.fast else 4096)
    losses = train(vae, data, epochs=10 if options.fast else 96, batch_size=64)
    print(f"{options.flow}: {losses[0]:.2f} nats per image at first, {losses[-1]:.2f} at the end")
    with torch.no_grad():
        images = vae.decode(vae.prior().sample(torch.Size([16]))).mean
    return Trained(losses, images)


if __name__ == "__main__":
    main()
