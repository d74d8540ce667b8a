"""The posteriors with a known evidence, and the program that measures guides on them."""

import pytest
import torch

from models import posteriors
from models._targets import targets
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.gaussian import Gaussian, best_gaussian, normal_draws
from pyro_flowkit.guides.latent_density import LatentDensity


@pytest.mark.filterwarnings("ignore:The spline flow of AutoSplineFlow ended")  # after two steps
def test_every_guide_trains_and_is_measured(capsys) -> None:
    table = posteriors.main(["--fast", "--seeds", "1", "--targets", "banana", "--guides", "all"])
    assert list(table["guide"]) == list(posteriors.GUIDES)
    assert table["ELBO"].map(torch.tensor).map(torch.isfinite).all()
    assert (table["gap"] + table["ELBO"]).abs().max() < 1e-12, "the banana's log evidence is 0"
    assert capsys.readouterr().out.count("banana") == len(table)


def test_a_loop_of_svi_trains_and_its_table_is_saved(tmp_path) -> None:
    path = tmp_path / "posteriors.md"
    settings = ["--fast", "--seeds", "1", "--targets", "funnel", "--loop"]
    table = posteriors.main([*settings, "--output", str(path)])
    assert table["steps"].tolist() == [2]
    assert "| funnel" in path.read_text() and "a loop of SVI" in path.read_text()


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
