"""Several starts: a mode that the first start does not lead to is found, and modes of comparable mass are said."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit import fit
from pyro_flowkit.deadline import Deadline
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.gaussian import Gaussian
from pyro_flowkit.guides.modes import comparable, modes

TINY = {"num_transforms": 2, "hidden_dims": [8]}


def two_bumps(heights, at, scale=0.3):
    """Log-density of a mixture on the line, with these log masses."""
    centre, mass = torch.tensor(at), torch.tensor(heights)

    def density(points):
        bumps = dist.Normal(centre, scale).log_prob(points)
        return torch.logsumexp(bumps + mass, -1)

    return density


def test_modes_are_ordered_by_mass_and_counted_once():
    density = two_bumps([-1.0, 0.0, -9.0], [-5.0, 5.0, 20.0])
    starts = [torch.tensor([x]) for x in (-4.0, 21.0, 4.0, 6.0, -6.0)]
    found = modes(density, starts, 0.1, deadline=Deadline())
    assert [round(float(mode.gaussian.loc)) for mode in found] == [5, -5, 20]
    assert [mode.elbo for mode in found] == pytest.approx([0.0, -1.0, -9.0], abs=0.1)
    assert len(comparable(found)) == 2


def test_one_ridge_is_one_mode():
    def banana(points):
        x, y = points.unbind(-1)
        return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x.square(), 0.3).log_prob(y)

    starts = [torch.tensor([x, x * x]) for x in (-1.5, -0.5, 0.0, 0.7, 1.5)]
    assert len(comparable(modes(banana, starts, 0.1, deadline=Deadline()))) == 1


def square():
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("o", dist.Normal(x**2, 4.0), obs=torch.tensor(100.0))


def test_two_modes_of_one_mass_are_said_with_their_values():
    guide = AutoSplineFlow(square, **TINY)
    with pytest.warns(UserWarning, match="2 separate modes .* x = .*9.99 .ELBO -6.7.* x = .*9.99"):
        fit(square, guide, max_steps=5, progress=False)
    assert guide.evidence(seed=0).elbo == pytest.approx(-6.715, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_the_larger_mode_is_found_from_a_draw_of_the_prior(seed):
    """The origin and the medians lead to a mode with a hundred-thousandth of the mass."""
    pyro.set_rng_seed(seed)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 3.0))
        bumps = torch.stack(
            [
                dist.Normal(0.0, 0.2).log_prob(x) - 11.5,
                dist.Normal(4.0, 0.3).log_prob(x),
            ]
        )
        pyro.factor("bumps", torch.logsumexp(bumps, 0) - dist.Normal(0.0, 3.0).log_prob(x))

    guide = AutoSplineFlow(model, **TINY)
    fit(model, guide, max_steps=5, progress=False)
    assert guide.median()["x"].item() == pytest.approx(4.0, abs=0.1)
    assert guide.evidence(seed=0).elbo == pytest.approx(0.0, abs=0.01)


def test_who_says_where_to_start_is_not_overruled():
    from pyro.infer.autoguide import init_to_value

    guide = AutoSplineFlow(
        square, init_loc_fn=init_to_value(values={"x": torch.tensor(9.0)}), **TINY
    )
    fit(square, guide, max_steps=5, progress=False)
    assert guide.median()["x"].item() == pytest.approx(10.0, abs=0.1)


def test_the_diagonal_kind_of_a_gaussian_is_kept():
    found = modes(two_bumps([0.0], [2.0]), [torch.zeros(1)], 0.1, deadline=Deadline())
    assert isinstance(found[0].gaussian, Gaussian)
    assert found[0].gaussian.scale.shape == (1,)
