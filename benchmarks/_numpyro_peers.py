"""The models of ``_posteriors.py`` in NumPyro, its guides, and NUTS, with compilation on the clock."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jax import lax
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal, AutoMultivariateNormal

from benchmarks._posteriors import RATES_LOC, RATES_SCALE, Posterior, populations

jax.config.update("jax_enable_x64", True)

STEPS, PARTICLES, RATE = 12_000, 64, 5e-3
GUIDES: dict[str, Callable[..., Any]] = {
    "NumPyro IAF": partial(AutoIAFNormal, num_flows=4, hidden_dims=[32, 32]),
    "NumPyro IAF, wide": partial(AutoIAFNormal, num_flows=4, hidden_dims=[64, 64]),
    "NumPyro BNAF": AutoBNAFNormal,
    "NumPyro MVN": AutoMultivariateNormal,
}
MORE_THAN_32_LATENTS = ("gaussian_process",)  # which its networks must have as many units as
CHUNK = 500  # steps, or draws, between two looks
WARMUP = 500
MAX_DRAWS = 8000
ENOUGH = 400.0
JUDGES = 8192


def _population() -> tuple[Any, Any]:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    return mu, numpyro.sample("tau", dist.HalfCauchy(5.0))


def centred(sigma: Any, y: Any) -> None:
    mu, tau = _population()
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(sigma: Any, y: Any) -> None:
    mu, tau = _population()
    with numpyro.plate("school", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def seeds(x: Any, n: Any, r: Any) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
    with numpyro.plate("plate", len(n)):
        b = numpyro.sample("b", dist.Normal(0.0, tau**-0.5))
        numpyro.sample("r", dist.Binomial(n.astype(int), logits=x @ a + b), obs=r.astype(int))


def funnel(zero: Any) -> None:
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("dimension", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))


def banana(zero: Any) -> None:
    x1 = numpyro.sample("x1", dist.Normal(0.0, 10.0))
    numpyro.sample("x2", dist.Normal(0.03 * x1**2 - 3.0, 1.0))


def terrain(x: Any, y: Any) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 10.0))
    names = ("b_africa", "b_rugged", "b_both")
    rest = [numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in names]
    sigma = numpyro.sample("sigma", dist.Uniform(0.0, 10.0))
    with numpyro.plate("country", len(y)):
        numpyro.sample("y", dist.Normal(x @ jnp.stack([a, *rest]), sigma), obs=y)


def linear_model(x: Any, y: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 1000.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[-1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(alpha + x @ beta, sigma).to_event(1), obs=y)


def logistic_model(x: Any, y: Any, prior_scale: float) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[-1]), prior_scale).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ beta).to_event(1), obs=y)


def poisson_model(x: Any, y: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 5.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Poisson(jnp.exp(alpha + x @ beta)).to_event(1), obs=y)


def gaussian_process(w: Any, basis: Any, y: Any) -> None:
    sd = numpyro.sample("sd", dist.LogNormal(0.0, 1.0))
    ls = numpyro.sample("ls", dist.LogNormal(math.log(0.03), 0.5))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(w)), 1.0).to_event(1))
    spd = sd**2 * ls * jnp.exp(-0.5 * ls**2 * w**2)
    numpyro.sample("y", dist.Normal(basis @ (jnp.sqrt(spd) * z), 0.3).to_event(1), obs=y)


def lotka_volterra(y: Any) -> None:
    prior = dist.LogNormal(jnp.array(RATES_LOC), jnp.array(RATES_SCALE)).to_event(1)
    rates = numpyro.sample("rates", prior)
    first = dist.LogNormal(jnp.full(2, math.log(10.0)), 1.0).to_event(1)
    start = numpyro.sample("start", first)
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.full(2, -1.0), 1.0).to_event(1))
    years = populations(tuple(rates), tuple(start))
    mean = jnp.stack([jnp.stack(year) for year in years])
    log_mean = jnp.log(jnp.clip(mean, min=1e-30))
    numpyro.sample("y", dist.LogNormal(log_mean, sigma).to_event(2), obs=y)


def poisson_hierarchy(x: Any, y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("groups", len(y)):
        rate = numpyro.sample("log_rate", dist.Normal(mu + slope * x, sigma))
        numpyro.sample("y", dist.Poisson(jnp.exp(rate)), obs=y.astype(int))


def horseshoe_logistic(x: Any, y: Any) -> None:
    tau = numpyro.sample("tau", dist.HalfCauchy(0.1))
    columns = jnp.ones(x.shape[-1])
    lam = numpyro.sample("lam", dist.HalfCauchy(columns).to_event(1))
    z = numpyro.sample("z", dist.Normal(0.0 * columns, 1.0).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ (tau * lam * z)).to_event(1), obs=y)


def _peer(posterior: Posterior) -> tuple[Callable[..., None], tuple[Any, ...]]:
    args = [
        jnp.asarray(arg.numpy()) if isinstance(arg, torch.Tensor) else arg for arg in posterior.args
    ]
    return globals()[posterior.model.__name__], tuple(args)


def courses(posterior: Posterior, seed: int, guide: str) -> Iterator[tuple[float, float]]:
    """CPU seconds since the beginning and the ELBO (nats), after every chunk of steps of a guide's training."""
    begun, away = time.process_time(), 0.0
    model, args = _peer(posterior)
    is_wide = guide == "NumPyro IAF" and model.__name__ in MORE_THAN_32_LATENTS
    auto = GUIDES[f"{guide}, wide" if is_wide else guide](model)
    rate = lambda step: 0.5 * RATE * (1.0 + jnp.cos(jnp.pi * step / STEPS))  # noqa: E731
    svi = SVI(model, auto, numpyro.optim.Adam(rate), Trace_ELBO(num_particles=PARTICLES))
    judge = Trace_ELBO(num_particles=JUDGES)
    state = svi.init(jax.random.PRNGKey(seed), *args)

    @jax.jit
    def chunk(state: Any) -> Any:
        return lax.fori_loop(0, CHUNK, lambda _, now: svi.update(now, *args)[0], state)

    @jax.jit
    def elbo(params: Any) -> Any:
        return -judge.loss(jax.random.PRNGKey(1), params, model, auto, *args)

    for _ in range(STEPS // CHUNK):
        state = jax.block_until_ready(chunk(state))
        now = time.process_time()
        yield now - begun - away, float(elbo(svi.get_params(state)))
        away += time.process_time() - now


def nuts_seconds(posterior: Posterior, seed: int) -> float | None:
    """CPU seconds until the smallest effective sample size of NUTS is 400; None where it is not by 8,000 draws."""
    begun = time.process_time()
    model, args = _peer(posterior)
    numpyro.set_host_device_count(1)
    mcmc = MCMC(NUTS(model), num_warmup=WARMUP, num_samples=CHUNK, progress_bar=False)
    mcmc.warmup(jax.random.PRNGKey(seed), *args)
    draws: list[np.ndarray] = []
    while len(draws) * CHUNK < MAX_DRAWS:
        mcmc.run(jax.random.PRNGKey(seed + len(draws)), *args)
        values = [np.asarray(value).reshape(CHUNK, -1) for value in mcmc.get_samples().values()]
        draws.append(np.concatenate(values, axis=1))
        mcmc.post_warmup_state = mcmc.last_state
        if float(np.min(effective_sample_size(np.concatenate(draws)[None]))) >= ENOUGH:
            return time.process_time() - begun
    return None
