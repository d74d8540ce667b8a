"""Every test starts from the same seed and an empty param store, on one thread, with distributions validated."""

import pyro
import pytest
import torch

from pyro_flowkit import head_start

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_pyro():
    validated = torch.distributions.Distribution._validate_args
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    # torch.compile turns validation off for the whole process
    torch.distributions.Distribution.set_default_validate_args(validated)


@pytest.fixture
def no_head_start(monkeypatch):
    """Every parameter of a conditional flow learns from the first step on."""
    monkeypatch.setattr(head_start, "NETWORK_STEPS", 0)
    monkeypatch.setattr(head_start, "SPLINE_STEPS", 0)
