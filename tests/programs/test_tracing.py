"""The mode that tracing lends PyTorch is for speed alone."""

import torch

from pyro_flowkit.programs import tracing
from pyro_flowkit.programs.tracing import traced


def function(x, weight):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        total = (x @ weight).tanh().sum(-1)
        (derivative,) = torch.autograd.grad(total.sum(), x)
    return [total.detach(), derivative]


def test_graph_is_that_of_pytorch_alone(monkeypatch):
    inputs = torch.linspace(-1.0, 1.0, 6).reshape(2, 3), torch.eye(3)
    graph = traced(function, *inputs)
    monkeypatch.setattr(tracing, "FakeTensorMode", None)  # where PyTorch has no such names
    alone = traced(function, *inputs)
    assert graph.code == alone.code
    for one, other, expected in zip(graph(*inputs), alone(*inputs), function(*inputs), strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)
