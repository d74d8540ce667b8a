"""Masked local latents of an amortised guide, with masks that differ from batch to batch, by exact evidences."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_flowkit.diagnostics import evidence_bounds
from pyro_flowkit.guides import AmortizedSplineFlow
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training import fit

TINY = {"num_transforms": 2, "hidden_dims": [16, 16], "count_bins": 4}
SIZE = 20
X = torch.linspace(-1.5, 2.0, SIZE)
KEEP = torch.arange(SIZE) % 2 == 0


def padded(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("rows", SIZE, subsample_size=len(x)), poutine.mask(mask=keep):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def padded_evidence() -> float:
    return float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(X[KEEP]).sum())


LOADINGS = torch.tensor([1.0, 0.5, -0.8])
TABLE = torch.tensor([0.7, -1.2, 0.4, 1.5])[:, None] * LOADINGS + torch.tensor([0.2, -0.3, 0.1])
CELLS = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()


def cells(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("rows", 4, subsample_size=len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3, dim=-2):
            mean = z * LOADINGS[:, None]
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x.mT, obs_mask=seen.mT)


def cells_evidence() -> float:
    covariance = LOADINGS[:, None] * LOADINGS + 0.25 * torch.eye(3)
    return sum(
        float(dist.MultivariateNormal(torch.zeros(len(x[m])), covariance[m][:, m]).log_prob(x[m]))
        for x, m in zip(TABLE, CELLS, strict=True)
    )


def rows_and_masks(x: Tensor, keep: Tensor) -> Tensor:
    shape = (len(x), -1)
    return torch.cat([(x * keep).reshape(shape), keep.reshape(shape).float()], -1)


def make_guide(model, encoder=rows_and_masks, *, context_dim: int = 2) -> AmortizedSplineFlow:
    return AmortizedSplineFlow(model, encoder, context_dim=context_dim, plate="rows", **TINY)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_fit_of_padded_rows_ends_at_the_evidence_of_the_others(batch_size: int | None) -> None:
    guide = make_guide(padded)
    data = {"args": (X, KEEP)} if batch_size is None else {"data": (X, KEEP)}
    fit(
        padded, guide, **data, batch_size=batch_size, max_steps=200, lr=1e-2, seed=0, progress=False
    )
    bounds = evidence_bounds(padded, guide, args=(X, KEEP), num_samples=2000, seed=0)
    assert float(bounds.elbo) < padded_evidence() + 4 * float(bounds.elbo_se)
    assert float(bounds.elbo) > padded_evidence() - 0.2
    assert float(bounds.log_evidence) == pytest.approx(padded_evidence(), abs=0.03)


@pytest.mark.parametrize("vectorize", [True, False])
def test_plain_loop_on_padded_rows_ends_at_the_evidence_of_the_others(vectorize: bool) -> None:
    guide = make_guide(padded)
    particles = 8 if vectorize else 1
    elbo = Trace_ELBO(particles, vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(padded, guide, pyro.optim.ClippedAdam({"lr": 0.02}), elbo)
    for _ in range(200):
        svi.step(X, KEEP)
    bounds = evidence_bounds(padded, guide, args=(X, KEEP), num_samples=2000, seed=0)
    assert float(bounds.elbo) < padded_evidence() + 4 * float(bounds.elbo_se)
    assert float(bounds.elbo) > padded_evidence() - 0.6


def test_mask_that_differs_within_a_row_leaves_a_bound() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            return self.layers(rows_and_masks(x, seen))

    torch.manual_seed(0)
    guide = make_guide(cells, Encoder(), context_dim=16)
    elbo = Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(cells, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(200):
        svi.step(TABLE, CELLS)
    bounds = evidence_bounds(cells, guide, args=(TABLE, CELLS), num_samples=4000, seed=0)
    assert float(bounds.elbo) < cells_evidence() + 4 * float(bounds.elbo_se)
    assert float(bounds.elbo) > cells_evidence() - 0.5
    assert float(bounds.log_evidence) == pytest.approx(cells_evidence(), abs=0.1)


@torch.no_grad()
def test_log_density_of_a_padded_batch_is_that_of_its_other_rows() -> None:
    guide = perturb_(make_guide(padded).setup(X, KEEP), 0.1)
    for keep in (KEEP, X > 0, torch.zeros_like(KEEP), torch.ones_like(KEEP)):
        trace = poutine.trace(guide).get_trace(X, keep)
        posterior = guide.get_posterior(X, keep)
        z = trace.nodes["z"]["value"]
        expected = posterior.log_prob(z[:, None])[keep].sum()
        assert float(trace.log_prob_sum()) == pytest.approx(float(expected), abs=1e-3)


@torch.no_grad()
def test_rows_that_the_model_draws_have_the_masks_of_these_rows() -> None:
    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=6) as rows, poutine.mask(mask=keep[rows]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])

    guide = make_guide(model).setup(X, KEEP)
    for _ in range(5):
        trace = poutine.trace(guide).get_trace(X, KEEP)
        rows = trace.nodes["rows"]["value"]
        mask = trace.nodes["_AmortizedSplineFlow_latent"]["mask"]
        assert torch.equal(mask, KEEP[rows])


@torch.no_grad()
def test_reading_the_masks_leaves_the_callers_random_numbers_alone() -> None:
    guide = make_guide(padded).setup(X, KEEP)
    torch.manual_seed(0)
    with_masks = guide(X, KEEP)["z"]
    torch.manual_seed(0)
    expected = guide.get_posterior(X, KEEP).sample()
    assert torch.allclose(with_masks, expected.squeeze(-1), atol=1e-5)


def test_copies_know_the_masks_and_a_pickle_without_its_model_says_that_it_does_not() -> None:
    guide = make_guide(padded).setup(X, KEEP)
    assert copy.deepcopy(guide)(X, KEEP)["z"].shape == (SIZE,)
    with pytest.raises(RuntimeError, match=r"masked latents \(z\) to know its model"):
        pickle.loads(pickle.dumps(guide))(X, KEEP)


def test_masked_global_latent_beside_local_ones() -> None:
    keep = torch.tensor([True, False])

    def model(x: Tensor) -> None:
        scales = pyro.sample("t", dist.LogNormal(torch.zeros(2), 0.5).mask(keep).to_event(1))
        with pyro.plate("rows", SIZE):
            z = pyro.sample("z", dist.Normal(0.0, scales[..., :1]))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AmortizedSplineFlow(
        model, lambda x: x[:, None], context_dim=1, condition_on_global=True, **TINY
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(X) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert guide.global_guide.latent_dim == 1
    assert guide.median(X)["t"].shape == (2,)
