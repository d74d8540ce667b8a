"""The same models in two styles: as people write them for one draw, and for a plate of draws left of their own."""

import pyro
import pyro.distributions as dist
import torch

N, GROUPS = 24, 4
_generator = torch.Generator().manual_seed(5)
GROUP = torch.arange(N) % GROUPS
X = torch.randn(N, 3, generator=_generator)
SECOND = torch.arange(N) % 3
NOISE = torch.randn(N, generator=_generator)
Y = X @ torch.tensor([1.0, -0.5, 0.2]) + 0.5 * GROUP + 0.3 * NOISE
COUNTS = (Y.exp().clamp(max=20.0)).round()
BINARY = (Y > 0).float()


def _flat(name, size, scale=1.0):
    return pyro.sample(name, dist.Normal(0.0, scale).expand([size]).to_event(1))


def varying_intercepts(batched):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", GROUPS):
        b = pyro.sample("b", dist.Normal(mu, tau))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(b[..., GROUP] if batched else b[GROUP], 1.0), obs=Y)


def regression(batched):
    w = _flat("w", 3)
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = (X * w).sum(-1) if batched else X @ w
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, sigma), obs=Y)


def varying_slopes(batched):
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    mean = a[..., GROUP] + b[..., GROUP] * X[:, 0] if batched else a[GROUP] + b[GROUP] * X[:, 0]
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def logistic(batched):
    w = _flat("w", 3)
    logits = (X * w).sum(-1) if batched else X @ w
    with pyro.plate("data", N):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=BINARY)


def poisson(batched):
    w = _flat("w", 3, 0.5)
    rate = ((X * w).sum(-1) if batched else torch.mv(X, w)).exp()
    with pyro.plate("data", N):
        pyro.sample("y", dist.Poisson(rate), obs=COUNTS)


def crossed(batched):
    with pyro.plate("groups", GROUPS):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("others", 3):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    mean = a[..., GROUP] + b[..., SECOND] if batched else a[GROUP] + b[SECOND]
    with pyro.plate("data", N):
        pyro.sample("y", dist.StudentT(4.0, mean, 1.0), obs=Y)


def horseshoe(batched):
    scale = pyro.sample("scale", dist.HalfCauchy(0.5))
    with pyro.plate("columns", 3):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(0.0, scale * local))
    mean = (X * w.unsqueeze(-2)).sum(-1) if batched else X @ w
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def gaussian_process(batched):
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    at = torch.linspace(0.0, 3.0, N)
    square = (at[:, None] - at).square()
    length = length[..., None, None] if batched else length
    kernel = torch.exp(-0.5 * square / length**2) + 0.1 * torch.eye(N)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N), kernel), obs=Y)


def random_walk(batched):
    with pyro.plate("steps", N):
        steps = pyro.sample("step", dist.Normal(0.0, 0.3))
    state = steps.cumsum(-1) if batched else torch.stack([steps[: i + 1].sum() for i in range(N)])
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(state, 0.5), obs=Y)


def softmax(batched):
    logits = _flat("logits", GROUPS)
    weights = logits.softmax(-1) if batched else torch.softmax(logits, 0)
    pyro.sample("y", dist.Multinomial(10, weights), obs=torch.tensor([4.0, 3.0, 2.0, 1.0]))


MODELS = {
    model.__name__: model
    for model in (
        varying_intercepts,
        regression,
        varying_slopes,
        logistic,
        poisson,
        crossed,
        horseshoe,
        gaussian_process,
        random_walk,
        softmax,
    )
}
