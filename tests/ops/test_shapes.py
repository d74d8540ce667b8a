"""The shape that several broadcast to, without the price of torch's own function."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import pyro_flowkit
from pyro_flowkit.ops.shapes import broadcast_shapes

SHAPES = [(), (0,), (1,), (3,), (2, 3), (2, 1), (1, 3), (4, 1, 3), (4, 2, 1), (0, 3), (5,)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shapes_broadcast_as_those_of_torch(count):
    for shapes in product(SHAPES, repeat=count):
        try:
            expected = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                broadcast_shapes(*shapes)
            continue
        found = broadcast_shapes(*shapes)
        assert type(found) is torch.Size and found == expected


def test_a_conditional_flow_does_without_sympy():
    program = """
import sys
import torch
from pyro_flowkit import SplineFlow
flow = SplineFlow(2, context_dim=3, hidden_dims=[4])
context = torch.randn(5, 3)
flow(context).log_prob(torch.randn(4, 5, 2)).sum().backward()
flow(context).rsample((4,))
sys.exit("sympy" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], check=False)
    assert run.returncode == 0


def test_nobody_calls_that_of_torch():
    root = Path(pyro_flowkit.__file__).parent
    callers = [p.name for p in root.rglob("*.py") if "torch.broadcast_shapes(" in p.read_text()]
    assert callers == ["shapes.py"]
