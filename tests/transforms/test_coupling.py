"""Couplings: which dimension depends on which, masks, and what they refuse."""

import math

import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit.testing import perturb_


def jacobian(transform, input_dim, seed=0):
    x = torch.randn(input_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.functional.jacobian(transform.double(), x)


def dependence(transform, input_dim):
    """Which output depends on which input, anywhere."""
    return sum(jacobian(transform, input_dim, seed).abs() for seed in range(5)) > 0


def test_the_mask_says_what_passes_through():
    mask = torch.tensor([False, True, False, True])
    depends = dependence(perturb_(T.spline_coupling(4, mask=mask)), 4)
    for i in range(4):
        for j in range(4):
            expected = i == j or (bool(mask[j]) and not bool(mask[i]))
            assert bool(depends[i, j]) == expected, (i, j)


def test_split_dim_passes_the_first_dimensions_and_a_mask_overrides_it():
    assert T.spline_coupling(5).mask.tolist() == [True, True, False, False, False]
    assert T.spline_coupling(5, 3).mask.tolist() == [True, True, True, False, False]
    mask = torch.tensor([False, False, False, False, True])
    assert torch.equal(T.spline_coupling(5, 3, mask=mask).mask, mask)


def test_identity_leaves_the_passed_through_part_alone_and_the_default_does_not():
    x = torch.randn(10, 4)
    assert torch.equal(perturb_(T.spline_coupling(4, identity=True))(x)[:, :2], x[:, :2])
    assert not torch.equal(perturb_(T.spline_coupling(4))(x)[:, :2], x[:, :2])


def test_iterated_couplings_mix_every_input_into_every_output():
    transform = perturb_(T.iterated(4, T.spline_coupling, 4, hidden_dims=[16]), 0.3)
    assert dependence(transform, 4).all()
    assert dependence(transform.inv, 4).all()


def test_iterated_conditional_couplings_mix_every_input_and_the_context():
    transform = perturb_(T.iterated(4, T.conditional_spline_coupling, 4, 2, hidden_dims=[16]), 0.3)
    transform = transform.double()
    context = torch.randn(2, dtype=torch.float64)
    assert dependence_of_conditioned(transform, context).all()
    x = torch.zeros(4, dtype=torch.float64)
    by_context = torch.autograd.functional.jacobian(lambda c: transform.condition(c)(x), context)
    assert (by_context != 0).all()


def dependence_of_conditioned(transform, context):
    f = transform.condition(context)
    xs = torch.randn(5, 4, dtype=torch.float64)
    return sum(torch.autograd.functional.jacobian(f, x).abs() for x in xs) > 0


def test_iterated_keeps_a_mask_that_is_given():
    mask = torch.tensor([True, False, False])
    for options in ({"mask": mask}, {"split_dim": 1}):
        transform = T.iterated(2, T.spline_coupling, 3, **options)
        assert all(torch.equal(part.mask, mask) for part in transform.parts)


def test_iterated_takes_pyros_helpers_too():
    import pyro.distributions.transforms as pyro_transforms

    planar = T.iterated(2, pyro_transforms.planar, 3)
    assert type(planar).__name__ == "ComposeTransformModule" and len(planar.parts) == 2
    conditional = T.iterated(2, pyro_transforms.conditional_planar, 3, 2)
    assert type(conditional).__name__ == "ConditionalComposeTransformModule"


@pytest.mark.parametrize("repeats", [0, 1.5, True])
def test_iterated_refuses_bad_repeats(repeats):
    with pytest.raises(ValueError, match="repeats .* got"):
        T.iterated(repeats, T.spline_coupling, 3)


def test_infinite_passed_through_values_leave_the_rest_finite():
    transform = perturb_(T.spline_coupling(4, residual=True, hidden_dims=[8, 8]), 0.3)
    for f in (transform.call_and_ladj, transform.inverse_and_ladj):
        y, ladj = f(torch.tensor([math.inf, -math.inf, 0.5, -0.5]))
        assert y[:2].tolist() == [math.inf, -math.inf]
        assert y[2:].isfinite().all() and ladj.isfinite()


def test_one_dimension_has_a_live_spline():
    transform = T.spline_coupling(1)
    x = torch.linspace(-2, 2, 9)[:, None]
    transform(x).square().sum().backward()
    assert sum(p.grad.abs().sum() for p in transform.parameters()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_dim": 0}, "split_dim between 1 and input_dim - 1 = 3, got 0"),
        ({"split_dim": 4}, "split_dim between 1 and input_dim - 1 = 3, got 4"),
        ({"mask": torch.ones(3).bool()}, r"shape \(4,\), got dtype torch.bool and shape \(3,\)"),
        ({"mask": torch.ones(4)}, "bool tensor .* got dtype torch.float32"),
        ({"mask": torch.ones(4).bool()}, "at least one dimension to transform, got 4 of 4"),
        ({"mask": torch.zeros(4).bool()}, "at least one dimension through .* got 0 of 4"),
        ({"order": "linear"}, 'order="quadratic", got .linear.'),
        ({"hidden_dims": []}, r"hidden_dims .* got \[\]"),
        ({"count_bins": 2000}, r"2000 \* 0.001 = 2"),
        ({"dropout": -0.1}, r"dropout in \[0, 1\), got -0.1"),
        ({"tails": "none"}, "tails .* got 'none'"),
        ({"residual": True, "hidden_dims": [8, 16]}, r"one width.* got \[8, 16\]"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        T.spline_coupling(4, **options)
    with pytest.raises(ValueError, match=message):
        T.conditional_spline_coupling(4, 2, **options)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="input_dim .* got 0"):
        T.spline_coupling(0)
    with pytest.raises(ValueError, match="context_dim .* got 0"):
        T.conditional_spline_coupling(2, 0)
    with pytest.raises(ValueError, match=r"shape \(\*batch, 2\) .* got shape \(5, 3\)"):
        T.spline_coupling(2)(torch.zeros(5, 3))


def test_compositions_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        T.Compose([])
    with pytest.raises(ValueError, match=r"one input_dim, got \[2, 3\]"):
        T.Compose([T.spline(2), T.spline(3)])
    with pytest.raises(ValueError, match="got ExpTransform"):
        T.Compose([torch.distributions.ExpTransform()])
    with pytest.raises(ValueError, match="got ConditionalSpline"):
        T.Compose([T.conditional_spline(2, 1)])


def test_circular_coupling_is_a_map_of_the_torus() -> None:
    """A whole turn of any input is a whole turn of the same output, and changes nothing else."""
    coupling = T.spline_coupling(3, tails="circular", bound=2.0).double()
    perturb_(coupling, 0.3, seed=0)
    x = torch.empty(20, 3, dtype=torch.float64).uniform_(-2.0, 2.0)
    y, ladj = coupling.call_and_ladj(x)
    for dim in range(3):
        turn = torch.zeros(3, dtype=torch.float64)
        turn[dim] = 4.0
        turned, turned_ladj = coupling.call_and_ladj(x + turn)
        torch.testing.assert_close(turned, y + turn, atol=1e-9, rtol=0)
        torch.testing.assert_close(turned_ladj, ladj, atol=1e-9, rtol=0)
