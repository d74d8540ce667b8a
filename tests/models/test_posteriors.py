"""The posteriors with a known evidence, and the program that measures guides on them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from models import _terrain, posteriors
from models._nuts import NUM_CHAINS, errors, run_nuts
from models._targets import Target, targets
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.gaussian import Gaussian, best_gaussian
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.ops.quasi_random import normal_draws


@pytest.mark.filterwarnings("ignore:The spline flow of AutoSplineFlow ended")  # after two steps
def test_every_guide_trains_and_is_measured(capsys) -> None:
    table = posteriors.main(["--fast", "--seeds", "1", "--targets", "banana", "--guides", "all"])
    assert list(table["guide"]) == [*posteriors.GUIDES, "NUTS"]
    guides = table[table["guide"] != "NUTS"]
    assert guides["ELBO"].map(torch.tensor).map(torch.isfinite).all()
    assert (guides["gap"] + guides["ELBO"]).abs().max() < 1e-12, "the banana's log evidence is 0"
    assert guides[["r_hat", "ESS", "divergences"]].isna().all(axis=None)
    of_nuts = table.iloc[-1]
    assert of_nuts[["ELBO", "se", "gap", "pareto k"]].isna().all()
    assert table[["mean error", "sd error"]].notna().all(axis=None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "banana" in line]
    assert len(lines) == len(table) and "ELBO" not in lines[-1]


def test_table_of_nuts_and_guides_says_where_there_is_no_number(tmp_path) -> None:
    path = tmp_path / "posteriors.md"
    settings = ["--fast", "--seeds", "1", "--targets", "funnel", "--output", str(path)]
    posteriors.main([*settings, "--guides", "AutoDiagonalNormal", "NUTS"])
    header, _, guide, nuts = [line for line in path.read_text().splitlines() if line[:1] == "|"]
    cells = dict(zip(_cells(header), zip(_cells(guide), _cells(nuts), strict=True), strict=True))
    assert cells["guide"] == ("AutoDiagonalNormal", "NUTS")
    for column in ("ELBO", "gap", "pareto k"):
        assert cells[column][0] != "-" and cells[column][1] == "-"
    assert cells["r_hat"][0] == cells["divergences"][0] == "-"
    assert "not fair" in path.read_text()


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_loop_of_svi_trains_and_its_table_is_saved(tmp_path) -> None:
    path = tmp_path / "posteriors.md"
    settings = ["--fast", "--seeds", "1", "--targets", "funnel", "--loop"]
    table = posteriors.main([*settings, "--output", str(path)])
    assert table["steps"].tolist() == [2]
    assert "| funnel" in path.read_text() and "a loop of SVI" in path.read_text()
    assert "r_hat" not in path.read_text()


@pytest.mark.parametrize(
    "name", [name for name in targets() if name != "seeds"]
)  # which takes several seconds
def test_best_gaussian_of_a_target_is_the_known_one(name) -> None:
    target = targets()[name]
    guide = AutoSplineFlow(target.model).setup(*target.args)
    density = LatentDensity(target.model, guide, target.args)
    start = Gaussian(guide.affine.loc.detach(), guide.affine.scale.detach())
    found = best_gaussian(density, start)
    elbo = found.elbo(density, normal_draws(4096, start.loc, seed=7))
    assert elbo < target.log_evidence
    assert elbo == pytest.approx(target.gaussian_elbo, abs=0.12)


def two_normals(zero: torch.Tensor) -> None:
    pyro.sample("x", dist.Normal(3.0 + zero, 2.0))
    pyro.sample("y", dist.LogNormal(zero, 0.5))


def target_of_two_normals() -> Target:
    return Target(two_normals, (torch.zeros((), dtype=torch.float64),), 0.0, None, {})


def test_nuts_draws_the_posterior_in_unconstrained_space() -> None:
    chains = run_nuts(target_of_two_normals(), seconds=60.0, steps=80, seed=0)
    assert chains.draws.shape == (NUM_CHAINS, 80, 2)
    assert not torch.equal(chains.draws[0], chains.draws[1])
    exact = torch.randn(5000, 2) * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, 0.0])
    found = errors(chains.draws.flatten(0, 1), exact)
    assert found["mean error"] < 0.4 and found["sd error"] < 0.4
    numbers = chains.numbers()
    assert 0.98 < numbers["r_hat"] < 1.15
    assert 20 < numbers["ESS"] < 1000
    assert numbers["divergences"] < 10


def test_nuts_that_does_not_end_its_warm_up_in_time_has_no_numbers() -> None:
    chains = run_nuts(target_of_two_normals(), seconds=0.02, steps=None, seed=0)
    assert chains.draws.shape[1] == 0
    assert chains.numbers() == {} == errors(chains.draws.flatten(0, 1), torch.randn(9, 2))


def test_errors_are_in_posterior_standard_deviations() -> None:
    exact = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    centre = exact.mean(0)
    draws = centre + 1.25 * (exact - centre) + torch.tensor([0.0, -0.5]) * exact.std(0)
    assert errors(draws, exact) == pytest.approx({"mean error": 0.5, "sd error": 0.25}, abs=1e-5)


def test_terrain_has_the_evidence_and_the_posterior_that_importance_sampling_finds() -> None:
    target = targets()["terrain"]
    guide = AutoSplineFlow(target.model).setup(*target.args)
    guide.find_start(target.model, target.args)
    evidence = guide.evidence(*target.args, num_samples=10_000, seed=0)
    assert abs(evidence.log_evidence - target.log_evidence) < 4 * evidence.standard_error < 0.02
    drawn = guide.resample(5000, *target.args, num_proposals=20_000, seed=0)
    exact = target.exact_draws(5000)
    assert set(exact) == {*_terrain.COEFFICIENTS, "sigma"} == set(drawn)
    found = errors(*(torch.stack([of[name] for name in exact], -1) for of in (drawn, exact)))
    assert found["mean error"] < 0.08 and found["sd error"] < 0.08


def test_terrain_is_the_same_at_every_call_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = _terrain.data(), _terrain.data()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (170, 4) and first[1].dtype == torch.float64


@pytest.mark.parametrize("name", ["funnel", "banana", "terrain"])
def test_exact_draws_have_the_shapes_of_the_latents(name) -> None:
    target = targets()[name]
    draws = target.exact_draws(7)
    assert {site: value.shape for site, value in draws.items()} == {
        site: (7, *value.shape) for site, value in target.start.items()
    }
