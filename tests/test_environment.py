"""What a report of a fault says of the installation."""

from importlib.metadata import version

import torch

import pyro_flowkit
from pyro_flowkit.ops import backend, use_reference


def test_show_versions_names_what_the_numbers_depend_on(capsys):
    pyro_flowkit.show_versions()
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.split(maxsplit=1) for line in lines)
    assert said["torch"] == torch.__version__
    assert said["pyro-ppl"] == version("pyro-ppl")
    assert said["pyro-flowkit"] == pyro_flowkit.__version__
    assert {"python", "system", "arviz", "threads", "GPUs"} <= set(said)


def test_show_versions_says_which_splines_run(capsys):
    kernel = {"fused": "the fused kernel", "reference": "PyTorch"}[backend()]
    pyro_flowkit.show_versions()
    with use_reference():
        pyro_flowkit.show_versions()
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("splines")]
    assert [line.split("  ")[-1].strip() for line in shown] == [kernel, "PyTorch"]
