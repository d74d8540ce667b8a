"""Sizes that do not fit are refused at the kernel's own doors: no memory is touched that is not the caller's."""

import struct
import subprocess
import sys

import pytest
import torch

from pyro_flowkit.nn import MLP
from pyro_flowkit.ops import Columns, SplineSettings

ROWS, DIM, CONTEXT = 4, 3, 2
SETTINGS = SplineSettings(count_bins=5, bound=3.0)
COLUMNS = Columns(DIM, own=(2,), shared=(0,))
NETWORK = MLP(1, SETTINGS.num_params, [6], context_dim=CONTEXT)
SHARED = torch.zeros(SETTINGS.num_params)

IS_DOUBLE, INVERSE, SUM, ROWS_AT, DIM_AT, OWN, SHARED_AT, BINS, PARAMS, TAILS = range(10)
FIRST, PASSED, CONTEXT_DIM, LIMIT, LAYERS = range(14, 19)


def columns(*numbers):
    return struct.pack(f"{len(numbers)}i", *numbers)


BIG = torch.zeros(2**14)


def layers(*sizes):
    """Sizes and addresses of a network, the addresses those of one that is larger than any here."""
    count = len(sizes) - 1
    return (*sizes, *[BIG.data_ptr()] * (2 * count))


WRONG_SPLINES = {
    "negative rows": (ROWS_AT, -1),
    "a negative dimension": (DIM_AT, -1),
    "a smaller dimension": (DIM_AT, 1),
    "a negative column": (OWN, columns(-1)),
    "a column beyond": (OWN, columns(DIM)),
    "half a column": (OWN, columns(2)[:-1]),
    "a negative shared column": (SHARED_AT, columns(-1)),
    "a shared column beyond": (SHARED_AT, columns(2**31 - 1)),
    "more columns than there are": (SHARED_AT, columns(0, 1, 2)),
    "negative bins": (BINS, -5),
    "no bins": (BINS, 0),
    "other bins": (BINS, 6),
    "bins that wrap around": (BINS, 2**32 + 5),
    "more bins than memory": (BINS, 2**40),
    "negative parameters": (PARAMS, -1),
    "fewer parameters": (PARAMS, SETTINGS.num_params - 1),
    "negative tails": (TAILS, -1),
    "other tails": (TAILS, 1),
    "no such tails": (TAILS, 3),
}
WRONG_NETWORKS = {
    "a negative first column": (FIRST, -1),
    "a first column beyond": (FIRST, DIM),
    "a first column that wraps around": (FIRST, 2**63 - 1),
    "negative columns that pass": (PASSED, -1),
    "more columns that pass": (PASSED, DIM + 1),
    "a negative context": (CONTEXT_DIM, -1),
    "a larger context": (CONTEXT_DIM, CONTEXT + 1),
    "a smaller context": (CONTEXT_DIM, 0),
    "fewer inputs": (LAYERS, layers(2, 6, SETTINGS.num_params)),
    "more outputs": (LAYERS, layers(3, 6, SETTINGS.num_params + 1)),
    "an empty layer": (LAYERS, layers(3, 0, SETTINGS.num_params)),
    "a negative layer": (LAYERS, layers(3, -6, SETTINGS.num_params)),
    "a layer that wraps around": (LAYERS, layers(3, 2**32 + 6, SETTINGS.num_params)),
    "no layer": (LAYERS, layers(3)),
    "too many layers": (LAYERS, layers(3, *[6] * 8, SETTINGS.num_params)),
    "an address short": (LAYERS, layers(3, 6, SETTINGS.num_params)[:-1]),
}


def arguments_of(name, kernel):
    """Those of a call that is right, and the tensors behind their addresses."""
    x, ladj = torch.zeros(ROWS, DIM), torch.zeros(ROWS)
    params = torch.zeros(ROWS, SETTINGS.num_params)
    head = (False, False, True, ROWS, *COLUMNS.packed, *SETTINGS.packed)
    if name.startswith("couple"):
        start, layout = NETWORK.packed.data_ptr(), NETWORK.layout
        network = (*layout.sizes, *[start + 4 * offset for offset in layout.offsets])
        head = (*head, 0, 1, CONTEXT, 1e4, network)
        kept = torch.zeros(ROWS, kernel.kept_per_row(layout.sizes))
        context, grad_packed = torch.zeros(ROWS, CONTEXT), torch.zeros_like(NETWORK.packed)
        forward = [x, context, SHARED, x.clone(), ladj, kept]
        back = [x, SHARED, kept, x, ladj, x.clone(), context, SHARED.clone(), grad_packed]
    else:
        forward = [x, params, SHARED, x.clone(), ladj]
        back = [x, params, SHARED, x, ladj, x.clone(), params.clone(), SHARED.clone()]
    tensors = back if name.endswith("backward") else forward
    return [*head, *(t.data_ptr() for t in tensors)], tensors


@pytest.mark.parametrize("name", ["run", "run_backward", "couple", "couple_backward"])
def test_every_door_takes_what_fits_and_refuses_what_does_not(fused_kernel, name):
    call = getattr(fused_kernel, name)
    arguments, _alive = arguments_of(name, fused_kernel)
    call(*arguments)
    wrong = WRONG_SPLINES | (WRONG_NETWORKS if name.startswith("couple") else {})
    for what, (place, value) in wrong.items():
        changed = [*arguments]
        changed[place] = value
        with pytest.raises(ValueError, match=r"^Expected .*, got .*\.$"):
            call(*changed)
            pytest.fail(f"{name} took {what}")
    with pytest.raises(TypeError, match="Expected .* arguments, got"):
        call(*arguments[:-1])


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1), (-1, 3), (1,) * 10])
def test_no_room_is_told_for_what_is_no_network(fused_kernel, sizes):
    with pytest.raises(ValueError, match="Expected .*layer"):
        fused_kernel.kept_per_row(sizes)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (4, -5),
        (5, -1),
        (6, 3),
        (2, columns(DIM)),
        (3, columns(-1)),
        (11, -1),
        (12, DIM + 1),
        (14, (1, -6, SETTINGS.num_params)),
    ],
)
def test_a_chain_refuses_what_does_not_fit(fused_kernel, place, wrong):
    network = (1, 6, SETTINGS.num_params)
    coupling = [0, *COLUMNS.packed, *SETTINGS.packed, 0, 1, 1e4, network]
    assert fused_kernel.kept_of_chain(ROWS, DIM, (tuple(coupling),)) > 0
    coupling[place] = wrong
    with pytest.raises(ValueError, match=r"^Expected .*, got .*\.$"):
        fused_kernel.kept_of_chain(ROWS, DIM, (tuple(coupling),))


def test_a_kernel_of_older_sources_is_said_to_be_one():
    program = """
import sys, types
kernel = types.ModuleType("pyro_flowkit.ops._fused")
kernel.__file__ = "an_old_one.so"
sys.modules["pyro_flowkit.ops._fused"] = kernel
import pyro_flowkit
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "got an older one, an_old_one.so: pip install -e . builds it anew" in run.stderr
