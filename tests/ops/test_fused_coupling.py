"""A coupling whose conditioner runs in the kernel too: the numbers of the same coupling in PyTorch's operations."""

import contextlib
import copy

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from pyro_flowkit.nn import MLP
from pyro_flowkit.ops import scratch, use_reference
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms import conditional_spline_coupling, spline_coupling
from tests.ops.kernel_cases import TAILS, assert_same, points

MASKS = {
    "first": [True, True, False, False, False],
    "last": [False, False, True, True, True],
    "middle": [False, True, True, False, False],
    "scattered": [True, False, True, False, True],
}


def make(mask, context_dim=0, *, dtype=torch.float64, **options):
    mask = torch.tensor(MASKS[mask])
    settings = {"hidden_dims": [11, 6], "count_bins": 4, **options}
    if context_dim:
        coupling = conditional_spline_coupling(5, context_dim, mask=mask, **settings)
    else:
        coupling = spline_coupling(5, mask=mask, **settings)
    return perturb_(coupling, 0.3).to(dtype)


def run(coupling, inputs, *, inverse=False, reference=False):
    """Outputs, and derivatives with respect to the inputs and the parameters of the coupling."""
    function = coupling.inverse_and_ladj if inverse else coupling.call_and_ladj
    leaves = [t.detach().requires_grad_() for t in inputs] + list(coupling.parameters())
    generator = torch.Generator().manual_seed(3)

    def evaluate():
        y, ladj = function(*leaves[: len(inputs)])
        weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (y, ladj)]
        loss = (y * weights[0]).sum() + (ladj * weights[1]).sum()
        return [y.detach(), ladj.detach()], list(torch.autograd.grad(loss, leaves))

    if not reference:
        return evaluate()
    with use_reference():
        return evaluate()


def check(coupling, inputs, *, inverse, tolerance=1e-10):
    got, grads = run(coupling, inputs, inverse=inverse)
    want, want_grads = run(coupling, inputs, inverse=inverse, reference=True)
    assert_same(got + grads, want + want_grads, tolerance=tolerance)


def inputs_for(rows, context_dim, dtype=torch.float64):
    x = 0.7 * points(rows * 5, dtype=dtype).view(rows, 5)
    if not context_dim:
        return (x,)
    return x, points(rows * context_dim, seed=1, dtype=dtype).view(rows, context_dim)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_any_coupling_equals_the_reference(instruction_set, mask, context_dim, identity, inverse):
    coupling = make(mask, context_dim, identity=identity)
    check(coupling, inputs_for(37, context_dim), inverse=inverse)


@pytest.mark.parametrize("rows", [0, 1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_rows_equals_the_reference(instruction_set, rows, dtype):
    coupling = make("first", 2, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    check(coupling, inputs_for(rows, 2, dtype), inverse=False, tolerance=tolerance)


@pytest.mark.parametrize("hidden_dims", [[1], [16], [3, 17, 33], [5] * 7, [5] * 12])
def test_any_network_equals_the_reference(instruction_set, hidden_dims):
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-10)):
        coupling = make("middle", hidden_dims=hidden_dims, dtype=dtype)
        check(coupling, inputs_for(20, 0, dtype), inverse=True, tolerance=tolerance)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_tails_and_batch_shapes_equal_the_reference(fused_kernel, tails, batch):
    coupling = make("last", tails=tails)
    (x,) = inputs_for(6, 0)
    x = x[: batch[-1] if batch else 1].expand(*batch, -1) if batch else x[0]
    check(coupling, (x,), inverse=False)
    check(coupling, (x,), inverse=True)


def test_huge_infinite_and_missing_inputs_equal_the_reference(instruction_set):
    coupling = make("first")
    (x,) = inputs_for(6, 0)
    x[0, 0], x[1, 1], x[2, 0], x[3, 3] = 1e4, -2e4, torch.inf, -torch.inf
    check(coupling, (x,), inverse=False)
    x[4, 1] = torch.nan
    for inverse in (False, True):
        got, _ = run(coupling, (x,), inverse=inverse)
        want, _ = run(coupling, (x,), inverse=inverse, reference=True)
        assert_same(got, want)
        assert got[0].isnan().any(-1).tolist() == [False] * 4 + [True, False]


def test_a_frozen_network_still_hands_gradients_to_its_inputs(fused_kernel):
    coupling = make("first", 2)
    trained = copy.deepcopy(coupling)
    inputs = inputs_for(9, 2)
    coupling.conditioner.requires_grad_(False)
    leaves = [t.requires_grad_() for t in inputs]
    found = []
    for each in (coupling, trained):
        y, ladj = each.call_and_ladj(*leaves)
        found.append(torch.autograd.grad(y.square().sum() + ladj.sum(), leaves))
    assert_same(*found)
    assert all(p.grad is None for p in coupling.parameters())


def test_weights_changed_in_place_before_the_backward_are_noticed(fused_kernel):
    coupling = make("first")
    _, ladj = coupling.call_and_ladj(*inputs_for(9, 0))
    with torch.no_grad():
        coupling.conditioner.packed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ladj.sum().backward()


def through(couplings, x):
    total = torch.zeros(x.shape[:-1], dtype=x.dtype)
    for coupling in couplings:
        x, ladj = coupling.call_and_ladj(x)
        total = total + ladj
    return x.square().sum() + total.sum()


def test_forward_passes_do_not_share_what_they_keep(fused_kernel):
    couplings = [make("first"), make("last"), make("middle")]
    leaves = [p for coupling in couplings for p in coupling.parameters()]
    (x,) = inputs_for(50, 0)
    with use_reference():
        want = torch.autograd.grad(through(couplings, x), leaves)

    first, other = through(couplings, x), through(couplings, 0.5 * x)
    torch.autograd.grad(other, leaves)
    through(couplings, 0.7 * x)  # dropped without a backward pass
    assert_same(torch.autograd.grad(first, leaves, retain_graph=True), want, tolerance=1e-9)
    through(couplings, 0.3 * x)
    assert_same(torch.autograd.grad(first, leaves), want, tolerance=1e-9)


KEEPERS = {
    "original": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "alias": lambda: saved_tensors_hooks(lambda t: t.detach(), lambda t: t),
    "view": lambda: saved_tensors_hooks(lambda t: (t.shape, t.view(-1)), lambda t: t[1].view(t[0])),
    "storage": lambda: saved_tensors_hooks(
        lambda t: (t.untyped_storage(), t.new_empty(0), t.storage_offset(), t.shape, t.stride()),
        lambda kept: kept[1].set_(kept[0], *kept[2:]),
    ),
    "copy": save_on_cpu,
}


@pytest.mark.parametrize("keeper", [*KEEPERS, "checkpoint"])
def test_what_is_kept_lives_as_long_as_anybody_holds_it(fused_kernel, keeper):
    couplings = [make("first"), make("last"), make("middle")]
    leaves = [p for coupling in couplings for p in coupling.parameters()]
    (x,) = inputs_for(50, 0)
    want = torch.autograd.grad(through(couplings, x), leaves)
    with KEEPERS[keeper]() if keeper in KEEPERS else contextlib.nullcontext():
        if keeper == "checkpoint":
            loss = checkpoint(through, couplings, x, use_reentrant=False)
        else:
            loss = through(couplings, x)
    assert_same(torch.autograd.grad(loss, leaves), want, tolerance=1e-12)


def test_the_default_device_has_no_say_in_where_cpu_tensors_are_computed(fused_kernel):
    coupling = make("first")
    x = inputs_for(1234, 0)[0].requires_grad_()
    with torch.device("meta"):
        y, ladj = coupling.call_and_ladj(x)
    (got,) = torch.autograd.grad(y.square().sum() + ladj.sum(), x)
    with use_reference():
        y, ladj = coupling.call_and_ladj(x)
        (want,) = torch.autograd.grad(y.square().sum() + ladj.sum(), x)
    assert_same([got], [want], tolerance=1e-9)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mask", ["first", "scattered"])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_coupling_calls_the_kernel_once_forward_and_once_backward(
    kernel_calls, mask, residual, inverse
):
    coupling = make(mask, identity=True, residual=residual, hidden_dims=[6])
    run(coupling, inputs_for(9, 0), inverse=inverse)
    whole = mask == "first" and not residual
    names = ("couple", "couple_backward") if whole else ("run", "run_backward")
    assert kernel_calls == {name: 1 for name in names}


class Doubled(MLP):
    def layers(self):
        return [(2.0 * weight, bias) for weight, bias in super().layers()]


def with_other_layers(network):
    network.__class__ = Doubled


def with_hook(network):
    network.register_forward_hook(lambda module, args, output: output + 1.0)


def with_hook_on_the_activation(network):
    network.activation.register_forward_hook(lambda module, args, output: output + 1.0)


def with_other_forward(network):
    forward = network.forward
    network.forward = lambda *args: forward(*args) + 1.0


@pytest.mark.parametrize(
    "change", [with_other_layers, with_hook, with_hook_on_the_activation, with_other_forward]
)
def test_a_network_that_somebody_changed_is_run_as_it_is(fused_kernel, change):
    coupling = make("first")
    inputs = inputs_for(9, 0)
    before, _ = run(coupling, inputs)
    change(coupling.conditioner)
    got, grads = run(coupling, inputs)
    want, want_grads = run(coupling, inputs, reference=True)
    assert_same(got + grads, want + want_grads, tolerance=1e-10)
    assert (got[0] - before[0]).abs().max() > 1e-3


def test_a_parametrised_network_equals_the_reference(fused_kernel):
    coupling = make("first")
    register_parametrization(coupling.conditioner, "packed", torch.nn.Tanh(), unsafe=True)
    check(coupling, inputs_for(9, 0), inverse=False)


def test_what_is_kept_is_used_again_from_step_to_step(fused_kernel):
    couplings = [make("first"), make("last")]
    (x,) = inputs_for(37, 0)
    through(couplings, x).backward()
    before = sum(len(alike) for alike in scratch._buffers.values())
    for _ in range(5):
        through(couplings, x).backward()
    assert sum(len(alike) for alike in scratch._buffers.values()) == before > 0
