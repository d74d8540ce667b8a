"""Bijections onto supports: their log-dets, their small values in float32, and that they are PyTorch's functions."""

import math

import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowkit.guides.bijections import smallest
from pyro_flowkit.guides.supports import bijection_to

BIJECTIONS = {
    "positive": (constraints.positive, (3,)),
    "bounded below": (constraints.greater_than(2.0), (3,)),
    "bounded above": (constraints.less_than(torch.tensor([0.0, 1.0, -3.0])), (3,)),
    "interval": (constraints.interval(torch.tensor([-1.0, 0.0, 2.0]), 3.0), (3,)),
    "half open interval": (constraints.half_open_interval(-2.0, 0.0), (3,)),
    "simplex": (constraints.simplex, (4,)),
    "corr_cholesky": (constraints.corr_cholesky, (6,)),
    "corr_matrix": (constraints.corr_matrix, (6,)),
    "cat": (constraints.cat([constraints.positive, constraints.real], dim=0), (2,)),
    "stack": (constraints.stack([constraints.positive, constraints.real], dim=0), (2, 3)),
    "lower_cholesky": (constraints.lower_cholesky, (6,)),
    "positive_definite": (constraints.positive_definite, (6,)),
}
MATRICES = {"corr_cholesky": -1, "corr_matrix": -1, "lower_cholesky": 0, "positive_definite": 0}


@pytest.mark.parametrize("name", BIJECTIONS)
def test_log_det_is_that_of_the_jacobian(name) -> None:
    support, shape = BIJECTIONS[name]
    transform = bijection_to(support)
    x = torch.linspace(-1.0, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)

    def free(x: Tensor) -> Tensor:
        y = transform(x)
        if name == "simplex":
            return y[..., :-1]
        if name in MATRICES:
            rows, columns = torch.tril_indices(*y.shape[-2:], MATRICES[name])
            return y[rows, columns]
        return y

    jacobian = torch.autograd.functional.jacobian(free, x).reshape(x.numel(), x.numel())
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y).sum()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(transform.inv(y), x)
    assert transform.inverse_shape(y.shape) == x.shape
    assert bool(support.check(y).all())


@pytest.mark.parametrize("name", sorted(set(BIJECTIONS) - {"lower_cholesky", "positive_definite"}))
def test_bijections_are_pytorchs_functions(name) -> None:
    """So that NeuTra and guides of Pyro's, which go by its registry, mean the same by unconstrained values."""
    support, shape = BIJECTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(5, *shape, dtype=torch.float64)
    if name in ("cat", "stack"):
        x = x[0]
    ours, theirs = bijection_to(support), biject_to(support)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(
        ours.log_abs_det_jacobian(x, ours(x)), theirs.log_abs_det_jacobian(x, theirs(x))
    )


@pytest.mark.parametrize("name", ["simplex", "corr_cholesky", "interval at 0"])
def test_small_values_keep_their_digits_in_float32(name) -> None:
    support, x = {
        "simplex": (constraints.simplex, torch.tensor([-30.0, 20.0, -25.0])),
        "corr_cholesky": (constraints.corr_cholesky, torch.tensor([15.0, -20.0, 16.0])),
        "interval at 0": (constraints.unit_interval, torch.tensor([-70.0, -30.0])),
    }[name]
    transform = bijection_to(support)
    x.requires_grad_()
    y = transform(x)
    precise = transform(x.double())
    torch.testing.assert_close(y.double(), precise, rtol=1e-4, atol=0.0)
    log_det = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(
        log_det.double(), transform.log_abs_det_jacobian(x.double(), precise)
    )
    (gradient,) = torch.autograd.grad(y.clamp(min=smallest(y.dtype)).log().sum() + log_det.sum(), x)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(transform.inv(y.detach()), x.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "support", [constraints.positive, constraints.unit_interval, constraints.simplex]
)
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_values_stop_at_the_last_number_with_finite_gradients(support, far) -> None:
    transform = bijection_to(support)
    x = torch.full((2,), far, requires_grad=True)
    y = transform(x)
    density = 3.0 * y.log().sum() + transform.log_abs_det_jacobian(x, y).sum()
    (gradient,) = torch.autograd.grad(density, x)
    assert bool(density.isfinite()) and bool(gradient.isfinite().all())
    assert bool(support.check(y).all())
    assert bool(transform.at_edge(y).any())
