"""VAEs whose log p(x) and posterior are known: z ~ N(0, I), x | z ~ N(W z + b, s^2 I), and two levels."""

import math

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


class TwoLevels:
    """z2 ~ N(0, I), z1 | z2 ~ N(A z2, s1^2 I), x | z1 ~ N(W z1 + b, s^2 I); q(z2 | x) q(z1 | z2, x).

    The guide is exact but for shifts of both levels by ``shift`` standard deviations, and for scales of
    z1 that are ``factor`` times those of the posterior.
    """

    Z2_DIM, Z1_DIM = 2, 3

    def __init__(self, num_data, *, seed=0, shift=0.0, factor=1.0, scale=0.5, noise=0.7):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=DOUBLE)

        self.scale, self.noise, self.shift, self.factor = scale, noise, shift, factor
        self.upper = normal(self.Z1_DIM, self.Z2_DIM)
        self.weight, self.bias = normal(X_DIM, self.Z1_DIM), normal(X_DIM)
        z2 = normal(num_data, self.Z2_DIM)
        z1 = z2 @ self.upper.T + scale * normal(num_data, self.Z1_DIM)
        self.data = z1 @ self.weight.T + self.bias + noise * normal(num_data, X_DIM)
        self.of_z1 = self.upper @ self.upper.T + scale**2 * eye(self.Z1_DIM)  # prior covariance
        self.of_x = self.weight @ self.of_z1 @ self.weight.T + noise**2 * eye(X_DIM)
        gain2 = self.upper.T @ self.weight.T @ self.of_x.inverse()
        self.gain2, self.cov2 = gain2, eye(self.Z2_DIM) - gain2 @ self.weight @ self.upper
        precision1 = eye(self.Z1_DIM) / scale**2 + self.weight.T @ self.weight / noise**2
        self.cov1 = precision1.inverse()  # of z1, given z2 and x

    def model(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(self.Z2_DIM, dtype=DOUBLE), 1.0).to_event(1)
            z2 = pyro.sample("z2", prior)
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.upper.T, self.scale).to_event(1))
            loc = z1 @ self.weight.T + self.bias
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def mean1(self, z2, x):
        """Of z1, given z2 and x."""
        said = z2 @ self.upper.T / self.scale**2 + (x - self.bias) @ self.weight / self.noise**2
        return said @ self.cov1

    def guide(self, x):
        with pyro.plate("data", len(x)):
            tril2 = torch.linalg.cholesky(self.cov2)
            mean2 = (x - self.bias) @ self.gain2.T + self.shift * tril2.sum(-1)
            z2 = pyro.sample("z2", dist.MultivariateNormal(mean2, scale_tril=tril2))
            tril1 = torch.linalg.cholesky(self.cov1)
            mean1 = self.mean1(z2, x) + self.shift * tril1.sum(-1)
            pyro.sample("z1", dist.MultivariateNormal(mean1, scale_tril=self.factor * tril1))

    def exact_log_prob(self):
        return dist.MultivariateNormal(self.bias, self.of_x).log_prob(self.data)

    def exact_gap(self):
        """KL(q || posterior), the same for all data: the shift of each level, the scales of z1."""
        shifts = 0.5 * self.shift**2 * (self.Z2_DIM + self.Z1_DIM)
        scales = self.Z1_DIM * (0.5 * (self.factor**2 - 1) - math.log(self.factor))
        return shifts + scales


def eye(size):
    return torch.eye(size, dtype=DOUBLE)
