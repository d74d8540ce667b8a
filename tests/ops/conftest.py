"""What tests of the fused kernel need: one of its instruction sets chosen."""

import pytest

from pyro_flowkit.ops.backend import kernel

INSTRUCTION_SETS = kernel.instruction_sets() if kernel else ["portable"]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, fused_kernel):
    """Every instruction set of this processor in turn."""
    before = fused_kernel.choose(request.param)
    yield request.param
    fused_kernel.choose(before)
