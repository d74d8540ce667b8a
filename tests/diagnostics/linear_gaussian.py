"""The one VAE whose log p(x) and posterior are known: z ~ N(0, I), x | z ~ N(W z + b, s^2 I)."""

import pyro
import pyro.distributions as dist
import torch

DOUBLE = torch.float64
X_DIM, Z_DIM = 5, 2


class LinearGaussian:
    """Model and a guide that is wrong on purpose: shifted, of the wrong scale, without correlation.

    With ``correlation`` the two columns of W are alike, and the dimensions of the posterior correlated.
    """

    guide_family = dist.Normal

    def __init__(self, num_data, noise, *, seed=0, shift=0.3, factor=0.8, correlation=0.0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=DOUBLE)

        self.noise = noise
        self.weight, self.bias = normal(X_DIM, Z_DIM), normal(X_DIM)
        first, second = self.weight.unbind(-1)
        self.weight[:, 1] = correlation * first + (1 - correlation) * second
        self.precision = torch.eye(Z_DIM, dtype=DOUBLE) + self.weight.T @ self.weight / noise**2
        self.covariance = self.precision.inverse()
        self.shift = shift * self.covariance.diagonal().sqrt()
        self.scale = factor * self.precision.diagonal().rsqrt()
        errors = noise * normal(num_data, X_DIM)
        self.data = normal(num_data, Z_DIM) @ self.weight.T + self.bias + errors

    def posterior_mean(self, x):
        return (x - self.bias) @ self.weight @ self.covariance / self.noise**2

    def model(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(Z_DIM, dtype=DOUBLE), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            loc = z @ self.weight.T + self.bias
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            mean = self.posterior_mean(x) + self.shift
            pyro.sample("z", self.guide_family(mean, self.scale).to_event(1))

    def exact_log_prob(self):
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(X_DIM, dtype=DOUBLE)
        return dist.MultivariateNormal(self.bias, covariance).log_prob(self.data)
