"""Three programs in the way of Pyro's own examples, for ``pyro_examples.py``; the data are simulated or scikit-learn's.

``VAE`` follows examples/vae, ``DMM`` examples/dmm (Krishnan, Shalit, Sontag 2017), ``BayesianRegression`` the first
tutorial on Bayesian regression. Their plates have the size of the batch, as Pyro's have.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn


class BayesianRegression(PyroModule):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = PyroModule[nn.Linear](in_features, out_features)
        shape = [out_features, in_features]
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


class VAE(nn.Module):
    def __init__(self, input_dim: int, z_dim: int = 8, hidden_dim: int = 64):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.Softplus())
        self.z_loc, self.z_log_scale = nn.Linear(hidden_dim, z_dim), nn.Linear(hidden_dim, z_dim)
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, input_dim)
        )

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("z_loc", self.z_loc)
        pyro.module("z_log_scale", self.z_log_scale)
        with pyro.plate("data", x.shape[0]):
            hidden = self.encoder(x)
            scale = self.z_log_scale(hidden).exp()
            pyro.sample("latent", dist.Normal(self.z_loc(hidden), scale).to_event(1))


class GatedTransition(nn.Module):
    """p(z_t | z_{t-1}): a gate between a linear and a non-linear mean."""

    def __init__(self, z_dim: int, hidden_dim: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(z_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, z_dim), nn.Sigmoid()
        )
        self.proposed = nn.Sequential(
            nn.Linear(z_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, z_dim)
        )
        self.linear = nn.Linear(z_dim, z_dim)
        self.scale = nn.Linear(z_dim, z_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposed = self.gate(z), self.proposed(z)
        loc = (1 - gate) * self.linear(z) + gate * proposed
        return loc, nn.functional.softplus(self.scale(proposed.relu())) + 1e-3


class DMM(nn.Module):
    """A deep Markov model of binary sequences ``(B, T, D)``."""

    def __init__(self, input_dim: int, z_dim: int = 6, hidden_dim: int = 16, rnn_dim: int = 16):
        super().__init__()
        self.emitter = nn.Sequential(
            nn.Linear(z_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, input_dim)
        )
        self.transition = GatedTransition(z_dim, hidden_dim)
        self.rnn = nn.GRU(input_dim, rnn_dim, batch_first=True)
        self.z_to_hidden = nn.Linear(z_dim, rnn_dim)
        self.loc, self.scale = nn.Linear(rnn_dim, z_dim), nn.Linear(rnn_dim, z_dim)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(z_dim)), nn.Parameter(torch.zeros(z_dim))

    def model(self, x: Tensor, annealing_factor: float = 1.0) -> None:
        pyro.module("dmm", self)
        z = self.z_0.expand(len(x), -1)
        with pyro.plate("z_minibatch", len(x)):
            for t in range(x.shape[1]):
                loc, scale = self.transition(z)
                with poutine.scale(scale=annealing_factor):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).to_event(1))
                emission = dist.Bernoulli(logits=self.emitter(z)).to_event(1)
                pyro.sample(f"obs_{t}", emission, obs=x[:, t])

    def guide(self, x: Tensor, annealing_factor: float = 1.0) -> None:
        pyro.module("dmm", self)
        backwards = self.rnn(x.flip(1))[0].flip(1)
        z = self.z_q_0.expand(len(x), -1)
        with pyro.plate("z_minibatch", len(x)):
            for t in range(x.shape[1]):
                hidden = 0.5 * (self.z_to_hidden(z).tanh() + backwards[:, t])
                scale = nn.functional.softplus(self.scale(hidden)) + 1e-3
                with poutine.scale(scale=annealing_factor):
                    z = pyro.sample(f"z_{t}", dist.Normal(self.loc(hidden), scale).to_event(1))


def sequences(count: int, length: int = 12, dim: int = 10, seed: int = 0) -> Tensor:
    """Binary sequences in which a few notes move along a circle, at a speed of their own."""
    generator = torch.Generator().manual_seed(seed)
    start, speed = torch.rand(2, count, 1, generator=generator)
    phase = start * dim + (0.3 + speed) * torch.arange(length)
    distance = (torch.arange(dim) - phase.unsqueeze(-1)).abs() % dim
    distance = torch.minimum(distance, dim - distance)
    return torch.bernoulli(torch.exp(-0.5 * distance.square()), generator=generator)
