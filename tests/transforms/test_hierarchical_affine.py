"""The affine map of each block given those before it: its structure, its limits, and what a guide gains by it."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.component import _blocks
from pyro_flowkit.testing import perturb_


def test_a_block_depends_on_those_before_it_and_is_scaled_itself() -> None:
    layer = perturb_(T.HierarchicalAffine([1, 2, 2], hidden_dims=[8]), 0.5)
    jacobian = torch.func.jacrev(layer)(torch.tensor([0.5, -1.0, 0.3, 0.8, -0.2]))
    block = torch.tensor([0, 1, 1, 2, 2])
    assert (jacobian[block[:, None] > block] != 0).all()
    assert (jacobian.diagonal() > 0).all() and jacobian[0, 0] == 1
    outside = (block[:, None] <= block) & ~torch.eye(5, dtype=torch.bool)
    assert (jacobian[outside] == 0).all()


def test_log_scale_follows_a_line_up_to_its_limit() -> None:
    layer = T.HierarchicalAffine([1, 1]).double()
    with torch.no_grad():
        layer.conditioners[0].weight[1, 0] = 0.5
    v = torch.tensor([[-4.0, 1.0], [4.0, 1.0], [1e6, 1.0]], dtype=torch.float64)
    log_scale = layer(v)[:, 1].log().detach()
    assert torch.allclose(log_scale[:2], torch.tensor([-2.0, 2.0]).double(), atol=0.02)
    assert float(log_scale[2]) == pytest.approx(15.0)


def test_large_blocks_have_no_linear_part() -> None:
    layer = T.HierarchicalAffine([100, 101])
    assert [name for name, _ in layer.named_parameters()] == ["conditioners.0.network.packed"]
    assert layer(torch.ones(201)).equal(torch.ones(201))


@pytest.mark.parametrize("sizes", [[], [3], [2, 0], [1.5, 2]])
def test_fewer_than_two_blocks_are_refused(sizes) -> None:
    with pytest.raises(ValueError, match="Expected at least two positive block_sizes, got"):
        T.HierarchicalAffine(sizes)


def test_blocks_begin_at_the_largest_sites() -> None:
    assert _blocks([5]) == [5]
    assert _blocks([1, 9]) == [1, 9]
    assert _blocks([1, 1, 8, 20, 1, 2]) == [2, 8, 21, 2]


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal(torch.zeros(5, dtype=torch.float64), (v / 2).exp()))


def test_a_funnel_is_found_before_any_training() -> None:
    guide = AutoSplineFlow(funnel, num_transforms=2, hidden_dims=[8]).setup()
    assert guide.start_at_gaussian(funnel) is not None
    hierarchical = guide.evidence(num_samples=4000, seed=0)
    assert -0.02 < hierarchical.elbo < 0.0
    assert hierarchical.is_reliable
    pyro.clear_param_store()
    guide = AutoSplineFlow(funnel, num_transforms=2, hidden_dims=[8], hierarchical=False).setup()
    guide.start_at_gaussian(funnel)
    assert guide.evidence(num_samples=4000, seed=0).elbo < -1.0, "the best Gaussian"


def test_hierarchical_guides_only_where_there_are_several_sites() -> None:
    def single():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    for of, settings, blocks in (
        (single, {}, None),
        (funnel, {"hierarchical": False}, None),
        (funnel, {}, [1, 5]),
    ):
        pyro.clear_param_store()
        hierarchy = AutoSplineFlow(of, **settings).setup().hierarchy
        assert (hierarchy and hierarchy.block_sizes) == blocks
    assert next(hierarchy.parameters()).dtype == torch.float64
