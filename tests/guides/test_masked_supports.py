"""Masked latents on bounded supports: log-dets of what the model keeps alone, by exact evidences in float32."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from pyro_flowkit.diagnostics import evidence_bounds
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow
from pyro_flowkit.training import fit

TINY = {"num_transforms": 2, "hidden_dims": [16, 16], "count_bins": 4}
KEEP = torch.tensor([True, False, True, False])
COUNTS = torch.tensor([[3.0, 0.0, 5.0], [1.0, 1.0, 1.0], [0.0, 4.0, 4.0], [9.0, 0.0, 0.0]])
HITS = torch.tensor([3.0, 0.0, 7.0, 9.0])


def shares(counts: Tensor, keep: Tensor) -> None:
    with pyro.plate("rows", 4), poutine.mask(mask=keep):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.5, 0.5, 2.0])))
        pyro.sample("x", dist.Multinomial(probs=p, validate_args=False), obs=counts)


def shares_evidence(counts: Tensor, keep: Tensor) -> float:
    prior = dist.DirichletMultinomial(torch.tensor([0.5, 0.5, 2.0]), counts.sum(-1))
    return float(prior.log_prob(counts)[keep].sum())


def rates(hits: Tensor, keep: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(torch.full((4,), 0.5), 2.0).mask(keep).to_event(1))
    pyro.sample("x", dist.Binomial(10, p).mask(keep).to_event(1), obs=hits)


def rates_evidence(hits: Tensor, keep: Tensor) -> float:
    prior = dist.BetaBinomial(torch.full((4,), 0.5), torch.tensor(2.0), 10)
    return float(prior.log_prob(hits)[keep].sum())


@pytest.mark.parametrize(
    ("model", "data", "exact", "size"),
    [
        pytest.param(shares, COUNTS, shares_evidence(COUNTS, KEEP), 4, id="dirichlet"),
        pytest.param(rates, HITS, rates_evidence(HITS, KEEP), 2, id="beta inside of an event"),
    ],
)
def test_evidence_is_that_of_the_kept_elements(model, data: Tensor, exact: float, size: int):
    guide = AutoSplineFlow(model, **TINY)
    fit(model, guide, args=(data, KEEP), max_steps=10, lr=1e-4, seed=0, progress=False)
    assert guide.latent_dim == size
    evidence = guide.evidence(data, KEEP, num_samples=2000, seed=0)
    assert evidence.elbo < exact + 4 * evidence.elbo_standard_error
    assert evidence.elbo > exact - 0.5
    assert evidence.log_evidence == pytest.approx(exact, abs=0.15)
    traced = evidence_bounds(model, guide, args=(data, KEEP), num_samples=2000, seed=0)
    assert float(traced.log_evidence) == pytest.approx(exact, abs=0.15)


def test_evidence_of_padded_rows_with_gamma_latents_is_that_of_the_others() -> None:
    counts = torch.tensor([2.0, 0.0, 5.0, 1.0, 3.0, 0.0, 4.0, 8.0])
    keep = torch.arange(8) < 5

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("rows", 8, subsample_size=len(x)), poutine.mask(mask=keep):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    guide = AmortizedSplineFlow(model, lambda x, keep: (1.0 + x).log()[:, None], context_dim=1)
    fit(model, guide, args=(counts, keep), max_steps=150, lr=1e-2, seed=0, progress=False)
    exact = float(dist.GammaPoisson(2.0, 1.0).log_prob(counts)[keep].sum())
    bounds = evidence_bounds(model, guide, args=(counts, keep), num_samples=2000, seed=0)
    assert float(bounds.elbo) < exact + 4 * float(bounds.elbo_se)
    assert float(bounds.elbo) > exact - 0.3
    assert float(bounds.log_evidence) == pytest.approx(exact, abs=0.1)


def calls(guide, *args: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(100):
            guide(*args)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("masked", [True, False])
def test_draws_at_the_edge_count_only_where_the_model_has_a_density(masked: bool) -> None:
    def model(keep: Tensor) -> None:
        with pyro.plate("rows", 2), poutine.mask(mask=keep):
            pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    start = init_to_value(values={"p": torch.tensor([0.5, 1e-40])})
    keep = torch.tensor([True, not masked])
    guide = AutoSplineFlow(model, init_loc_fn=start, **TINY).setup(keep)
    messages = calls(guide, keep)
    evidence_messages = calls(lambda keep: guide.evidence(keep, num_samples=10), keep)
    if masked:
        assert messages == []
    else:
        assert "'p' within the numbers of their dtype" in messages[0]
    assert any("'p' within" in message for message in evidence_messages) is not masked


@pytest.mark.parametrize("masked", [True, False])
def test_draws_of_rows_at_the_edge_count_only_where_the_model_has_a_density(masked: bool) -> None:
    def model(far: Tensor, keep: Tensor) -> None:
        with pyro.plate("rows", 2), poutine.mask(mask=keep):
            pyro.sample("p", dist.Beta(1.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=far)

    args = (torch.tensor([0.0, -200.0]), torch.tensor([True, not masked]))
    guide = AmortizedSplineFlow(model, lambda far, keep: far[:, None], context_dim=1, **TINY)
    guide.setup(*args)
    with torch.no_grad():
        guide.affine.weight[0, 0] = 1.0  # the location of a row is its feature
    messages = calls(guide, *args)
    if masked:
        assert messages == []
    else:
        assert "'p' within the numbers of their dtype" in messages[0]
