"""The fused spline as a citizen of PyTorch: derivatives of every order and kind, tracers, compilers, dtypes and shapes.

Whatever looks inside an operation gets the reference; what these tests protect is that nobody gets zeros, stale numbers
or another shape instead.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flowkit.ops import rational_quadratic, spline_columns, use_compiled, use_reference
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms import spline_coupling
from tests.ops.kernel_cases import (
    TAILS,
    assert_same,
    column_inputs,
    evaluate,
    points,
    random_params,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("fused_kernel")


def bent_coupling(input_dim=4, dtype=torch.float64, **options):
    coupling = spline_coupling(input_dim, hidden_dims=[8], count_bins=4, **options)
    return perturb_(coupling, 0.3).to(dtype)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("name", ["all three", "shared and rest"])
def test_first_and_second_derivatives_pass_the_gradient_checks(name, tails, inverse):
    columns, settings, tensors = column_inputs(name, 3, 3, tails, scale=0.5)
    tensors[0].mul_(0.7)  # away from the bounds, where nothing can be shifted
    wanted = [t.requires_grad_() for t in tensors if t is not None]

    def run(x, *params):
        own = params[0] if columns.own else None
        return spline_columns(x, own, params[-1], columns, settings, inverse=inverse)

    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted, fast_mode=True)


def second_derivatives(loss, tensors):
    tensors = [t.detach().requires_grad_() for t in tensors]
    first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
    return [g.detach() for g in first], list(second)


def check_second_derivatives(loss, tensors):
    got = second_derivatives(loss, tensors)
    with use_reference():
        want = second_derivatives(loss, tensors)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, tolerance=1e-9)


def test_create_graph_gives_the_derivatives_of_the_reference():
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")

    def loss(x, own, shared):
        value, ladj = spline_columns(x, own, shared, columns, settings)
        return (value * ladj.unsqueeze(-1)).sum()

    check_second_derivatives(loss, tensors)


def test_create_graph_counts_no_path_twice_where_one_argument_depends_on_another():
    columns, settings, (x, own, shared) = column_inputs("all three", 9, 5, "linear")

    def loss(x, own, shared):
        for _ in range(2):  # the second time x and the own parameters depend on the shared ones
            x, ladj = spline_columns(x, own + x.sum(), shared, columns, settings)
            own = own + shared.sum()
        return (x.sum(-1) * ladj).sum()

    check_second_derivatives(loss, (x, own, shared))


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_create_graph_through_a_coupling_gives_the_derivatives_of_the_reference(identity, strided):
    coupling = bent_coupling(identity=identity)
    x = points(6 * 8).view(6, 8)
    parameters = list(coupling.parameters())

    def run(x, *values):
        names = [name for name, _ in coupling.named_parameters()]
        x = x[:, ::2] if strided else x[:, :4].contiguous()
        function = torch.func.functional_call
        y = function(coupling, dict(zip(names, values, strict=True)), (x,))
        ladj = coupling.log_abs_det_jacobian(x, y)
        return (y.sum(-1) * ladj).sum()

    check_second_derivatives(run, (x, *parameters))


FUNCTION_TRANSFORMS = {
    "vmap": torch.func.vmap,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda *args: f(*args)[1].sum()),
    "grad": lambda f: torch.func.grad(lambda *args: sum(out.sum() for out in f(*args))),
    "vmap of grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *args: sum(out.sum() for out in f(*args)))
    ),
}


def leaves(tree):
    return list(torch.utils._pytree.tree_leaves(tree))


@pytest.mark.parametrize("name", FUNCTION_TRANSFORMS)
@pytest.mark.parametrize("inverse", [False, True])
def test_function_transforms_equal_those_of_the_reference(name, inverse):
    columns, settings, (x, own, _) = column_inputs("own and rest", 4, 5, "linear")

    def by_columns(x, own):
        return spline_columns(x, own, None, columns, settings, inverse=inverse)

    def by_element(x, params):
        return evaluate(x, params, count_bins=5, tails="circular", inverse=inverse)

    params = random_params(4, count_bins=5, tails="circular")
    for function, arguments in ((by_columns, (x, own)), (by_element, (x[:, 0], params))):
        got = FUNCTION_TRANSFORMS[name](function)(*arguments)
        with use_reference():
            want = FUNCTION_TRANSFORMS[name](function)(*arguments)
        assert_same(leaves(got), leaves(want), tolerance=1e-9)
        assert any(leaf.abs().max() > 0 for leaf in leaves(got))


def tangents(function, x, params):
    with forward_ad.dual_level():
        outputs = function(
            forward_ad.make_dual(x, torch.ones_like(x)),
            forward_ad.make_dual(params, torch.ones_like(params)),
        )
        return [forward_ad.unpack_dual(output).tangent for output in outputs]


def test_forward_mode_derivatives_equal_those_of_the_reference():
    x, params = points(20), random_params(20, count_bins=5, tails="linear")

    def run(x, params):
        return evaluate(x, params, count_bins=5, tails="linear", inverse=False)

    got = tangents(run, x, params)
    with use_reference():
        assert_same(got, tangents(run, x, params))


def test_a_jit_trace_holds_for_other_inputs_and_batch_sizes():
    def run(x, params):
        return evaluate(x, params, count_bins=5, tails="linear", inverse=False)

    def arguments(count):
        return points(count, seed=count), random_params(count, count_bins=5, tails="linear")

    traced = torch.jit.trace(run, arguments(5), check_trace=False)
    assert_same(traced(*arguments(7)), run(*arguments(7)))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_and_make_fx_see_every_operation():
    x, params = points(20), random_params(20, count_bins=5, tails="linear")

    def run(x, params):
        return evaluate(x, params, count_bins=5, tails="linear", inverse=True)

    with Recorder() as recorder:
        got = run(x, params)
    assert {"_softmax", "cumsum", "softplus"} <= recorder.seen
    assert_same(got, run(x, params))
    graph = make_fx(run)(x, params)
    assert any("softmax" in str(node.target) for node in graph.graph.nodes)
    other = points(20, seed=1)
    assert_same(graph(other, params), run(other, params))


@pytest.mark.parametrize("within_mode", [False, True])
def test_fake_tensors_get_shapes_without_numbers(within_mode):
    mode = FakeTensorMode()
    x = mode.from_tensor(points(20))
    params = mode.from_tensor(random_params(20, count_bins=5, tails="linear"))
    with mode if within_mode else contextlib.nullcontext():
        value, ladj = evaluate(x, params, count_bins=5, tails="linear", inverse=False)
    assert type(value) is type(ladj) is type(x)
    assert value.shape == ladj.shape == (20,)


class Labelled(torch.Tensor):
    """A subclass that goes through every operation."""


def test_a_subclass_stays_what_it_is():
    x, params = points(20), random_params(20, count_bins=5, tails="linear")
    options = {"count_bins": 5, "tails": "linear", "inverse": False}
    got = evaluate(x.as_subclass(Labelled), params, **options)
    assert all(type(output) is Labelled for output in got)
    assert_same(
        [output.as_subclass(torch.Tensor) for output in got], evaluate(x, params, **options)
    )


def compiled(function, backend):
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.fixture
def recorded_graphs():
    """A compiler backend that runs what it is given, and the targets of its nodes."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    return backend, targets


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiled_spline_and_its_gradients_equal_the_eager_ones(backend):
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")

    def by_columns(x, own, shared):
        return spline_columns(x, own, shared, columns, settings)

    def by_element(x, params):
        return evaluate(x, params, count_bins=5, tails="circular", inverse=True)

    params = random_params(9, count_bins=5, tails="circular")
    for function, arguments in ((by_columns, tensors), (by_element, (tensors[0][:, 0], params))):
        got, grads = with_gradients(compiled(function, backend), arguments)
        want, want_grads = with_gradients(function, arguments)
        assert_same(got + grads, want + want_grads, tolerance=1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_coupling_equals_the_eager_one(backend):
    coupling = bent_coupling(dtype=torch.float32)
    x = points(9 * 4, dtype=torch.float32).view(9, 4)

    def gradients(run):
        coupling.zero_grad()
        y, ladj = run(x)
        (y.square().sum() + ladj.sum()).backward()
        return [y.detach(), ladj.detach()], [p.grad.clone() for p in coupling.parameters()]

    got, grads = gradients(compiled(coupling.call_and_ladj, backend))
    want, want_grads = gradients(coupling.call_and_ladj)
    assert_same(got, want, tolerance=1e-5)
    assert_same(grads, want_grads, tolerance=1e-4)


def test_the_kernel_is_in_the_compiled_graph(recorded_graphs, kernel_calls):
    backend, targets = recorded_graphs
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")

    def run(x, own, shared):
        return spline_columns(x, own, shared, columns, settings)

    run_compiled = compiled(run, backend)
    got = run_compiled(*tensors)
    assert any("pyro_flowkit.spline" in target for target in targets)
    kernel_calls.clear()
    assert_same(run_compiled(*tensors), got)
    assert kernel_calls == {"run": 1}


def test_the_reference_is_in_the_compiled_graph_where_it_is_wanted(recorded_graphs, kernel_calls):
    backend, targets = recorded_graphs
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")
    run_compiled = compiled(lambda *args: spline_columns(*args, columns, settings), backend)
    with use_reference():
        run_compiled(*tensors)
    assert targets and not any("pyro_flowkit" in target for target in targets)
    assert not kernel_calls


@pytest.mark.parametrize("name", ["jacfwd", "jacrev", "vmap of grad"])
def test_compiled_function_transforms_equal_the_eager_ones(name):
    x, params = points(4), random_params(4, count_bins=5, tails="linear")

    def run(x, params):
        return evaluate(x, params, count_bins=5, tails="linear", inverse=False)

    transformed = FUNCTION_TRANSFORMS[name](run)
    got = compiled(transformed, "eager")(x, params)
    assert_same(leaves(got), leaves(transformed(x, params)), tolerance=1e-10)


def test_a_coupling_is_copied_and_pickled_after_use():
    coupling = bent_coupling()
    x = points(5 * 4).view(5, 4).requires_grad_()
    want = coupling.call_and_ladj(x)
    sum(output.sum() for output in want).backward()
    for copied in (copy.deepcopy(coupling), pickle.loads(pickle.dumps(coupling))):
        got = copied.call_and_ladj(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert copied.settings == coupling.settings
        assert copied.settings.num_params == coupling.settings.num_params


@pytest.fixture
def compiled_functions(monkeypatch):
    """What the package compiles; without the compiler's slow last stage."""
    torch.compiler.reset()
    rational_quadratic._compiled.cache_clear()
    compile_, found = torch.compile, []

    def compiler(function, **options):
        found.append(function)
        return compile_(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compiler)
    yield found
    rational_quadratic._compiled.cache_clear()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler looks at it
def test_the_reference_goes_through_the_compiler_where_that_is_asked_for(compiled_functions):
    columns, settings, tensors = column_inputs("all three", 9, 5, "linear")

    def by_columns(x, own, shared):
        return spline_columns(x, own, shared, columns, settings)

    with use_reference():
        want, want_grads = with_gradients(by_columns, tensors)
        assert not compiled_functions
        with use_compiled():
            for _ in range(2):
                got, grads = with_gradients(by_columns, tensors)
                assert_same(got + grads, want + want_grads, tolerance=1e-10)
            assert len(compiled_functions) == 1
            x, params = points(7), random_params(7, count_bins=5, tails="linear")
            options = {"count_bins": 5, "tails": "linear", "inverse": True}
            compiled_values = evaluate(x, params, **options)
            assert len(compiled_functions) == 2
            derivative = torch.func.grad(lambda x: evaluate(x, params, **options)[0].sum())(x)
        assert_same(compiled_values, evaluate(x, params, **options), tolerance=1e-10)
        assert torch.allclose(derivative.log(), compiled_values[1], atol=1e-6)


def test_the_kernel_is_not_compiled(compiled_functions):
    with use_compiled():
        evaluate(
            points(7),
            random_params(7, count_bins=5, tails="linear"),
            count_bins=5,
            tails="linear",
            inverse=False,
        )
    assert compiled_functions == []
