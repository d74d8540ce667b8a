"""Steps of NumPyro's flow guides on the same posteriors, compiled as a whole, for the comparison with ``fit``.

The flows have as many transforms, and hidden layers of the same widths; a block neural autoregressive flow has them in
multiples of the number of latents, of which the nearest is taken.
"""

from collections.abc import Callable
from typing import Any

from models._targets import Target


def numpyro_steps(
    name: str,
    problem: Target,
    num_particles: int,
    *,
    hidden_dims: list[int],
    num_transforms: int,
    lr: float,
) -> dict[str, Callable[[], object]]:
    """Steps by the name of the guide; every call waits for its result."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal

    arguments = [jnp.asarray(arg.float().numpy()) for arg in problem.args]
    model = {"eight schools": _eight_schools, "seeds": _seeds}[name]
    num_latents = sum(value.numel() for value in problem.start.values())
    factors = [max(1, round(width / num_latents)) for width in hidden_dims]
    guides = {
        "NumPyro AutoIAFNormal": AutoIAFNormal(
            model, num_flows=num_transforms, hidden_dims=hidden_dims
        ),
        "NumPyro AutoBNAFNormal": AutoBNAFNormal(
            model, num_flows=num_transforms, hidden_factors=factors
        ),
    }

    def made(guide: Any) -> Callable[[], object]:
        svi = SVI(model, guide, numpyro.optim.Adam(lr), Trace_ELBO(num_particles))
        state = svi.init(jax.random.PRNGKey(0), *arguments)
        update = jax.jit(svi.update)

        def step() -> None:
            nonlocal state
            state, loss = update(state, *arguments)
            jax.block_until_ready(loss)

        return step

    return {guide_name: made(guide) for guide_name, guide in guides.items()}


def _eight_schools(sigma: Any, y: Any) -> None:
    import numpyro
    import numpyro.distributions as dist

    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _seeds(x: Any, n: Any, r: Any) -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    a = numpyro.sample("a", dist.Normal(jnp.zeros(4), 10.0).to_event(1))
    tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
    with numpyro.plate("plate", len(n)):
        b = numpyro.sample("b", dist.Normal(0.0, tau**-0.5))
        numpyro.sample("r", dist.Binomial(n, logits=(a * x).sum(-1) + b), obs=r)
