"""Checks of the map: a bijection with the right log-det, edges too, in any shape and dtype."""

import copy
import math
from functools import partial
from typing import Any

import torch

from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.testing.support import (
    NAMES,
    TOLERANCE,
    Tails,
    along_each_dimension,
    conditioned,
    evaluate,
    is_elementwise,
    log_det,
    no_validation,
    perturb_,
    prepared,
    require,
    require_close,
    require_finite_at,
    require_value_error,
    sample_context,
    sample_points,
)


def check_round_trip(transform: Any) -> None:
    """x -> y -> x in float32 and float64, with opposite log-dets."""
    for dtype in (torch.float32, torch.float64):
        copied, x, context = prepared(transform, (64,), dtype=dtype)
        with torch.no_grad():
            y, ladj, back, inverse_ladj = evaluate(copied, x, context)
        require_close(back, x, f"x -> y -> x in {dtype}")
        require_close(-inverse_ladj, ladj, f"log-det of the inverse in {dtype}")


def check_log_det(transform: Any) -> None:
    """Both log-dets, and the sign, against the Jacobian that autograd finds; by element, too, where they are that."""
    copied, xs, context = prepared(transform, (4,), dtype=torch.float64)
    f = conditioned(copied, None if context is None else context[0])
    for x in xs:
        y = f(x).detach()
        for name, g, start, end in (("forward", f, x, y), ("inverse", f.inv, y, x)):
            jacobian = torch.autograd.functional.jacobian(g, start)
            sign, expected = torch.linalg.slogdet(jacobian)
            require_close(log_det(g, start, end), expected, f"{name} log-det")
            if is_elementwise(g):
                by_element = g.log_abs_det_jacobian(start, end)
                require_close(by_element, jacobian.diagonal().log(), f"{name} log-det by element")
            stated = _stated_sign(f)
            require(
                stated in (None, sign.item()),
                f"Expected a Jacobian of sign {stated} ({name}), got {sign.item():g}.",
            )


def check_pushed_derivative(transform: Any) -> None:
    """The derivative of a log-density, carried through the map, against the Jacobian; both with a graph and without.

    For transforms that have ``pushed_derivative``: those of this package.
    """
    copied, x, context = prepared(transform, (6,), dtype=torch.float64)
    f = conditioned(copied, context)
    if not hasattr(f, "pushed_derivative"):
        return
    derivative = sample_points(transform, (6,), dtype=torch.float64, seed=2)
    x.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda x: f.call_and_ladj(x)[0].sum(0), x)
    ladj = f.call_and_ladj(x)[1].sum()
    of_ladj = torch.autograd.grad(ladj, x, allow_unused=True)[0] if ladj.requires_grad else None
    left = derivative if of_ladj is None else derivative - of_ladj
    expected = torch.linalg.solve(jacobian.permute(1, 2, 0), left)
    for graph, start in (("with a graph", x), ("without a graph", x.detach())):
        with torch.set_grad_enabled(start.requires_grad):
            y = f.call_and_ladj(start)[0]
        found = f.pushed_derivative(start, y, derivative)
        require(not found.requires_grad, f"Expected a derivative without a graph ({graph}).")
        require_close(found, expected, f"derivative carried through the map ({graph})")


def _stated_sign(transform: Any) -> int | None:
    try:
        return transform.sign
    except NotImplementedError:  # Pyro's own transforms state none
        return None


def check_identity_at_init(transform: Any, *, tolerance: float = 2e-6) -> None:
    """A fresh transform is the identity, and its log-det 0, in float32; not for perturbed ones."""
    _, x, context = prepared(transform, (256,))
    x = x.clamp(-3.0, 3.0)
    with torch.no_grad():
        y, ladj, _, _ = evaluate(transform, x, context)
    worst, worst_ladj = (y - x).abs().max().item(), ladj.abs().max().item()
    require(
        max(worst, worst_ladj) <= tolerance,
        f"Expected the identity to {tolerance}, got |y - x| up to {worst:.3g} and |log-det| up to "
        f"{worst_ladj:.3g}.",
    )


def check_far(transform: Any) -> None:
    """Values, log-dets and parameter gradients are finite at 100 and 1e19, in both directions."""
    for value in (100.0, 1e19, -1e19):
        if bool(transform.domain.check(torch.full((transform.input_dim,), value)).all()):
            require_finite_at(transform, value)


def check_nan(transform: Any) -> None:
    """NaN stays NaN, in its own row only."""
    copied, x, context = prepared(transform, (3,))
    x[1, -1] = math.nan
    f = conditioned(copied, context)
    for name, g in (("forward", f), ("inverse", f.inv)):
        with no_validation():
            rows = g(x).isnan().any(-1).tolist()
        require(rows == [False, True, False], f"Expected NaN in row 1 only ({name}), got {rows}.")


def check_monotone(transform: Any, *, bound: float, tails: Tails = "linear") -> None:
    """Each output increases with its own input while the others stand still, both ways."""
    grid = torch.linspace(-bound, bound, 401, dtype=torch.float64)
    for name, i, y in along_each_dimension(transform, grid):
        step = y[:, i].diff().min().item()
        require(step > 0, f"Expected dimension {i} to increase ({name}), got a step of {step:.3g}.")


def check_edges(transform: Any, *, bound: float, tails: Tails = "linear") -> None:
    """The bounds map to the bounds, nothing jumps within an ulp of them, the tails are right."""
    edge = torch.tensor(bound)
    below, above = (torch.nextafter(edge, edge * factor) for factor in (0.0, 2.0))
    values = torch.stack([-above, -edge, -below, torch.zeros(()), below, edge, above])
    ulp = (above - edge).item()
    if tails is None:
        values = values[1:-1]
    for name, i, y in along_each_dimension(transform, values):
        own = y[:, i]
        require(bool(y.isfinite().all()), f"Expected finite values ({name}), got {y}.")
        require(bool((own.diff() >= 0).all()), f"Expected increasing values ({name}), got {own}.")
        at_edge = own[values.abs() == edge]
        require_close(at_edge, torch.stack([-edge, edge]), f"the bounds ({name})", 2 * ulp)
        if tails == "linear":
            outside = values.abs() > edge
            require_close(own[outside], values[outside], f"one ulp outside ({name})", 0.0)
    values = bound * torch.tensor([0.3, 2.3, -1.7, 12.3])
    for name, i, y in along_each_dimension(transform, values):
        own = y[:, i]
        if tails == "linear":
            require_close(own[1:], values[1:], f"outside ({name})", 0.0)
        elif tails == "circular":
            turns = 2.0 * bound * torch.tensor([1.0, -1.0, 6.0])
            require_close(own[1:] - own[0], turns, f"a shift by whole turns ({name})", 1e-5 * bound)
        else:
            seen = own.isnan().tolist()
            require(
                seen == [False, True, True, True], f"Expected NaN outside ({name}), got {seen}."
            )


def check_slope_at_bounds(transform: Any, *, bound: float, tails: Tails = "linear") -> None:
    """Slope and log-det are equal on both sides of the bounds; with linear tails the slope is 1."""
    if tails is None:
        return
    copied, base, context = prepared(transform, (), dtype=torch.float64)
    f = conditioned(copied, context)
    for i in range(transform.input_dim):
        for edge in (base.new_tensor(-bound), base.new_tensor(bound)):
            slopes, ladjs = [], []
            for v in (torch.nextafter(edge, edge * 0), edge, torch.nextafter(edge, edge * 2)):
                x = base.clone()
                x[i] = v
                slopes.append(torch.autograd.functional.jacobian(f, x)[i, i])
                ladjs.append(log_det(f, x, f(x)))
            for other in (0, 2):
                require_close(ladjs[other], ladjs[1], f"log-det across {edge.item()}", 1e-10)
                require_close(slopes[other], slopes[1], f"slope across {edge.item()}", 1e-10)
            if tails == "linear":
                require_close(
                    torch.stack(slopes), base.new_ones(3), f"slope at {edge.item()}", 1e-12
                )


def check_infinite(transform: Any, *, bound: float, tails: Tails = "linear") -> None:
    """inf stays inf in its own dimension; all else is finite, gradients too; both ways."""
    if tails is None:
        return
    for value in (math.inf, -math.inf):
        require_finite_at(transform, value)


def check_extreme_parameters(
    transform: Any, *, bound: float, tails: Tails = "linear", logit_scale: float = 8.0
) -> None:
    """Parameters ~ N(0, 8^2): finite, and the round trip holds in x or, where steep, in y."""
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-10)):
        for seed in range(5):
            copied, x, context = prepared(transform, (64,), dtype=dtype, seed=seed)
            perturb_(copied, logit_scale, seed)
            with torch.no_grad():
                y, ladj, back, _ = evaluate(copied, x, context)
                f = conditioned(copied, context)
                again = f(back)
            for name, value in (("y", y), ("log-det", ladj), ("x", back)):
                require(
                    bool(value.isfinite().all()), f"Expected finite {name} in {dtype}, got {value}."
                )
            in_x, in_y = (back - x).abs().amax(-1), (again - y).abs().amax(-1)
            error, allowed = torch.minimum(in_x, in_y).max().item(), tolerance * (1 + bound)
            require(
                error <= allowed,
                f"Expected a round trip to {allowed:.3g} in {dtype}, got {error:.3g}.",
            )


def check_shapes(transform: Any) -> None:
    """``(*batch, D)`` to ``(*batch, D)`` and ``(*batch,)``, also empty; rows are independent."""
    _, rows, context = prepared(transform, (6,))
    with torch.no_grad():
        expected = evaluate(transform, rows, context)
    for batch in ((6,), (), (2, 3), (1, 6, 1), (0,), (2, 0)):
        count = math.prod(batch)
        x = rows[:count].reshape(*batch, transform.input_dim)
        c = None
        if context is not None:
            c = context[:count].reshape(*batch, transform.context_dim)
        with torch.no_grad():
            got = evaluate(transform, x, c)
        vector = (*batch, transform.input_dim)
        shapes = (vector, batch, vector, batch)
        for name, value, shape, want in zip(NAMES, got, shapes, expected, strict=True):
            got_shape = tuple(value.shape)
            require(got_shape == shape, f"Expected {name} of shape {shape}, got {got_shape}.")
            require_close(value, want[:count].reshape(shape), f"{name} for batch {batch}")


def check_context(transform: Any) -> None:
    """A context broadcasts against the batch and widens it; a missing or wrong one is an error."""
    for x_batch, context_batch in (((3,), (2, 1)), ((), (4,)), ((4,), ()), ((2, 1), (1, 3))):
        batch = broadcast_shapes(x_batch, context_batch)
        x, context = sample_points(transform, x_batch), sample_context(transform, context_batch)
        if context is None:
            return
        with torch.no_grad():
            got = evaluate(transform, x, context)
            full_x, full_context = x.expand(*batch, -1), context.expand(*batch, -1)
            expected = evaluate(transform, full_x, full_context)
        for name, value, want in zip(NAMES, got, expected, strict=True):
            require(
                value.shape == want.shape,
                f"Expected {name} of shape {tuple(want.shape)}, got {tuple(value.shape)}.",
            )
            require_close(value, want, f"{name} for x {x_batch} and context {context_batch}")
    size = transform.context_dim
    require_value_error(partial(transform.condition, None), [size], "a missing context")
    wrong = torch.zeros(3, size + 1)
    require_value_error(partial(transform.condition, wrong), [size, size + 1], "a wide context")


def check_input_errors(transform: Any) -> None:
    """An input of another size is a ValueError that gives both sizes, in both directions."""
    f = conditioned(transform, sample_context(transform))
    wrong = torch.zeros(3, transform.input_dim + 1)
    for g in (f, f.inv):
        require_value_error(
            partial(g, wrong),
            [transform.input_dim, transform.input_dim + 1],
            "an input too wide",
        )


def check_dtypes(transform: Any) -> None:
    """dtype in = dtype out, finite, near the float64 result; the module may be float32."""
    for dtype, tolerance in TOLERANCE.items():
        for module_dtype in {dtype, torch.float32}:
            module = copy.deepcopy(transform).to(module_dtype)
            reference = copy.deepcopy(module).double()
            x = sample_points(transform, (32,), dtype=dtype)
            context = sample_context(transform, (32,), dtype=dtype)
            with torch.no_grad():
                got = evaluate(module, x, context)
                y, ladj, _, _ = evaluate(
                    reference, x.double(), None if context is None else context.double()
                )
            for name, value in zip(NAMES, got, strict=True):
                require(value.dtype == dtype, f"Expected {name} in {dtype}, got {value.dtype}.")
                require(bool(value.isfinite().all()), f"Expected finite {name}, got {value}.")
            looser = max(tolerance, TOLERANCE[module_dtype])
            require_close(got[0].double(), y, f"y in {dtype}", looser)
            require_close(got[1].double(), ladj, f"log-det in {dtype}", 2 * looser)
