"""What counts as rounding between two ways to the same densities, and what does not."""

import pytest
import torch

from pyro_flowkit.programs.agreement import MAX_GRADIENT_GAP, ROUNDINGS, disagreement, gradient_gap


def shifted(shift, dtype=torch.float32, rows=5):
    """The verdict on densities around -2 of which one is off by this many units in the last place."""
    alone = {"x": torch.full((rows,), -2.0, dtype=dtype)}
    other = {"x": alone["x"].clone()}
    other["x"][-1] += shift * 3.0 * torch.finfo(dtype).eps
    return disagreement(alone, other, lambda latents: alone, {"z": torch.zeros(1, dtype=dtype)})


@pytest.mark.parametrize("rows", [1, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limit_is_the_same_for_every_element_however_many_there_are(dtype, rows):
    # The two sides of the limit: ten times as tight or as loose and one of them fails.
    assert shifted(0.3 * ROUNDINGS, dtype, rows) is None
    message = shifted(3.0 * ROUNDINGS, dtype, rows)
    assert message is not None and message.startswith("site 'x' has another log-density")
    assert ROUNDINGS * torch.finfo(torch.float32).eps < 2e-4


def test_what_a_density_loses_to_rounding_by_itself_is_measured():
    def density(latents):
        return {"x": latents["z"] * 1e6 - 1e6}

    z = torch.tensor([1.0 + 2e-7])
    alone = density({"z": z})
    close = {"x": alone["x"] + 0.4}
    far = {"x": alone["x"] + 100.0}
    assert disagreement(alone, close, density, {"z": z}) is None
    assert disagreement(alone, far, density, {"z": z}) is not None


def test_missing_sites_and_other_shapes_are_named():
    alone = {"x": torch.zeros(2), "y": torch.zeros(2)}
    assert "['y']" in str(disagreement(alone, {"x": torch.zeros(2)}, lambda _: alone, {}))
    other = {"x": torch.zeros(2), "y": torch.zeros(2, 2)}
    assert "'y'" in str(disagreement(alone, other, lambda _: alone, {}))


def test_infinite_densities_agree_with_each_other_only():
    alone = {"x": torch.tensor([-torch.inf, 0.0])}
    assert disagreement(alone, {"x": alone["x"].clone()}, lambda _: alone, {}) is None
    other = {"x": torch.tensor([-1e30, 0.0])}
    assert disagreement(alone, other, lambda _: alone, {}) is not None


def test_a_derivative_may_be_off_by_a_hundredth_of_the_largest_and_by_no_more():
    def density(latents):
        return {"x": (latents["z"] * torch.tensor([3.0, 1.0])).sum(-1)}

    def gap(factor):
        return gradient_gap(
            density,
            lambda latents: {"x": factor * density(latents)["x"]},
            {"z": torch.ones(4, 2)},
            [],
        )

    # ten times as tight or as loose and one of them fails
    assert gap(1.0 + 0.3 * MAX_GRADIENT_GAP) is None
    assert "derivative by site 'z'" in str(gap(1.0 + 3.0 * MAX_GRADIENT_GAP))
    assert 3.0 * MAX_GRADIENT_GAP < 0.1
