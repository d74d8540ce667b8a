"""Programs that know nothing of the guide keep working when it takes the place of another."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.poutine.util import prune_subsample_sites

from models import drop_in
from models._drop_in_more import small_programs
from pyro_flowkit.guides import AutoSplineFlow

PROGRAMS = small_programs()


def latents_of(name: str) -> set[str]:
    """The unobserved sites of a program that are not summed out in its model."""
    program = PROGRAMS[name]
    trace = prune_subsample_sites(poutine.trace(program.model).get_trace(*program.args))
    nodes = {site: trace.nodes[site] for site in trace.stochastic_nodes}
    return {site for site, node in nodes.items() if not node["infer"].get("enumerate")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_with_the_guide_swapped(name) -> None:
    program = PROGRAMS[name]
    guide = program.guide(AutoSplineFlow)
    with torch.no_grad():
        assert set(guide(*program.args)) == latents_of(name)
        assert set(program.guide(AutoNormal)(*program.args)) == latents_of(name)
    part = guide[0] if program.discrete else guide
    assert isinstance(part, AutoSplineFlow)
    before = {key: p.detach().clone() for key, p in part.named_parameters()}
    drop_in.train(program, guide, steps=3, num_particles=2, lr=1e-3)
    still = {key for key, p in part.named_parameters() if torch.equal(p, before[key])}
    # what is below the diagonal of a matrix of one latent is nothing
    assert still <= ({"affine.raw_lower"} if part.latent_dim == 1 else set())
    value, error = drop_in.elbo(program, guide, draws=20)
    assert math.isfinite(value) and error > 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_one_elbo_vectorised_or_not(name) -> None:
    program = PROGRAMS[name]
    guide = program.guide(AutoDelta)  # without noise, every particle says the same
    alone, together = (program.elbo(n).loss(program.model, guide, *program.args) for n in (1, 3))
    assert math.isfinite(alone)
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_guide_in_the_place_of_auto_normal_gains() -> None:
    program, elbos = PROGRAMS["baseball, logit"], []
    for auto in (AutoNormal, AutoSplineFlow):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = program.guide(auto)
        drop_in.train(program, guide, steps=300, num_particles=8, lr=2e-2)
        elbos.append(drop_in.elbo(program, guide, draws=1000)[0])
    assert elbos[1] > elbos[0] + 1.0


def test_the_driver_prints_and_saves_a_row_for_every_program(capsys, tmp_path) -> None:
    path = tmp_path / "drop_in.md"
    table = drop_in.main(["--fast", "--programs", "base", "mix", "--output", str(path)])
    assert list(table["program"]) == ["baseball", "mixture"]
    assert list(table["D"]) == [20, 6]
    assert list(table["objective"]) == ["Trace_ELBO", "TraceEnum_ELBO"]
    assert table["difference"].map(math.isfinite).all()
    assert capsys.readouterr().out.count("difference") >= 2
    assert path.read_text().count("_ELBO)") == 2
