"""What tests of the fused kernel need: the kernel switched on, one of its instruction sets chosen."""

import importlib
from collections import Counter

import pytest

from pyro_flowkit.ops.backend import kernel

INSTRUCTION_SETS = kernel.instruction_sets() if kernel else ["portable"]
KERNEL_FUNCTIONS = ("run", "run_backward", "couple", "couple_backward")


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


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, fused_kernel):
    """Every instruction set of this processor in turn."""
    before = fused_kernel.choose(request.param)
    yield request.param
    fused_kernel.choose(before)


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
