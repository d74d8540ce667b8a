"""Every test starts from the same seed and an empty param store, on one thread, with distributions validated."""

import importlib
from collections import Counter

import pyro
import pytest
import torch

from pyro_flowkit import head_start
from pyro_flowkit.ops.backend import kernel

KERNEL_FUNCTIONS = (
    "run",
    "run_backward",
    "couple",
    "couple_backward",
    "run_chain",
    "push_chain",
    "run_chain_backward",
    "pull_chain",
    "pull_chain_backward",
)

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


@pytest.fixture
def fused_kernel(monkeypatch):
    """The extension module, in use whatever PYRO_FLOWKIT_REFERENCE says."""
    if kernel is None:
        pytest.skip(
            "the extension was not built: there was no C compiler when the package was installed"
        )
    module = importlib.import_module(
        "pyro_flowkit.ops.backend"
    )  # the package has a function of this name
    monkeypatch.setattr(module, "_reference_wanted", False)
    return kernel


@pytest.fixture
def kernel_calls(fused_kernel, monkeypatch):
    """How often each function of the kernel was called."""
    calls = Counter()

    def counting(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for name in KERNEL_FUNCTIONS:
        monkeypatch.setattr(fused_kernel, name, counting(name, getattr(fused_kernel, name)))
    return calls
