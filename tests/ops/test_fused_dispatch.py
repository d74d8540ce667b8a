"""Who computes a spline: the kernel once, in as many threads as it may use, or the reference where that is wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit import SplineFlow
from pyro_flowkit.ops import backend, spline_columns, use_reference
from pyro_flowkit.ops.backend import kernel
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms import spline_coupling
from tests.ops.kernel_cases import assert_same, column_inputs, points, with_gradients

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_script(script, **environment):
    """Run Python code in a process of its own; returns what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYRO_FLOWKIT_REFERENCE"}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_backend_names_the_implementation(fused_kernel):
    assert backend() == "fused"
    with use_reference():
        assert backend() == "reference"
    assert backend() == "fused"


def test_use_reference_nests_and_ends_with_an_exception(fused_kernel):
    with use_reference():
        with use_reference():
            assert backend() == "reference"
        assert backend() == "reference"
    with pytest.raises(ZeroDivisionError), use_reference():
        raise ZeroDivisionError
    assert backend() == "fused"


USE_A_FLOW = """
import torch, pyro_flowkit
from pyro_flowkit.ops import backend
flow = pyro_flowkit.SplineFlow(3, num_transforms=2, hidden_dims=[4])
loss = -flow().log_prob(torch.randn(5, 3)).sum()
loss.backward()
assert loss.isfinite() and all(p.grad is not None for p in flow.layers.parameters())
print(backend())
"""


def test_the_environment_chooses_the_reference():
    assert run_script(USE_A_FLOW, PYRO_FLOWKIT_REFERENCE="1") == "reference"


def test_without_the_extension_a_flow_runs_on_the_reference():
    block = 'import sys; sys.modules["pyro_flowkit.ops._fused"] = None'
    assert run_script(block + USE_A_FLOW) == "reference"


def test_under_use_reference_the_kernel_is_not_called(kernel_calls):
    flow = SplineFlow(3, num_transforms=2, hidden_dims=[4], mixing=None)
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")
    with use_reference():
        flow().log_prob(torch.randn(5, 3)).sum().backward()
        flow().rsample((5,)).sum().backward()
        with_gradients(spline_columns, tensors, columns=columns, settings=settings)
    assert not kernel_calls
    flow().log_prob(torch.randn(5, 3)).sum().backward()
    assert kernel_calls


def test_a_log_prob_of_a_coupling_calls_the_kernel_once_each_way(kernel_calls):
    coupling = spline_coupling(4, identity=True)
    base = dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1)
    flow = dist.TransformedDistribution(base, [coupling])
    flow.log_prob(points(20, dtype=torch.float32).view(5, 4)).sum().backward()
    assert all(p.grad is not None for p in coupling.parameters())
    assert sum(kernel_calls[name] for name in ("run", "couple")) == 1
    assert sum(kernel_calls[name] for name in ("run_backward", "couple_backward")) == 1


@pytest.mark.parametrize("name", ["own and rest", "all three", "shared"])
def test_two_threads_give_what_one_gives(name, two_threads, kernel_calls):
    columns, settings, tensors = column_inputs(name, 33_001, 3, "linear", dtype=torch.float32)
    options = {"columns": columns, "settings": settings}
    got, (grad_x, *grads) = with_gradients(spline_columns, tensors, **options)
    assert kernel_calls == {"run": 2, "run_backward": 2}
    torch.set_num_threads(1)
    want, (want_x, *want_grads) = with_gradients(spline_columns, tensors, **options)
    assert kernel_calls == {"run": 3, "run_backward": 3}
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(grad_x, want_x)
    if columns.own:
        assert torch.equal(grads.pop(0), want_grads.pop(0))
    assert_same(grads, want_grads, tolerance=1e-5)  # sums over rows, in another order


@pytest.mark.parametrize("backward_threads", [1, 2])
def test_a_large_coupling_gives_the_same_in_two_threads(
    two_threads, fused_kernel, backward_threads
):
    coupling = perturb_(spline_coupling(4, hidden_dims=[8], count_bins=3), 0.1).double()
    x = points(4 * 30_001).view(-1, 4)

    def gradients(backward_threads):
        leaf = x.clone().requires_grad_()
        y, ladj = coupling.call_and_ladj(leaf)
        torch.set_num_threads(backward_threads)  # whatever it was in the forward pass
        loss = y.mean() + ladj.mean()
        return [y.detach(), ladj.detach()], torch.autograd.grad(
            loss, [leaf, *coupling.parameters()]
        )

    got, grads = gradients(backward_threads)
    torch.set_num_threads(1)
    want, want_grads = gradients(1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert_same(grads, want_grads, tolerance=1e-10)


FORK = """
import os, torch
from pyro_flowkit.ops import Columns, SplineSettings, backend, spline_columns
settings = SplineSettings(3, 3.0)
x = torch.linspace(-4, 4, 160_000).view(40_000, 4)
params = torch.linspace(-1, 1, 4 * settings.num_params)
columns = Columns(4, (), (0, 1, 2, 3))
torch.set_num_threads(2)

def run():
    value, ladj = spline_columns(x, None, params, columns, settings)
    return value.numpy().tobytes() + ladj.numpy().tobytes()

before = run()
child = os.fork()
if child == 0:
    os._exit(0 if run() == before else 1)
print(backend(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(kernel is None, reason="the extension was not built: there was no C compiler")
def test_threads_work_in_a_forked_child():
    assert run_script(FORK, PYRO_FLOWKIT_REFERENCE="0") == "fused 0"
