"""Dequantisation and the logit, with their log-dets."""

import math

import pytest
import torch

from pyro_flowkit import dequantize, inverse_logit, logit


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_dequantize_stays_in_its_cell(dtype: torch.dtype) -> None:
    counts = torch.arange(17).repeat(400, 1).to(dtype)
    u, ladj = dequantize(counts, 17)
    assert u.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert ((u >= 0) & (u < 1)).all()
    assert torch.equal((u * 17).floor(), counts.to(u.dtype))
    assert torch.allclose(ladj, torch.full((400,), -17 * math.log(17), dtype=u.dtype))
    inside = u * 17 - counts
    assert inside.mean() == pytest.approx(0.5, abs=0.02)
    assert inside.std() == pytest.approx(12**-0.5, abs=0.02)


def test_dequantize_stays_in_the_cell_where_the_sum_rounds_up() -> None:
    counts = torch.full((20_000, 5), 65_534.0)
    u, _ = dequantize(counts, 65_536)
    assert torch.equal((u.double() * 65_536).floor(), counts.double())
    top, _ = dequantize(torch.full((20_000, 5), 255.0), 256)
    assert (top < 1).all()


def test_dequantize_draws_from_its_generator_alone() -> None:
    counts = torch.zeros(3, 2, dtype=torch.long)
    state = torch.get_rng_state()
    first, _ = dequantize(counts, 4, generator=torch.Generator().manual_seed(1))
    again, _ = dequantize(counts, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)


def test_density_of_dequantized_data_is_on_the_scale_of_the_integers() -> None:
    counts = torch.randint(0, 4, (50, 2))
    u, ladj = dequantize(counts, 4)
    uniform_on_unit_square = torch.zeros(50)
    assert torch.allclose(uniform_on_unit_square + ladj, torch.full((50,), -math.log(16.0)))
    assert u.shape == (50, 2)


@pytest.mark.parametrize(
    ("counts", "levels"),
    [
        (torch.tensor([[0, 4]]), 4),
        (torch.tensor([[-1, 2]]), 4),
        (torch.tensor([[0.5, 2.0]]), 4),
        (torch.tensor([[float("nan"), 2.0]]), 4),
        (torch.tensor(3), 4),
        (torch.tensor([[0, 1]]), 1),
        (torch.tensor([[0, 1]]), 4.0),
        (torch.tensor([[0, 1]]), True),
    ],
)
def test_dequantize_errors_say_expected_and_got(counts: torch.Tensor, levels) -> None:
    with pytest.raises(ValueError, match=r"Expected .* got"):
        dequantize(counts, levels)


def test_dequantize_empty_batch() -> None:
    u, ladj = dequantize(torch.zeros(0, 3, dtype=torch.long), 4)
    assert u.shape == (0, 3) and ladj.shape == (0,)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05])
def test_logit_log_det_is_the_jacobian_and_the_inverse_undoes_it(alpha: float) -> None:
    u = torch.linspace(0.01, 0.99, 12, dtype=torch.float64).reshape(4, 3)
    y, ladj = logit(u, alpha=alpha)
    for row, expected in zip(u, ladj, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: logit(v, alpha=alpha)[0], row)
        assert torch.linalg.slogdet(jacobian).logabsdet == pytest.approx(expected.item(), abs=1e-9)
    back, inverse_ladj = inverse_logit(y, alpha=alpha)
    assert torch.allclose(back, u, atol=1e-12)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-9)
    assert ladj.shape == (4,)


def test_logit_is_finite_at_the_ends() -> None:
    u = torch.tensor([[0.0, 1.0]])
    y, ladj = logit(u)
    assert torch.isfinite(y).all() and torch.isfinite(ladj).all()
    assert y[0, 0] == pytest.approx(-math.log(1e6), abs=0.1)
    back, _ = inverse_logit(y)
    assert torch.allclose(back, u, atol=1e-6)


def test_logit_keeps_the_dtype() -> None:
    assert logit(torch.rand(2, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert logit(torch.rand(2, 3))[1].dtype == torch.float32


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_logit_refuses_values_outside_the_unit_interval(value: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        logit(torch.tensor([[0.5, value]]))


@pytest.mark.parametrize("alpha", [-0.1, 0.5, float("nan")])
@pytest.mark.parametrize("function", [logit, inverse_logit])
def test_bad_alpha_is_refused(function, alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        function(torch.tensor([[0.5]]), alpha=alpha)
