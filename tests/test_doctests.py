"""Every public name has an example that runs; those that have none yet are listed, and the list can only shrink."""

import doctest
import importlib

import pyro
import pytest
import torch

from tests.test_docs import reference

WITHOUT = {
    "ops.Columns",
    "ops.spline_columns",
    "training.FitState",
    "training.LostRankError",
    "training.MLflowTracker",
    "training.TensorBoardTracker",
    "training.WandbTracker",
    "transforms.ConditionalCompose",
    "transforms.ConditionalFlowTransformModule",
    "transforms.ConditionalSpline",
    "transforms.ConditionalSplineAutoregressive",
    "transforms.ConditionalSplineCoupling",
    "transforms.FlowTransformModule",
    "transforms.SplineAutoregressive",
    "transforms.SplineCoupling",
    "transforms.Standardization",
}
NAMES = [
    (module, name)
    for module, names in sorted(reference().items())
    if module != "pyro_flowkit.lightning"
    for name in names
]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def docstring(module, name):
    return getattr(importlib.import_module(module), name).__doc__ or ""


WITH = [key for key in NAMES if ">>>" in docstring(*key)]


def test_the_names_without_an_example_are_those_of_the_list():
    found = {
        f"{module.removeprefix('pyro_flowkit.')}.{name}" for module, name in set(NAMES) - set(WITH)
    }
    assert not found - WITHOUT, "Expected an example in the docstring (>>>), got none"
    assert len(WITHOUT) <= 16
    assert not WITHOUT - found, "Expected these to be taken off the list: they have an example"


@pytest.mark.parametrize(("module", "name"), WITH, ids=lambda value: value.rpartition(".")[2])
def test_an_example_runs_and_shows_what_it_says(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(docstring(module, name), {}, name, None, None)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert result.attempted and not result.failed, "".join(said)
