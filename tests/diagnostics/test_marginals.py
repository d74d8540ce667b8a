"""Shifts and scale ratios of weighted draws, where both are known."""

import math

import pytest
import torch

from pyro_flowkit.diagnostics.marginals import MAX_LATENTS, Columns, moved


def draws(loc, scale, size=40_000, seed=0):
    """Draws of N(loc, scale) and their log weights for N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    z = loc + scale * noise
    return z, 0.5 * noise**2 - 0.5 * z**2


@pytest.mark.parametrize(("loc", "scale"), [(0.3, 1.0), (0.0, 0.8), (0.0, 1.3), (-0.2, 0.9)])
@pytest.mark.parametrize("values", [lambda z: z, torch.exp, lambda z: z.sinh() ** 3])
def test_shift_and_scale_are_found_in_any_coordinates(loc, scale, values):
    z, log_weights = draws(loc, scale)
    found = moved(values(z)[:, None], log_weights)
    assert float(found["shift"]) == pytest.approx(loc / scale, abs=4 * float(found["shift_se"]))
    error = math.log(float(found["scale_ratio"]) / scale)
    assert abs(error) < 4 * float(found["scale_ratio_se"]) + 0.01
    assert float(found["shift_se"]) < 0.02 and float(found["scale_ratio_se"]) < 0.02


def test_errors_cover_the_spread_over_seeds():
    results = [moved(z[:, None], w) for z, w in (draws(0.2, 0.9, 2000, s) for s in range(60))]
    for name, error in (("shift", "shift_se"), ("scale_ratio", "scale_ratio_se")):
        values = torch.cat([result[name] for result in results])
        values = values.log() if name == "scale_ratio" else values
        said = torch.cat([result[error] for result in results]).mean()
        assert 0.5 < float(values.std() / said) < 1.15


def test_equal_weights_move_nothing_and_have_no_error():
    z, _ = draws(0.0, 1.0, 500)
    found = moved(z[:, None], torch.full((500,), -3.0, dtype=torch.float64))
    assert float(found["shift"].abs()) < 1e-12 and float(found["shift_se"]) < 1e-12
    assert float(found["scale_ratio"]) == pytest.approx(1.0)
    assert float(found["scale_ratio_se"]) < 1e-12


def test_ties_are_no_shift():
    z, _ = draws(0.0, 1.0, 1000)
    found = moved((z > 0).double()[:, None], torch.zeros(1000, dtype=torch.float64))
    assert float(found["shift"].abs()) < 1e-12


def test_columns_are_named_and_limited():
    columns = Columns()
    latents = {"a": torch.zeros(3), "b": torch.arange(12.0).reshape(3, 2, 2)}
    columns.add(latents)
    columns.add(latents)
    assert columns.labels == ["a", "b[0, 0]", "b[0, 1]", "b[1, 0]", "b[1, 1]"]
    assert columns.values().shape == (6, 5)
    many = Columns()
    many.add({"z": torch.arange(5000.0).repeat(2, 1)})
    assert len(many.labels) == MAX_LATENTS == many.values().shape[1]
    assert many.labels[0] == "z[0]" and many.labels[-1] == "z[4999]"
    assert many.labels == [f"z[{int(i)}]" for i in many.values()[0]]
