"""The diffusion: right answers for fields that are known, its bounds by brute force, and its program."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from models.diffusion import AngleField, Diffusion, main
from models.diffusion.bounds import elbo_terms
from models.diffusion.model import Step, angle_of, level_ratios
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training import fit

VARIANCE = torch.tensor([2.0, 0.3], dtype=torch.float64)


class GaussianField(nn.Module):
    """The expected v of data from a normal with the variances ``VARIANCE``."""

    def forward(self, z: Tensor, angle: Tensor) -> Tensor:
        return self.slope(angle) * z

    def slope(self, angle: Tensor) -> Tensor:
        marginal = angle.cos() ** 2 * VARIANCE + angle.sin() ** 2
        return angle.sin() * angle.cos() * (1 - VARIANCE) / marginal


class BiasedField(nn.Module):
    """What is right for standard normal data, and a bias that grows with the noise."""

    def forward(self, z: Tensor, angle: Tensor) -> Tensor:
        return 0.3 * angle.tan().clamp(0.0, 100.0).expand_as(z)


@pytest.fixture
def exact() -> Diffusion:
    return Diffusion(2, GaussianField()).double().eval()


def rows(n: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(n, 2, dtype=torch.float64) * VARIANCE.sqrt()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def test_with_the_exact_score_flow_and_limit_are_the_datas_density(exact: Diffusion) -> None:
    x = rows(100)
    want = dist.Normal(0.0, VARIANCE.sqrt()).to_event(1).log_prob(x)
    torch.testing.assert_close(exact.log_prob(x), want, atol=1e-4, rtol=0)
    limit = elbo_terms(exact, x, None, draws=8)
    error = float(limit.mc_error.square().sum().sqrt()) / len(x)
    assert error < 0.1
    # beyond the last level, a log ratio of 10, and before the first there is nothing of note
    assert abs(float((limit.elbo - want).mean())) < 4 * error + 1e-3


@pytest.mark.parametrize("num_levels", [5, 50])
def test_the_bound_of_fixed_scales_has_its_closed_form(exact: Diffusion, num_levels: int) -> None:
    x = rows(40)
    found = elbo_terms(exact, x, num_levels, fitted_scales=False, draws=200)
    log_snr = level_ratios(num_levels).double()
    angle = angle_of(log_snr).unsqueeze(-1)
    slope = GaussianField().slope(angle)
    # v - E v = (cos - slope sin) noise - (sin + slope cos) x
    of_noise, of_x = angle.cos() - slope * angle.sin(), angle.sin() + slope * angle.cos()
    squares = of_noise**2 + of_x**2 * x.unsqueeze(1) ** 2
    snr = log_snr.exp()
    denoising = squares[:, 1:].sum(-1) * angle[1:, 0].sin() ** 2  # |x - denoised|^2
    want = -0.5 * ((snr[:-1] - snr[1:]) * denoising).sum(-1)
    want += (-0.5 * squares[:, 0] - 0.5 * math.log(2 * math.pi) - angle[0].sin().log()).sum(-1)
    last = dist.Normal(angle[-1].cos() * x, angle[-1].sin())
    want -= torch.distributions.kl_divergence(last, dist.Normal(torch.zeros_like(x), 1.0)).sum(-1)
    error = found.mc_error.clamp(min=1e-3)
    assert float(((found.elbo - want) / error).abs().max()) < 5
    assert abs(float(((found.elbo - want) / error).mean())) < 5 / math.sqrt(len(x))


@pytest.mark.parametrize("fitted_scales", [True, False])
def test_the_terms_add_up_to_the_elbo_of_model_and_guide(fitted_scales: bool) -> None:
    torch.manual_seed(0)
    field = perturb_(AngleField(2, [8, 8]), 0.3)
    data = torch.tensor([3.0, -1.0]) + torch.randn(200, 2) * torch.tensor([2.0, 0.5])
    diffusion = Diffusion(2, field).standardize(data, "full").fit_scales(data).double().eval()
    x = data[:1].double().expand(4000, 2)
    with torch.no_grad():
        inferred = poutine.trace(diffusion.guide).get_trace(x, 3)
        replayed = poutine.replay(diffusion.model, inferred)
        generated = poutine.trace(replayed).get_trace(x, 3, fitted_scales)
        for trace in (inferred, generated):
            trace.compute_log_prob()
    names = ("x", "z1", "z2", "z3")
    sites = [generated.nodes[name]["log_prob"] for name in names]
    drawn, error = mean_and_error(
        sum(sites) - sum(inferred.nodes[name]["log_prob"] for name in names[1:])
    )
    terms = elbo_terms(diffusion, x, 3, fitted_scales=fitted_scales)
    found, own_error = mean_and_error(terms.elbo)
    assert abs(found - drawn) < 4 * math.hypot(error, own_error)
    assert own_error < 0.02 * abs(found)


def test_the_bound_is_below_the_density_of_its_own_chain_at_all_levels(exact: Diffusion) -> None:
    exact.fit_scales(rows(5000))
    x = rows(2000, seed=1)
    for num_levels in (3, 10):
        log_snr = level_ratios(num_levels).double()
        variance = torch.ones(2, dtype=torch.float64)  # of each level of the chain, which is linear
        for level in range(num_levels - 1, 0, -1):
            step = Step(log_snr[level - 1], log_snr[level])
            angle = step.upper_angle
            denoising = angle.cos() - angle.sin() * GaussianField().slope(angle)
            spread = exact.spread_at(log_snr[level])
            variance = (step.of_z + step.of_x * denoising) ** 2 * variance + step.variance(spread)
        angle = angle_of(log_snr[0])
        denoising = angle.cos() - angle.sin() * GaussianField().slope(angle)
        variance = denoising**2 * variance + angle.sin() ** 2
        own = dist.Normal(0.0, variance.sqrt()).to_event(1).log_prob(x)
        gap, error = mean_and_error(own - elbo_terms(exact, x, num_levels, draws=20).elbo)
        assert gap > -4 * error
        assert gap < 0.5


def test_where_the_score_is_biased_the_bound_is_above_the_flows_density() -> None:
    """They are densities of two models: the bound is one of the chain alone."""
    diffusion = Diffusion(1, BiasedField(), num_steps=256).double().eval()
    x = torch.randn(1000, 1, dtype=torch.float64)
    with torch.no_grad():
        of_flow = diffusion.log_prob(x)
    limit = elbo_terms(diffusion, x, None, draws=8)
    difference, error = mean_and_error(limit.elbo - of_flow)
    # the flow moves all draws by 0.3 times the integral of the tangent; the bound loses the square of the bias
    stop = math.atan(100.0)
    moved = 0.3 * (-math.log(math.cos(stop)) + 100.0 * (math.pi / 2 - stop))
    lost = 0.3**2 * 5.0  # the integral of cot * tan^2 to the last level, whose cosine is exp(-5)
    assert difference > 4 * error
    assert abs(difference - (moved**2 / 2 - lost)) < 4 * error + 0.1


def test_it_is_trained_by_fit_and_fitted_scales_suit_few_levels() -> None:
    torch.manual_seed(0)
    side = torch.randint(0, 2, (1000, 1)).float() * 4 - 2
    data = torch.cat([side, torch.zeros(1000, 1)], -1) + 0.3 * torch.randn(1000, 2)
    diffusion = Diffusion(2, AngleField(2, [32, 32]), num_steps=8).standardize(data)
    before = float(diffusion.log_prob(data[:300]).mean().detach())
    fit(
        diffusion,
        data=data,
        max_steps=400,
        batch_size=200,
        lr=0.01,
        scheduler="cosine",
        seed=0,
        progress=False,
    )
    diffusion.eval()
    with torch.no_grad():
        assert float(diffusion.log_prob(data[:300]).mean()) > before + 0.5
    diffusion.fit_scales(data)
    fixed, fitted = (
        float(elbo_terms(diffusion, data, 10, fitted_scales=choice).elbo.mean())
        for choice in (False, True)
    )
    assert fitted > fixed + 1.0


def test_spreads_are_those_of_the_grid_and_between() -> None:
    diffusion = Diffusion(2, AngleField(2, [4]))
    assert torch.equal(diffusion.spread_at(torch.tensor([-10.0, 3.3, 10.0])), torch.ones(3, 2))
    diffusion.spread[:, 0] = torch.arange(41.0)
    found = diffusion.spread_at(torch.tensor([-10.0, -9.75, 0.0, 10.0]))[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 20.0, 40.0]))


@pytest.mark.parametrize("name", ["digits", "two-moons"])
def test_the_program_puts_all_on_the_same_rows(name: str, tmp_path, capsys) -> None:
    picture = tmp_path / "ladder.png"
    options = ["--alone", "--small-angles"] if name == "two-moons" else []
    result = main([name, "--fast", "--levels", "3", "5", "--figure", str(picture), *options])
    assert picture.stat().st_size > 20_000
    table = result.table
    others = {"flow matching", "spline flow", "Gaussian"} - set(table.index.get_level_values(0))
    assert others == (set() if name == "digits" else {"flow matching", "spline flow", "Gaussian"})
    assert {scores.sizes["obs_id"] for scores in result.scores.values()} == {20}
    printed = " ".join(capsys.readouterr().out.split())
    for (model, quantity), row in table.iterrows():
        shown = f"{row['nats']:.3f} ({row['se']:.3f})"
        assert f"{model} {quantity} {row['kind']} {shown}" in printed
    own = table.loc[("diffusion as a flow", "log p"), "bits_per_dim"]
    assert math.isnan(own) == (name != "digits")
    drawn, terms = (table.loc[(f"diffusion, 3 levels{end}", "ELBO")] for end in (" drawn", ""))
    assert abs(drawn["nats"] - terms["nats"]) < 5 * math.hypot(drawn["mc_se"], terms["mc_se"])


def test_what_makes_no_bound_is_refused(exact: Diffusion) -> None:
    with pytest.raises(ValueError, match="at least 2 levels, got 1"):
        elbo_terms(exact, rows(3), 1)
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        elbo_terms(exact, rows(3), 10, draws=1)
