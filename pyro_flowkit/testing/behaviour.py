"""Checks of a transform at home in PyTorch and Pyro: compilers, copies, files, distributions."""

import copy
import io
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowkit.testing.support import (
    NAMES,
    Evaluate,
    Owner,
    conditioned,
    evaluate,
    is_elementwise,
    log_det,
    no_validation,
    perturb_,
    prepared,
    require,
    require_close,
    require_same,
    sample_context,
    torch_jit_deprecations,
    use,
)


def check_function_transforms(transform: Any) -> None:
    """vmap equals the batched call; jacrev and jacfwd equal autograd's Jacobian; both ways."""
    copied, xs, context = prepared(transform, (3,), dtype=torch.float64)
    f = conditioned(copied, None if context is None else context[0])
    for name, g in (("forward", f), ("inverse", f.inv)):
        expected = g(xs), g.log_abs_det_jacobian(xs, g(xs))
        got = torch.func.vmap(lambda x, g=g: (g(x), g.log_abs_det_jacobian(x, g(x))))(xs)
        require_close(got[0], expected[0], f"value under vmap ({name})")
        require_close(got[1], expected[1], f"log-det under vmap ({name})")
        jacobian = torch.autograd.functional.jacobian(g, xs[0])
        require_close(torch.func.jacrev(g)(xs[0]), jacobian, f"jacrev ({name})")
        with torch_jit_deprecations():  # forward mode has torch script its own decompositions
            require_close(torch.func.jacfwd(g)(xs[0]), jacobian, f"jacfwd ({name})")


def check_double_backward(transform: Any) -> None:
    """``gradgradcheck`` of values and log-dets, both ways."""
    copied, x, context = prepared(transform, (2,), dtype=torch.float64)
    f = conditioned(copied, context)
    for g in (f, f.inv):
        x = x.detach().requires_grad_()
        torch.autograd.gradgradcheck(
            lambda x, g=g: (y := g(x), g.log_abs_det_jacobian(x, y)), (x,), fast_mode=True
        )


def check_compile(transform: Any) -> None:
    """``torch.compile(fullgraph=True, backend="eager")``: no graph break, the same numbers."""
    _, x, context = prepared(transform, (5,))
    expected = evaluate(transform, x, context)
    torch.compiler.reset()
    with no_validation():  # the compiler turns validation off for good; leaving restores it
        compiled = torch.compile(Evaluate(transform), fullgraph=True, backend="eager")
        outputs = compiled(x, context)
    for got, want, name in zip(outputs, expected, NAMES, strict=True):
        require_close(got, want, f"{name} compiled")


def check_jit_trace(transform: Any) -> None:
    """``torch.jit.trace`` records a function that holds for other inputs and batch sizes."""

    def arguments(rows: int) -> tuple[Tensor, ...]:
        _, x, context = prepared(transform, (rows,), seed=rows)
        return (x,) if context is None else (x, context)

    with torch_jit_deprecations():
        traced = torch.jit.trace(Evaluate(transform), arguments(5), check_trace=False)
    inputs = arguments(7)
    for got, want, name in zip(traced(*inputs), evaluate(transform, *inputs), NAMES, strict=True):
        require_close(got, want, f"{name} traced")


def check_deepcopy(transform: Any) -> None:
    """A copy made after a backward gives the same outputs, and shares no parameter."""
    expected = use(transform)
    copied = copy.deepcopy(transform)
    require_same(copied, expected, "of the deep copy")
    perturb_(copied)
    require_same(transform, expected, "after its copy changed")


def check_pickle(transform: Any, *, rows: int = 2000) -> None:
    """``pickle`` and ``torch.save`` give back the same outputs, and hold none of the rows seen."""
    size = len(pickle.dumps(transform))
    expected = use(transform)
    use(transform, rows)
    data = pickle.dumps(transform)
    require(
        len(data) <= size + 64, f"Expected a pickle of {size} bytes after use, got {len(data)}."
    )
    require_same(pickle.loads(data), expected, "of the pickle")
    buffer = io.BytesIO()
    torch.save(transform, buffer)
    buffer.seek(0)
    require_same(torch.load(buffer, weights_only=False), expected, "of the saved file")


def check_state_dict(transform: Any) -> None:
    """``load_state_dict`` carries the map over to a transform with other parameters."""
    expected = use(transform)
    other = perturb_(copy.deepcopy(transform), seed=1)
    other.load_state_dict(transform.state_dict())
    require_same(other, expected, "after load_state_dict")


def check_param_store(transform: Any) -> None:
    """A saved, cleared and loaded param store gives back the same outputs; pickling works too."""
    expected = use(transform)
    store = pyro.get_param_store()
    with store.scope(), tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "store")
        registered = copy.deepcopy(transform)
        pyro.module("transform", registered)
        store.save(file)
        require_same(
            pickle.loads(pickle.dumps(registered)), expected, "of a registered transform's pickle"
        )
        store.clear()
        store.load(file)
        other = perturb_(copy.deepcopy(transform), seed=1)
        pyro.module("transform", other, update_module_params=True)
        require_same(other, expected, "from the param store")


def check_with_cache(transform: Any) -> None:
    """``with_cache(0)`` and ``with_cache(1)`` work and leave the map as it is."""
    copied, x, context = prepared(transform, (5,))
    f = conditioned(copied, context)
    for size in (0, 1):
        with torch.no_grad():
            require_close(f.with_cache(size)(x), f(x), f"y with_cache({size})", 0.0)
            require_close(f.with_cache(size).inv(x), f.inv(x), f"x with_cache({size})", 0.0)


def check_pyro_module(transform: Any) -> None:
    """``to_pyro_module_`` and ``PyroModule``: same outputs to rounding, parameters known to Pyro by name."""
    expected = use(transform)
    converted = copy.deepcopy(transform)
    to_pyro_module_(converted)
    for name, got, want in zip(NAMES, use(converted), expected, strict=True):
        require_close(got, want, f"{name} after to_pyro_module_")
    owner = Owner(copy.deepcopy(transform))
    to_pyro_module_(owner)
    with pyro.get_param_store().scope():
        trace = poutine.trace(owner).get_trace()
    found = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    names = {f"transform.{name}" for name, _ in transform.named_parameters()}
    require(found == names, f"Expected the params {sorted(names)}, got {sorted(found)}.")


def check_inverse_module(transform: Any) -> None:
    """``.inv`` takes its parameters into a composed module; ``.inv.inv`` is the transform."""
    compose = (
        ConditionalComposeTransformModule
        if hasattr(transform, "condition")
        else ComposeTransformModule
    )
    found = {id(p) for p in compose([transform.inv]).parameters()}
    own = {id(p) for p in transform.parameters()}
    require(found == own, f"Expected the {len(own)} parameters of the transform, got {len(found)}.")
    require(transform.inv.inv is transform, "Expected transform.inv.inv to be the transform.")


def check_distribution(transform: Any) -> None:
    """In a TransformedDistribution: shapes, log-density, gradients twice, and no stale value.

    A batch of contexts is part of the batch shape, but under element-wise transforms, as in Pyro, of the sample shape.
    """
    context = sample_context(transform, (5,))
    base, d = _distributions(transform, context)
    f = conditioned(transform, context)
    batch = () if context is None or is_elementwise(f) else (5,)
    once = () if context is None or batch else (5,)
    for sample_shape in (once, (3, *once)):
        shape, want = d.rsample(sample_shape).shape, (*sample_shape, *batch, transform.input_dim)
        require(shape == want, f"Expected a sample of shape {want}, got {tuple(shape)}.")
    require(d.batch_shape == batch, f"Expected batch_shape {batch}, got {tuple(d.batch_shape)}.")
    with torch.no_grad():
        value = d.sample(() if batch else (5,))
        x = f.inv(value)
        expected = base.log_prob(x) - log_det(f, x, value)
        require_close(d.log_prob(value), expected, "log_prob")
    for _ in range(2):
        transform.zero_grad()
        loss = d.log_prob(d.rsample(once)).mean() + d.log_prob(value).mean()
        if loss.requires_grad:  # a permutation has nothing to learn
            loss.backward()
        for name, parameter in transform.named_parameters():
            grad = parameter.grad
            require(
                grad is not None and bool(grad.isfinite().all()),
                f"Expected a gradient of {name}, got {grad}.",
            )
    saved = copy.deepcopy(transform.state_dict())
    perturb_(transform, seed=2)
    fresh = _distributions(transform, context)[1].log_prob(value)
    require_close(d.log_prob(value), fresh, "log_prob after the weights changed", 0.0)
    transform.load_state_dict(saved)


def check_conditioner_runs_once(transform: Any) -> None:
    """``log_prob`` of fresh data runs no submodule with parameters twice."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in transform.named_modules()
        if name and list(module.parameters(recurse=False))
    ]
    context = sample_context(transform, (5,))
    _, d = _distributions(transform, context)
    value = d.sample(() if d.batch_shape else (5,))
    calls.clear()
    d.log_prob(value)
    for hook in hooks:
        hook.remove()
    repeated = {name: count for name, count in calls.items() if count > 1}
    require(not repeated, f"Expected every submodule to run once in log_prob, got {repeated}.")


def _distributions(transform: Any, context: Tensor | None) -> tuple[Any, Any]:
    """A standard normal carried to the transform's domain, and the transform over it."""
    normal = dist.Normal(torch.zeros(transform.input_dim), 1.0).to_event(1)
    base = dist.TransformedDistribution(normal, [biject_to(transform.domain)])
    if context is None:
        return base, dist.TransformedDistribution(base, [transform])
    conditional = dist.ConditionalTransformedDistribution(base, [transform])
    return base, conditional.condition(context)
