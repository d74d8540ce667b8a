"""Adam in one call: the numbers and the state of PyTorch's, whichever parameters have gradients."""

import copy
import subprocess
import sys

import pytest
import torch

from pyro_flowkit.training.adam import Adam


def parameters(dtypes=(torch.float32,) * 3):
    generator = torch.Generator().manual_seed(0)
    sizes = zip((3, 5, 1), dtypes, strict=True)
    return [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n, dtype in sizes]


def give_gradients(ours, theirs, missing=()):
    for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = None if k in missing else torch.randn_like(p)
        q.grad = None if k in missing else p.grad.clone()


def check_same(ours, theirs, own, other):
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert own.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        for key, value in other.state.get(q, {}).items():
            assert torch.equal(own.state[p][key], value), key


@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}]
)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.float32, torch.float64, torch.float32)]
)
def test_every_step_is_that_of_torch(dtypes, options):
    ours, theirs = parameters(dtypes), parameters(dtypes)
    own = Adam(ours, lr=0.1, fused=True, **options)
    other = torch.optim.Adam(theirs, lr=0.1, fused=True, **options)
    for step in range(12):
        missing = [k for k in range(3) if (k == 1 and step in (3, 4, 9)) or (k == 2 and step < 2)]
        give_gradients(ours, theirs, missing)
        own.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.1 / (1 + step)
        own.step()
        other.step()
        check_same(ours, theirs, own, other)


def test_its_state_goes_on_elsewhere():
    ours, theirs = parameters(), parameters()
    own, other = Adam(ours, lr=0.1, fused=True), torch.optim.Adam(theirs, lr=0.1, fused=True)
    give_gradients(ours, theirs)
    own.step()
    other.step()
    saved = copy.deepcopy(own.state_dict())
    own = Adam(ours, lr=0.1, fused=True)
    own.load_state_dict(saved)
    give_gradients(ours, theirs)
    own.step()
    other.step()
    check_same(ours, theirs, own, other)
    copied = copy.deepcopy(own)
    for p in copied.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    copied.step()
    assert [float(state["step"]) for state in copied.state.values()] == [3.0, 3.0, 3.0]
    assert [float(state["step"]) for state in own.state.values()] == [2.0, 2.0, 2.0]


def test_hooks_closures_and_schedulers_work():
    ours = parameters()
    own = Adam(ours, lr=0.1, fused=True)
    seen = []
    own.register_step_pre_hook(lambda *_: seen.append("before"))
    own.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(own, 1, gamma=0.5)

    def closure():
        own.zero_grad()
        loss = sum(p.square().sum() for p in ours)
        loss.backward()
        return loss

    assert float(own.step(closure).detach()) > 0.0
    scheduler.step()
    assert seen == ["before", "after"]
    assert own.param_groups[0]["lr"] == pytest.approx(0.05)


def test_sparse_gradients_are_refused():
    weight = torch.randn(4, 2).requires_grad_()
    torch.nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match="Expected dense gradients"):
        Adam([weight], lr=0.1, fused=True).step()


def test_an_optimizer_is_made_without_the_compiler():
    """PyTorch's own imports it when the first parameters are added."""
    program = """
import sys
import torch
from pyro_flowkit.training.optimizer import build_optimizer
parameter = torch.nn.Parameter(torch.zeros(3))
optimizer = build_optimizer(None, [parameter], 0.1, 0.1)
parameter.sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], check=False)
    assert run.returncode == 0
