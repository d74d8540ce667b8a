"""Linear layers and permutations: start, state and what they refuse."""

import math

import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.affine import Affine


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_affine_starts_at_its_location_and_scale(kind):
    transform = Affine(torch.tensor([12.0, -40.0]), 0.1, kind)
    y, ladj = transform.call_and_ladj(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(y, torch.tensor([12.1, -40.1]))
    assert ladj.item() == pytest.approx(2 * math.log(0.1), abs=1e-6)


def test_affine_moves_faster_than_other_layers_under_adam():
    moved = {}
    for rate in (1.0, 10.0):
        transform = Affine(torch.zeros(2), 1.0, rate=rate)
        optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
        (transform(torch.ones(2)) - 5.0).square().sum().backward()
        optimizer.step()
        moved[rate] = transform.loc.abs().min().item()
    assert moved[10.0] == pytest.approx(10 * moved[1.0], rel=1e-3)


def test_a_full_affine_map_reaches_any_covariance():
    transform = perturb_(Affine(torch.zeros(3), 1.0), 0.05)
    matrix = torch.autograd.functional.jacobian(transform, torch.zeros(3))
    assert torch.equal(matrix, matrix.tril())
    assert (matrix.diagonal() > 0).all()
    assert (matrix.tril(-1).abs().sum(-1)[1:] > 0).all()


def test_lu_linear_is_the_product_of_the_factors_in_its_parameter():
    transform = perturb_(T.lu_linear(4)).double()
    lu = transform.lu.detach()
    lower = lu.tril(-1) + torch.eye(4)
    upper = lu.triu(1) + lu.diagonal().exp().diag()
    x = torch.randn(3, 4, dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(y, x @ (lower @ upper).mT + transform.bias)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(lower @ upper).logabsdet.expand(3))


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_a_restarted_affine_map_is_the_one_given_and_moves_in_its_units(kind):
    transform = perturb_(Affine(torch.zeros(3), 1.0, kind), 0.05)
    loc, diagonal = torch.tensor([3.0, -1.0, 2e3]), torch.tensor([1e-3, 1.0, 1e3])
    scale = diagonal.diag() if kind == "full" else diagonal
    transform.restart(loc, scale)
    torch.testing.assert_close(transform.loc.detach(), loc)
    torch.testing.assert_close(transform.scale.detach(), diagonal.diag())
    optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
    (transform(torch.zeros(3)) / diagonal).sum().backward()
    optimizer.step()
    torch.testing.assert_close((transform.loc - loc).detach(), -0.1 * diagonal, rtol=1e-2, atol=0)


def test_a_low_rank_affine_map_correlates_and_knows_its_inverse():
    transform = perturb_(Affine(torch.zeros(20), 1.0, "low_rank"), 0.01).double()
    scale = transform.scale
    off_diagonal = scale - scale.diagonal().diag()
    assert torch.linalg.matrix_rank(scale - transform._diagonal(scale.dtype).diag()) == 8
    assert off_diagonal.abs().max() > 1e-3
    x = torch.randn(5, 20, dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(scale)[1].expand(5))


def test_lu_linear_is_a_full_matrix():
    transform = perturb_(T.lu_linear(4)).double()
    matrix = torch.autograd.functional.jacobian(transform, torch.zeros(4, dtype=torch.float64))
    assert (matrix != 0).all()


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_standardization_gives_the_data_mean_zero_and_scale_one(kind):
    data = torch.randn(500, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 7.0
    transform = T.Standardization(3).double()
    transform.fit(data, kind)
    z = transform.inv(data)
    assert z.mean(0).abs().max() <= 1e-10
    torch.testing.assert_close(z.std(0), torch.ones(3, dtype=torch.float64))
    if kind == "full":
        torch.testing.assert_close(z.mT.cov(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (torch.zeros(5, 2), "diagonal", r"shape \(n, 3\) .* got shape \(5, 2\)"),
        (torch.zeros(1, 3), "diagonal", r"n >= 2, got shape \(1, 3\)"),
        (torch.full((5, 3), math.nan), "diagonal", "NaN or inf in 5 of 5 rows"),
        (torch.ones(5, 3), "diagonal", r"constant columns \[0, 1, 2\]"),
        (torch.ones(5, 3), "full", "singular"),
        (torch.randn(5, 3), "lower", "got 'lower'"),
    ],
)
def test_standardization_refuses_what_it_cannot_fit(data, kind, message):
    with pytest.raises(ValueError, match=message):
        T.Standardization(3).fit(data, kind)


def test_permutations_follow_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    assert torch.equal(T.permute(8).permutation, T.permute(8).permutation)
    assert not torch.equal(T.permute(8).permutation, T.permute(8, seed=1).permutation)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        (torch.tensor([0, 1]), "permutation of 3 dimensions, got 2"),
        (torch.tensor([0, 1, 1]), r"permutation of 0 to 2, got \[0, 1, 1\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "integer tensor .* got dtype torch.float32"),
        (torch.zeros(3, 3).long(), r"got dtype torch.int64 and shape \(3, 3\)"),
    ],
)
def test_what_is_no_permutation_is_refused(permutation, message):
    with pytest.raises(ValueError, match=message):
        T.permute(3, permutation)


@pytest.mark.parametrize(("permutation", "sign"), [([0, 1, 2], 1), ([1, 0, 2], -1), ([1, 2, 0], 1)])
def test_the_sign_of_a_permutation(permutation, sign):
    assert T.permute(3, torch.tensor(permutation)).sign == sign
    assert T.Compose([T.permute(3, torch.tensor(permutation)), T.spline(3)]).sign == sign
