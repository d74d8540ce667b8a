"""What a heavy tail does to standard errors, and when a tail counts as light."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit.diagnostics.tails import Tail
from pyro_flowkit.ops.psis import error_factor, log_mean_error, unseen_share


def test_factor_runs_from_one_to_the_root_of_the_draws():
    k = torch.tensor([-0.5, 0.0, 0.2, 0.4999, 0.5, 0.5001, 0.7, 1.0, 1.5, math.inf, math.nan])
    factor = error_factor(k, 4000)
    assert factor.dtype == torch.float64
    assert (factor.diff() >= 0).all()
    assert factor[:2].tolist() == [1.0, 1.0]
    assert factor[7:].tolist() == [math.sqrt(4000)] * 4
    assert float(factor[2]) == pytest.approx(1.016, abs=1e-3)
    # the limit of the rate at 1/2 is 1 - 1 / log(S)
    assert float(factor[4]) == pytest.approx(math.exp(0.5), rel=5e-3)


@pytest.mark.parametrize("true_k", [0.3, 0.6])
def test_factor_makes_standard_errors_of_the_evidence_cover(true_k):
    """Weights N(0, 1) / N(0, 1 - k) in 3 dimensions, whose mean is 1."""
    torch.manual_seed(0)
    variance, scores, plain = 1 - true_k, [], []
    for _ in range(200):
        z = torch.randn(1000, 3, dtype=torch.float64)
        log_weight = (0.5 * (1 - variance) * z**2 + 0.5 * math.log(variance)).sum(-1)
        smoothed, tail = Tail.of(log_weight)
        log_mean = smoothed.logsumexp(-1) - math.log(1000)
        score = log_mean / log_mean_error(smoothed, log_mean)
        factor = error_factor(torch.tensor(tail.pareto_k), 1000)
        plain.append(float(score))
        scores.append(float(score / factor))
    scores, plain = torch.tensor(scores), torch.tensor(plain)
    assert float((scores.abs() > 4).double().mean()) < 0.02
    assert float(scores.square().mean().sqrt()) == pytest.approx(1.0, abs=0.3)
    assert float(plain.square().mean().sqrt()) > (1.5 if true_k > 0.5 else 0.9)


def test_pareto_k_is_as_uncertain_as_said():
    torch.manual_seed(0)
    z = torch.randn(200, 1000, dtype=torch.float64)
    tails = [Tail.of(0.3 * row**2)[1] for row in z]  # k = 0.6
    spread = torch.tensor([tail.pareto_k for tail in tails]).std()
    assert float(spread) == pytest.approx(tails[0].error, rel=0.3)


@pytest.mark.parametrize(
    ("k", "gap", "light"),
    [
        (-0.2, 5.0, True),
        (0.0, 5.0, True),
        (0.3, 5.0, True),
        (0.4, 5.0, False),
        (0.55, 0.2, True),
        (0.65, 0.2, False),
        (0.8, 0.0, False),
        (math.inf, 0.0, False),
        (0.4, math.inf, False),
    ],
)
def test_a_tail_is_light_if_it_surely_is(k, gap, light):
    assert Tail(4000, k, gap).is_light is light


def test_weights_that_hardly_differ_hide_nothing_whatever_their_pareto_k():
    torch.manual_seed(0)
    guide = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.03)
    z = guide.sample((4000,))
    log_weight = dist.StudentT(torch.tensor(30.0, dtype=torch.float64)).log_prob(
        z
    ) - guide.log_prob(z)
    _, tail = Tail.of(log_weight)
    assert tail.pareto_k > 1
    assert tail.largest_weight < 5 / 4000
    assert tail.hides_nothing and tail.is_light and not tail.is_hopeless


def test_a_weight_that_is_a_tenth_of_all_does_not_hide_nothing():
    log_weight = torch.zeros(4000, dtype=torch.float64)
    log_weight[:20] = torch.linspace(0.1, math.log(400.0), 20, dtype=torch.float64)
    _, tail = Tail.of(log_weight)
    assert tail.pareto_k > 1 and tail.is_hopeless and not tail.is_light


@pytest.mark.parametrize(
    ("k", "share"),
    [(-1.0, 0.005), (0.0, 0.01), (0.5, 0.02), (0.9, 0.1), (2.0, 0.1), (math.inf, 0.1)],
)
def test_what_is_unseen_is_a_tail_beyond_the_largest_weight(k, share):
    assert unseen_share(0.01, k) == pytest.approx(share)
