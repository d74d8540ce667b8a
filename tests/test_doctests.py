"""Every public name has an example that runs."""

import doctest
import importlib
import sys
from unittest import mock

import pyro
import pytest
import torch

from tests.test_docs import reference

STAND_INS = {
    "MLflowTracker": "mlflow",
    "WandbTracker": "wandb",
}  # libraries that the tests go without
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


def test_every_public_name_has_an_example():
    assert not set(NAMES) - set(WITH), "Expected an example in the docstring (>>>), got none"


@pytest.mark.parametrize(("module", "name"), WITH, ids=lambda value: value.rpartition(".")[2])
def test_an_example_runs_and_shows_what_it_says(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in STAND_INS:
        monkeypatch.setitem(sys.modules, STAND_INS[name], mock.MagicMock())
    pyro.clear_param_store()
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(docstring(module, name), {}, name, None, None)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert result.attempted and not result.failed, "".join(said)
