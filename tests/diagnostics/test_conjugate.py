"""Conjugate linear regression: evidence, LOO and posterior are known, and every number is held against them."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_flowkit.diagnostics import (
    compare_guides,
    diagnose,
    from_svi,
    loo_approximate_posterior,
    reweight,
    to_arviz,
)
from pyro_flowkit.guides import AutoSplineFlow

NUM_DATA, DIM, PRIOR_SD, NOISE_SD = 40, 3, 2.0, 1.0


@dataclass(frozen=True)
class Regression:
    """y ~ N(x beta, 1), beta ~ N(0, 2^2): everything about it in closed form."""

    x: Tensor
    y: Tensor

    @staticmethod
    def simulate(correlation: float, seed: int = 0) -> "Regression":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        common = math.sqrt(correlation) * normal(NUM_DATA, 1)
        x = common + math.sqrt(1 - correlation) * normal(NUM_DATA, DIM)
        y = x @ torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64) + NOISE_SD * normal(NUM_DATA)
        return Regression(x, y)

    def model(self) -> None:
        zero = torch.zeros(DIM, dtype=torch.float64)
        beta = pyro.sample("beta", dist.Normal(zero, PRIOR_SD).to_event(1))
        with pyro.plate("data", NUM_DATA):
            pyro.sample("y", dist.Normal((beta * self.x).sum(-1), NOISE_SD), obs=self.y)

    @property
    def precision(self) -> Tensor:
        return self.x.T @ self.x / NOISE_SD**2 + torch.eye(DIM).double() / PRIOR_SD**2

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        covariance = self.precision.inverse()
        return covariance @ self.x.T @ self.y / NOISE_SD**2, covariance

    @property
    def marginal(self) -> Tensor:
        return NOISE_SD**2 * torch.eye(NUM_DATA).double() + PRIOR_SD**2 * self.x @ self.x.T

    @property
    def log_evidence(self) -> float:
        zero = torch.zeros(NUM_DATA, dtype=torch.float64)
        return float(dist.MultivariateNormal(zero, self.marginal).log_prob(self.y))

    @property
    def loo(self) -> Tensor:
        """log p(y_i | y_-i) of a Gaussian vector, from its precision matrix."""
        precision = self.marginal.inverse()
        variance = 1 / precision.diagonal()
        residual = precision @ self.y * variance
        return dist.Normal(0.0, variance.sqrt()).log_prob(residual)

    @property
    def p_loo(self) -> float:
        mean, covariance = self.posterior
        variance = NOISE_SD**2 + (self.x @ covariance * self.x).sum(-1)
        with_all = dist.Normal(self.x @ mean, variance.sqrt()).log_prob(self.y)
        return float((with_all - self.loo).sum())

    @property
    def mean_field_kl(self) -> float:
        """KL of the best factorised Gaussian, whose variances are 1 / the diagonal of the precision."""
        return 0.5 * float(self.precision.diagonal().log().sum() - self.precision.logdet())


def mean_field(problem: Regression) -> AutoDiagonalNormal:
    """The optimum, without training."""
    guide = AutoDiagonalNormal(problem.model)
    guide()
    guide.loc.data, guide.scale = (
        problem.posterior[0].clone(),
        problem.precision.diagonal().rsqrt(),
    )
    return guide


def full_rank(problem: Regression) -> AutoMultivariateNormal:
    guide = AutoMultivariateNormal(problem.model)
    guide()
    mean, covariance = problem.posterior
    root = torch.linalg.cholesky(covariance)
    guide.loc.data, guide.scale = mean.clone(), root.diagonal().clone()
    guide.scale_tril = root / root.diagonal().unsqueeze(-1)
    return guide


def under_trained_flow(problem: Regression) -> AutoSplineFlow:
    guide = AutoSplineFlow(problem.model)
    svi = SVI(problem.model, guide, Adam({"lr": 0.03}), Trace_ELBO(16, vectorize_particles=True))
    for _ in range(12):
        svi.step()
    return guide


GUIDES = {
    "mean field": mean_field,
    "full rank": full_rank,
    "under-trained flow": under_trained_flow,
}


@pytest.fixture(scope="module")
def problem() -> Regression:
    return Regression.simulate(correlation=0.5)


def tree_of(problem: Regression, name: str, **options: object) -> xr.DataTree:
    options = {"num_samples": 2000, "seed": 0} | options
    return from_svi(problem.model, GUIDES[name](problem), **options)


def loo_numbers(elpd: object) -> tuple[float, float]:
    """The sum and the effective number of parameters, in either ArviZ."""
    old = hasattr(elpd, "elpd_loo")
    return (elpd.elpd_loo, elpd.p_loo) if old else (elpd.elpd, elpd.p)


def recorded(function, *args, **kwargs):
    """The result, or None where it is refused, and whether something was said about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = function(*args, **kwargs)
        except ValueError as error:
            assert "pareto k" in str(error)
            return None, True
    return result, any("pareto k" in str(warning.message).lower() for warning in said)


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_within_its_error_or_carries_a_warning(problem, name, seed):
    tree = tree_of(problem, name, seed=seed)
    bounds, verdict = tree["vi_diagnostics"].to_dataset(), diagnose(tree)
    close = 1e-9
    doubted = verdict.level != "good"

    error = float(bounds["log_evidence"]) - problem.log_evidence
    assert abs(error) < 4 * float(bounds["log_evidence_se"]) + close or doubted
    assert float(bounds["elbo"]) < problem.log_evidence + 4 * float(bounds["elbo_se"]) + close
    for bound, bound_se in zip(bounds["iwae"], bounds["iwae_se"], strict=True):
        assert float(bound) < problem.log_evidence + 4 * float(bound_se) + close

    elpd, warned = recorded(loo_approximate_posterior, tree)
    assert warned == elpd.warning
    assert abs(loo_numbers(elpd)[0] - float(problem.loo.sum())) < 4 * elpd.mcse or warned
    assert abs(loo_numbers(elpd)[1] - problem.p_loo) < 4 * elpd.mcse or warned

    corrected, warned = recorded(reweight, tree, seed=seed)
    if corrected is not None:
        import arviz

        draws = corrected["posterior"]["beta"].values[0]
        mcse = np.asarray(arviz.mcse(to_arviz(corrected))["beta"])
        mcse = mcse * corrected["posterior"].attrs["mcse_factor"]
        assert (np.abs(draws.mean(0) - problem.posterior[0].numpy()) < 4 * mcse).all() or warned


def test_the_right_guide_needs_no_warning(problem):
    tree = tree_of(problem, "full rank")
    assert diagnose(tree).level == "good"
    assert float(tree["vi_diagnostics"]["log_evidence"]) == pytest.approx(problem.log_evidence)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elpd, corrected = loo_approximate_posterior(tree), reweight(tree, seed=0)
    assert not elpd.warning
    assert corrected["posterior"].attrs["mcse_factor"] == 1.0
    # every draw once, as it was: the weights are equal
    np.testing.assert_array_equal(
        corrected["sample_stats"]["guide_draw"].values[0], np.arange(2000)
    )


def test_the_gap_of_the_mean_field_guide_is_its_divergence(problem):
    tree = tree_of(problem, "mean field", exact_log_evidence=problem.log_evidence)
    bounds = tree["vi_diagnostics"].to_dataset()
    assert abs(float(bounds["gap"]) - problem.mean_field_kl) < 4 * float(bounds["elbo_se"])
    assert 0.1 < problem.mean_field_kl < 0.5
    assert diagnose(tree).level != "good"


def test_loo_that_takes_guide_draws_for_posterior_draws_is_wrong_and_the_corrected_is_not():
    """A guide of half the posterior's scale: the tails are there, so that the weights are light."""
    import arviz

    problem = Regression.simulate(correlation=0.5)
    mean, covariance = problem.posterior
    wide = dist.MultivariateNormal(mean, 6.0 * covariance)

    def guide() -> None:
        pyro.sample("beta", wide)

    tree = from_svi(problem.model, guide, num_samples=4000, seed=0)
    exact = float(problem.loo.sum())
    elpd, warned = recorded(loo_approximate_posterior, tree)
    assert not warned
    assert abs(loo_numbers(elpd)[0] - exact) < 4 * elpd.mcse < 0.5
    assert abs(loo_numbers(elpd)[1] - problem.p_loo) < 4 * elpd.mcse
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = arviz.loo(to_arviz(tree))
    assert abs(loo_numbers(raw)[0] - exact) > 10 * elpd.mcse

    corrected = reweight(tree, seed=1)
    covered = np.cov(corrected["posterior"]["beta"].values[0].T)
    np.testing.assert_allclose(covered, covariance.numpy(), atol=0.1 * float(covariance.max()))
    again = arviz.loo(to_arviz(corrected), reff=1.0)
    assert abs(loo_numbers(again)[0] - exact) < 4 * elpd.mcse


def gaussian_toy(kl: float, dim: int) -> tuple:
    """A posterior N(0, R), equal correlations, whose best factorised guide has KL ``kl`` nats."""

    def divergence(correlation: float) -> float:
        ratio = correlation / (1 - correlation + correlation * dim)  # of the precision
        precision_diagonal = (1 - ratio) / (1 - correlation)
        log_det = (dim - 1) * math.log(1 - correlation) + math.log1p((dim - 1) * correlation)
        return 0.5 * (dim * math.log(precision_diagonal) + log_det)

    low, high = 0.0, 1.0 - 1e-9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < kl else (low, middle)
    covariance = torch.full((dim, dim), low, dtype=torch.float64).fill_diagonal_(1.0)
    target = dist.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), covariance)
    scale = target.precision_matrix.diagonal().rsqrt()

    def model() -> None:
        pyro.sample("z", target)

    def mean_field_guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    # a trained guide is never exact: its location is off by a hundredth of a standard deviation
    near = dist.MultivariateNormal(target.loc + 0.01, covariance * 1.01**2)

    def full_rank_guide() -> None:
        pyro.sample("z", near)

    return model, mean_field_guide, full_rank_guide


@pytest.mark.parametrize("dim", [2, 10])
@pytest.mark.parametrize("seed", range(10))
def test_a_guide_one_nat_off_is_bad_and_one_nearly_right_is_not(dim, seed):
    model, mean_field_guide, full_rank_guide = gaussian_toy(1.0, dim)
    assert diagnose(from_svi(model, mean_field_guide, seed=seed)).level == "bad"
    assert diagnose(from_svi(model, full_rank_guide, seed=seed)).level == "good"
    model, mean_field_guide, full_rank_guide = gaussian_toy(0.02, dim)
    assert diagnose(from_svi(model, mean_field_guide, seed=seed)).level != "bad"
    assert diagnose(from_svi(model, full_rank_guide, seed=seed)).level == "good"


def test_guides_are_told_apart_in_one_table(problem):
    trees = {name: tree_of(problem, name) for name in GUIDES}
    table = compare_guides(trees)
    assert table.index[0] == "full rank"
    assert list(table["verdict"])[0] == "good" and "good" not in list(table["verdict"])[1:]
    assert abs(table.loc["mean field", "gap"] - problem.mean_field_kl) < (
        4 * table.loc["mean field", "gap_se"]
    )
    assert table.loc["full rank", "ess"] == pytest.approx(2000)
    other = {"other data": tree_of(Regression.simulate(0.5, seed=1), "full rank")}
    with pytest.raises(
        ValueError, match="different observed_data in 'mean field' and 'other data'"
    ):
        compare_guides(trees | other)


def test_the_verdict_returns_what_arviz_diagnose_returns(problem, capsys):
    good, bad = tree_of(problem, "full rank"), tree_of(problem, "under-trained flow")
    has_errors, diagnostics = diagnose(good, return_diagnostics=True)
    assert has_errors is False
    checks = {"unseen", "spread", "shift", "scale"}
    assert set(diagnostics) == {"pareto_k", "gap", "ess", "verdict"} | checks
    assert diagnostics["ess"]["total_samples"] == 2000
    assert diagnose(good) and not diagnose(bad)
    assert diagnose(bad, return_diagnostics=True)[0] is True
    assert capsys.readouterr().out == ""
    diagnose(bad, show_diagnostics=True)
    assert capsys.readouterr().out.startswith("bad: the guide's")


def test_an_elbo_above_the_exact_evidence_is_no_good_guide(problem):
    tree = tree_of(problem, "full rank")
    bounds = tree["vi_diagnostics"].to_dataset()
    verdict = diagnose(bounds.assign(exact_log_evidence=bounds["elbo"] - 1.0))
    assert verdict.level == "bad" and "above the exact log evidence" in verdict.reason
    assert diagnose(bounds.assign(exact_log_evidence=bounds["elbo"] - 0.01)).level == "good"
    with pytest.raises(ValueError, match="finite exact_log_evidence, got nan"):
        diagnose(bounds.assign(exact_log_evidence=np.nan))


def test_missing_values_of_the_same_data_are_the_same(problem):
    tree = tree_of(problem, "full rank")
    observed = xr.Dataset({"y": ("row", [1.0, np.nan])})
    tree["observed_data"] = xr.DataTree(observed)
    assert len(compare_guides({"a": tree, "b": tree.copy()})) == 2


def test_the_data_of_the_installed_arviz_are_taken_as_trees(problem):
    tree = tree_of(problem, "full rank")
    data = to_arviz(tree)
    assert diagnose(data) == diagnose(tree)
    assert compare_guides({"a": data}).equals(compare_guides({"a": tree}))
    assert reweight(data, seed=0)["posterior"].equals(reweight(tree, seed=0)["posterior"])
    assert loo_approximate_posterior(data).mcse == loo_approximate_posterior(tree).mcse
