"""What a guide leaves out is found, whatever the way in which the guide is written; what is covered is no alarm."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide

from pyro_flowkit.diagnostics import diagnose, evidence_bounds, probe_modes
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.guide_density import log_guide
from pyro_flowkit.diagnostics.particles import draw_particles
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow


def tensor(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def squares():
    """Modes at 10 and -10, the posterior near each about N(+-10, 0.2)."""
    x = pyro.sample("x", dist.Normal(tensor(0.0), 10.0))
    pyro.sample("o", dist.Normal(x**2, 4.0), obs=tensor(100.0))


def one_mode():
    pyro.sample("x", dist.Normal(tensor(9.98), 0.2))


def both_modes():
    parts = dist.Normal(tensor(-9.98, 9.98), 0.2)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))


def trained(guide, loc, scale):
    guide()
    if isinstance(guide, autoguide.AutoNormal):
        guide.locs.x.data.fill_(loc)
        guide.scales.x = tensor(scale)
    elif isinstance(guide, AutoSplineFlow):
        guide.affine.restart(tensor([loc]), tensor([[scale]]))
    else:
        guide.loc.data.fill_(loc)
        guide.scale = torch.full_like(guide.scale, scale)
    return guide


GUIDES = {
    "written by hand": lambda: one_mode,
    "AutoNormal": lambda: trained(autoguide.AutoNormal(squares), 9.98, 0.2),
    "AutoDiagonalNormal": lambda: trained(autoguide.AutoDiagonalNormal(squares), 9.98, 0.2),
    "AutoMultivariateNormal": lambda: trained(autoguide.AutoMultivariateNormal(squares), 9.98, 0.2),
    "AutoSplineFlow": lambda: trained(AutoSplineFlow(squares), 9.98, 0.2),
}


@pytest.mark.parametrize("name", GUIDES)
def test_the_other_mode_is_found_for_guides_of_every_kind(name):
    guide = GUIDES[name]()
    store = set(pyro.get_param_store())
    state = torch.get_rng_state()
    probe = probe_modes(squares, guide)
    assert torch.equal(torch.get_rng_state(), state) and set(pyro.get_param_store()) == store
    assert probe.sizes["place"] == 2 and int(probe["count"].sum()) == 24
    shares = dict(zip(probe["where"].values, probe["missed"].values, strict=True))
    assert float(shares["x = -9.99"]) == pytest.approx(0.5, abs=0.05)
    assert min(shares.values()) < 1e-6
    # the log evidence of one mode is that of both less log 2
    assert float(probe["elbo"].max()) == pytest.approx(-6.023 - math.log(2), abs=0.1)
    bounds = evidence_bounds(squares, guide, seed=0)
    assert diagnose(bounds).level == "good" and diagnose(bounds).limits
    verdict = diagnose(bounds, probe=probe)
    assert verdict.level == "bad" and "around x = -9.99" in verdict.reason


def test_a_guide_of_anybodys_says_its_density():
    """Its latent follows from an auxiliary site, so that nothing but its own word has a density at given values."""

    class Guide(torch.nn.Module):
        def forward(self):
            shift = pyro.sample(
                "_shift", dist.Normal(tensor(0.0), 0.2), infer={"is_auxiliary": True}
            )
            pyro.sample("x", dist.Delta(9.98 + shift))

        def log_prob(self, values, *args, **kwargs):
            return dist.Normal(tensor(9.98), 0.2).log_prob(values["x"])

    shares = {float(missed) for missed in probe_modes(squares, Guide(), num_starts=6)["missed"]}
    assert max(shares) == pytest.approx(0.5, abs=0.05) and min(shares) < 1e-6


def test_an_amortised_guide_has_the_density_of_its_own_draws():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = tensor(0.5, 1.0, 2.0)
    settings = {"context_dim": 1, "num_transforms": 1, "hidden_dims": [4]}
    guide = AmortizedSplineFlow(model, lambda x: x[:, None], **settings).setup(x)
    with evaluation(model, guide, seed=0):
        (drawn,) = draw_particles(
            model, guide, (x,), {}, num_samples=5, chunk_size=5, whole_data=True
        )
        found = log_guide(drawn, guide, drawn.latents(), (x,), {})
    torch.testing.assert_close(found, drawn.log_guide(), rtol=1e-5, atol=1e-5)


def test_a_guide_with_both_modes_is_good_without_limits():
    probe = probe_modes(squares, both_modes)
    assert float(probe["missed"].max()) < 0.01
    verdict = diagnose(evidence_bounds(squares, both_modes, seed=0), probe=probe)
    assert verdict and not verdict.limits


def uniform(high):
    def program():
        pyro.sample("z", dist.Uniform(tensor(0.0, 0.0), tensor(1.0, high)).to_event(1))

    return program


def test_half_of_a_support_is_found():
    probe = probe_modes(uniform(1.0), uniform(0.5))
    assert float(probe["missed"].max()) == pytest.approx(0.5, abs=0.05)
    assert float(probe_modes(uniform(1.0), uniform(1.0))["missed"].max()) == 0.0


def hierarchy(data):
    scale = pyro.sample("scale", dist.HalfNormal(tensor(1.0)))
    with pyro.plate("rows", len(data)):
        loc = pyro.sample("loc", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(loc, 0.5 + scale), obs=data)


def test_plates_and_constrained_latents_have_their_density():
    """A narrow guide: the region that it leaves out is named with the values of both latents."""

    def guide(data):
        pyro.sample("scale", dist.LogNormal(tensor(-0.3), 0.1))
        with pyro.plate("rows", len(data)):
            pyro.sample("loc", dist.Normal(data / 2, 0.1))

    data = tensor(-1.0, 0.5, 2.0)
    probe = probe_modes(hierarchy, guide, args=(data,), num_starts=6)
    assert float(probe["missed"].max()) > 0.5
    assert all(
        where.startswith("scale = ") and "loc = [" in where for where in probe["where"].values
    )
    covering = autoguide.AutoNormal(hierarchy)
    covering(data)
    with torch.no_grad():
        covering.locs.scale.fill_(-0.5)
        covering.locs.loc.copy_(data / 2)
        for name in ("scale", "loc"):
            scale = getattr(covering.scales, name)
            setattr(covering.scales, name, torch.full_like(scale, 1.0))
    probe = probe_modes(hierarchy, covering, args=(data,), num_starts=6)
    assert float(probe["missed"].max()) < 0.01


def test_an_improper_prior_is_no_obstacle():
    def model():
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    probe = probe_modes(
        model, lambda: pyro.sample("loc", dist.Normal(torch.tensor(1.0), 1.0)), num_starts=6
    )
    assert float(probe["missed"].max()) == 0.0


def test_guides_without_a_density_at_given_values_are_refused():
    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("x", dist.Delta(u))

    with pytest.raises(ValueError, match="a guide whose density can be had at any values"):
        probe_modes(squares, guide, num_starts=3)
    with pytest.raises(ValueError, match="num_starts >= 1 and num_samples >= 100, got 0 and 1000"):
        probe_modes(squares, one_mode, num_starts=0)
