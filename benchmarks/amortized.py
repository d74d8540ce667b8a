r"""AmortizedSplineFlow where the exact posterior is known: a linear-Gaussian hierarchy with a latent for every datum.

    mu ~ N(0, 10^2 I),   z_i ~ N(mu, L L^T),   x_i ~ N(W z_i, 0.7^2 I),   i = 1..N

with mu and z_i in two dimensions and x_i in three. The guide sees minibatches and conditions z_i on mu. With q for the
guide and p for the exact posterior, the gap of its ELBO is

    KL(q(mu) || p(mu | x)) + sum_i E_q(mu) KL(q(z_i | x_i, mu) || p(z_i | x_i, mu))

Both parts are printed, and how far the means and standard deviations of the z_i are off, in posterior standard
deviations. The runs: minibatches of 100, minibatches of 50, 100 and 150 in turn, and, with 1,000 data, a subsampled and
a whole plate, which should agree; these two for several seeds of parameters, noise and the order of the data.

Guides and training are left at their defaults: ``pyro_flowkit.fit`` by the guide's recipe, and for batches of varying
size a loop with the same optimizer and schedule, in which a batch is weighted by its size.

    python -m benchmarks.amortized
    python -m benchmarks.amortized --steps 1000 --seeds 1
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit import fit
from pyro_flowkit.guides import AmortizedSplineFlow

PRIOR_SD, NOISE_SD = 10.0, 0.7
LOADING = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-0.7, 0.3]], dtype=torch.float64)
TRIL = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
CENTRE = torch.tensor([1.5, -3.0], dtype=torch.float64)
JUDGED = 100  # rows whose local latents are compared
PAIRS = 64  # of draws per row and draw of mu


class Hierarchy:
    """The model, its data and its exact posterior (float64).

    Args:
        size: number of data.
        seed: of the data.
    """

    def __init__(self, size: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        z = CENTRE + torch.randn(size, 2, generator=generator, dtype=torch.float64) @ TRIL.mT
        noise = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        self.size = size
        self.x = z @ LOADING.mT + NOISE_SD * noise
        prior = TRIL @ TRIL.mT
        of_x = LOADING @ prior @ LOADING.mT + NOISE_SD**2 * torch.eye(3, dtype=torch.float64)
        weights = torch.linalg.solve(of_x, LOADING).mT
        precision = size * weights @ LOADING + torch.eye(2, dtype=torch.float64) / PRIOR_SD**2
        self.global_covariance = torch.linalg.inv(precision)
        self.global_mean = self.global_covariance @ weights @ self.x.sum(0)
        # z | x, mu ~ N(gain x + rest mu, covariance)
        of_mu = torch.linalg.inv(prior)
        self.covariance = torch.linalg.inv(of_mu + LOADING.mT @ LOADING / NOISE_SD**2)
        self.gain = self.covariance @ LOADING.mT / NOISE_SD**2
        self.rest = self.covariance @ of_mu

    def model(self, x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), PRIOR_SD).to_event(1))
        with pyro.plate("data", self.size, subsample_size=len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(mu, scale_tril=TRIL.to(x)))
            pyro.sample("x", dist.Normal(z @ LOADING.mT.to(x), NOISE_SD).to_event(1), obs=x)

    def global_posterior(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.global_mean, self.global_covariance)

    def local_posterior(self, x: Tensor, mu: Tensor) -> dist.MultivariateNormal:
        """Given mu of shape ``(*, 1, 2)``."""
        return dist.MultivariateNormal(x @ self.gain.mT + mu @ self.rest.mT, self.covariance)

    def local_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of z, over mu."""
        covariance = self.covariance + self.rest @ self.global_covariance @ self.rest.mT
        mean = x @ self.gain.mT + self.global_mean @ self.rest.mT
        return mean, covariance.diagonal().sqrt()


@dataclass(frozen=True)
class Errors:
    """How far a guide is from the exact posterior."""

    global_kl: float
    local_kl: float
    mean_error: float
    sd_error: float
    seconds: float


def encoder(x: Tensor) -> Tensor:
    return x


def train(
    hierarchy: Hierarchy, sizes: Sequence[int], steps: int, seed: int = 0
) -> AmortizedSplineFlow:
    """A guide after so many steps with minibatches of these sizes in turn.

    One size is left to :func:`pyro_flowkit.fit`, with the guide's own recipe; several take a loop of their own, with
    the same optimizer and schedule. There the loss is weighted by the size of the batch, so that every datum counts the
    same in a pass over the data: each batch stands for all of them, a small one with larger weights.

    Args:
        hierarchy: model and data.
        sizes: of the minibatches.
        steps: of Adam.
        seed: of parameters and noise.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x, model = hierarchy.x.float(), hierarchy.model
    guide = AmortizedSplineFlow(model, encoder, context_dim=3, condition_on_global=True)
    if len(sizes) == 1:
        fit(model, guide, data=x, batch_size=sizes[0], max_steps=steps, seed=seed, progress=False)
        return guide
    guide.setup(x[: sizes[0]])
    recipe, mean_size = guide.recipe(), sum(sizes) / len(sizes)
    optimizer = torch.optim.Adam(guide.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    elbo = Trace_ELBO(recipe.num_particles, vectorize_particles=True, max_plate_nesting=1)
    for batch in islice(_batches(x, sizes), steps):
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, batch)
        (loss / hierarchy.size * len(batch) / mean_size).backward()
        optimizer.step()
        schedule.step()
    return guide


def _batches(x: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Minibatches of these sizes in turn, in a new order at every pass over the data; the last may be smaller."""
    while True:
        rows = x[torch.randperm(len(x))]
        for size in cycle(sizes):
            if not len(rows):
                break
            yield rows[:size]
            rows = rows[size:]


@torch.no_grad()
def judge(hierarchy: Hierarchy, guide: AmortizedSplineFlow, seconds: float) -> Errors:
    """Compare a guide with the exact posterior."""
    pyro.set_rng_seed(1)
    x = hierarchy.x[:JUDGED]
    overall = guide.global_guide.get_posterior()
    mu = overall.sample((20_000,))
    global_kl = overall.log_prob(mu) - hierarchy.global_posterior().log_prob(mu.double())
    local_kl, total, squares = [], 0.0, 0.0
    draws = 100
    for given in mu[:draws]:
        posterior = guide.get_posterior(x.float(), given={"mu": given})
        z = posterior.sample((50,))
        log_q = posterior.log_prob(z)
        log_p = hierarchy.local_posterior(x, given.double()).log_prob(z.double())
        local_kl.append((log_q - log_p).mean())
        half = torch.randn(PAIRS, JUDGED, 2)
        z = torch.cat([half, -half])
        for transform in posterior.transforms:
            z = transform(z)
        z = z.double()
        total = total + z.mean(0) / draws
        squares = squares + z.square().mean(0) / draws
    mean, sd = hierarchy.local_moments(x)
    own_sd = (squares - total.square()).sqrt()
    return Errors(
        float(global_kl.mean()),
        float(torch.stack(local_kl).mean()),
        float(((total - mean) / sd).abs().mean()),
        float((own_sd / sd - 1).abs().mean()),
        seconds,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Errors]:
    """Train, print and return the errors of every run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--seeds", type=int, default=3, help="runs of either kind with 1,000 data")
    parser.add_argument("--output", default=RESULTS / "amortized.md", help="file to write")
    args = parser.parse_args(argv)
    large, small = Hierarchy(10_000), Hierarchy(1000)
    runs = [
        ("N = 10,000, batches of 100", large, (100,), 0),
        ("N = 10,000, batches of 50, 100, 150", large, (50, 100, 150), 0),
    ]
    for kind, sizes in (("batches of 100", (100,)), ("whole plate", (1000,))):
        for seed in range(args.seeds):
            runs.append((f"N = 1,000, {kind}, seed {seed}", small, sizes, seed))
    found: dict[str, Errors] = {}
    for name, hierarchy, sizes, seed in runs:
        begun = time.process_time()
        whole = sizes[0] == hierarchy.size  # without noise of minibatches fewer steps do
        guide = train(hierarchy, sizes, args.steps // 4 if whole else args.steps, seed)
        found[name] = judge(hierarchy, guide, time.process_time() - begun)
        print(name, found[name], flush=True)
    report = Report("AmortizedSplineFlow against an exact posterior")
    report.add(
        f"{args.steps} steps, a quarter of that for the whole plate. KL in nats; mean absolute errors of the local "
        "latents' means and standard deviations, in posterior standard deviations.",
        "",
    )
    report.add(*_table(found))
    report.save(args.output)
    return found


def _table(found: dict[str, Errors]) -> list[str]:
    header = ["run", "KL of mu", "KL per datum", "error of means", "error of sds", "CPU seconds"]
    rows = [
        [
            name,
            f"{errors.global_kl:.3f}",
            f"{errors.local_kl:.5f}",
            f"{errors.mean_error:.4f}",
            f"{errors.sd_error:.4f}",
            f"{errors.seconds:.0f}",
        ]
        for name, errors in found.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
