"""An existing program changes its import and nothing else."""

import inspect

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch

import pyro_flowkit.transforms as T

OURS = [
    "spline",
    "conditional_spline",
    "spline_coupling",
    "spline_autoregressive",
    "conditional_spline_autoregressive",
    "permute",
    "iterated",
    "Spline",
    "ConditionalSpline",
    "SplineCoupling",
    "SplineAutoregressive",
    "ConditionalSplineAutoregressive",
    "Permute",
]


@pytest.mark.parametrize("name", pyro_transforms.__all__)
def test_every_name_of_pyro_is_here(name):
    assert hasattr(T, name)
    assert name in T.__all__
    if name not in OURS:
        assert getattr(T, name) is getattr(pyro_transforms, name)


@pytest.mark.parametrize("name", OURS)
def test_ours_take_the_place_of_pyros(name):
    assert getattr(T, name).__module__.startswith("pyro_flowkit.")


@pytest.mark.parametrize(
    "name",
    [
        "spline",
        "conditional_spline",
        "spline_coupling",
        "spline_autoregressive",
        "conditional_spline_autoregressive",
        "permute",
    ],
)
def test_positional_arguments_and_defaults_follow_pyro(name):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind in kinds]

    ours, theirs = positional(getattr(T, name)), positional(getattr(pyro_transforms, name))
    own_keywords = {"order", "bound", "dim"}
    shared = [p for p in theirs if p[0] not in own_keywords and p[0] != "kwargs"]
    assert [p for p in ours if p[0] not in own_keywords][: len(shared)] == shared


def test_every_name_that_is_exported_exists():
    assert len(T.__all__) == len(set(T.__all__))
    for name in T.__all__:
        assert hasattr(T, name), name


def test_a_program_that_changes_its_import_runs():
    base_dist = dist.Normal(torch.zeros(2), torch.ones(2))
    spline_transform = T.spline_coupling(2, count_bins=16)
    flow_dist = dist.TransformedDistribution(base_dist, [spline_transform])
    x = flow_dist.sample((10,))
    assert flow_dist.log_prob(x).shape == (10,)
    torch.testing.assert_close(flow_dist.log_prob(x), base_dist.to_event(1).log_prob(x))
