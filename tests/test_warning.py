"""Warnings point at the line of the caller, not at a room of this package, of Pyro or of PyTorch."""

import warnings

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flowkit.ops.psis import psis
from pyro_flowkit.warning import warn


def where(call) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught[-1].filename


@pytest.mark.parametrize("wrap", [lambda f: f, torch.no_grad(), poutine.block])
def test_a_warning_is_of_the_callers_line(wrap) -> None:
    """Through the decorators of PyTorch and the handlers of Pyro."""
    assert where(wrap(lambda: warn("so"))) == __file__


def test_a_warning_from_within_the_package_is_of_the_callers_line() -> None:
    assert where(lambda: psis(dist.Normal(0.0, 60.0).sample((3,)))) == __file__
