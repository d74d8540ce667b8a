"""What the checks are made of: points and contexts to try, ways to run a transform, comparisons."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

Tails = Literal["linear", "circular"] | None
Batch = Sequence[int]

# Rounding that a correct transform may show, relative to 1 + |value|.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 6e-2,
    torch.bfloat16: 5e-1,
}

NAMES = ("y", "log-det", "x", "inverse log-det")


def perturb_(transform: nn.Module, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """Add N(0, scale^2) noise to every parameter in place, so that the map is not the identity.

    Returns:
        The transform itself.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter))
    return transform


def sample_points(
    transform: Any,
    batch: Batch = (),
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.5,
    seed: int = 0,
) -> Tensor:
    """N(0, scale^2) carried to the transform's domain by ``biject_to``: ``(*batch, input_dim)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((*batch, transform.input_dim), generator=generator, dtype=torch.float64)
    return biject_to(transform.domain)(scale * noise).to(dtype)


def sample_context(
    transform: Any, batch: Batch = (), *, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor | None:
    """Standard normal context ``(*batch, context_dim)``; None where the transform takes none."""
    if not hasattr(transform, "condition"):
        return None
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((*batch, transform.context_dim), generator=generator, dtype=torch.float64)
    return noise.to(dtype)


def prepared(
    transform: Any, batch: Batch, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Any, Tensor, Tensor | None]:
    """A copy of the transform in ``dtype``, points and a context for it."""
    points = sample_points(transform, batch, dtype=dtype, seed=seed)
    context = sample_context(transform, batch, dtype=dtype, seed=seed + 1)
    return copy.deepcopy(transform).to(dtype), points, context


def conditioned(transform: Any, context: Tensor | None) -> Any:
    """The transform for this context, or the transform itself where there is none."""
    return transform if context is None else transform.condition(context)


def evaluate(transform: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
    """y = f(x) and its log-det, then f^-1(y) and its log-det; element-wise transforms are taken as maps of vectors."""
    f = conditioned(transform, context)
    if is_elementwise(f) and hasattr(f, "call_and_ladj"):
        y, ladj = f.call_and_ladj(x)
        return y, ladj, *f.inverse_and_ladj(y)
    y = f(x)
    back = f.inv(y)
    return y, log_det(f, x, y), back, -log_det(f, back, y)


def is_elementwise(f: Any) -> bool:
    """Whether log-dets are by element, as ``torch.distributions`` has them where the domain has ``event_dim`` 0."""
    return f.domain.event_dim == 0


def log_det(f: Any, x: Tensor, y: Tensor) -> Tensor:
    """log|det dy/dx| of the vector, shape ``(*batch,)``."""
    if is_elementwise(f):
        if hasattr(f, "call_and_ladj"):
            return f.call_and_ladj(x)[1]
        return f.log_abs_det_jacobian(x, y).sum(-1)
    return f.log_abs_det_jacobian(x, y)


class Evaluate(nn.Module):
    """:func:`evaluate` as a module, for the compilers."""

    def __init__(self, transform: Any):
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        return evaluate(self.transform, x, context)


def use(transform: Any, rows: int = 20) -> tuple[Tensor, ...]:
    """Outputs at fixed points, after a backward through all of them."""
    x, context = sample_points(transform, (rows,)), sample_context(transform, (rows,))
    outputs = evaluate(transform, x, context)
    total = torch.stack([output.sum() for output in outputs]).sum()
    if total.requires_grad:
        total.backward()
    return tuple(output.detach() for output in outputs)


class Owner(PyroModule):
    """A PyroModule that owns a transform and uses it."""

    def __init__(self, transform: Any):
        super().__init__()
        self.transform = transform

    def forward(self) -> tuple[Tensor, ...]:
        return use(self.transform)


def along_each_dimension(transform: Any, values: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Let dimension i run through ``values`` while the others stand still; each i, both ways.

    Yields:
        The direction, i, and the outputs, shape ``(len(values), input_dim)``.
    """
    copied, base, context = prepared(transform, (), dtype=values.dtype)
    f = conditioned(copied, context)
    for name, g in (("forward", f), ("inverse", f.inv)):
        for i in range(transform.input_dim):
            x = (0.5 * base).repeat(len(values), 1)
            x[:, i] = values
            with torch.no_grad(), no_validation():
                y = g(x)
            yield name, i, y


def require_finite_at(transform: Any, value: float) -> None:
    """Put ``value`` into one dimension after another: outputs and gradients stay finite, both ways.

    For an infinite value its own dimension's output must be that value, and all else finite.
    """
    size = transform.input_dim
    own = torch.eye(size, dtype=torch.bool)
    f = conditioned(transform, sample_context(transform))
    for name, g in (("forward", f), ("inverse", f.inv)):
        where = f"{name}, {value} in one dimension"
        x = sample_points(transform, (size,)).masked_fill(own, value).requires_grad_()
        transform.zero_grad()
        y = g(x)
        ladj = log_det(g, x, y)
        if math.isinf(value):
            diagonal = y.diagonal().tolist()
            require(diagonal == [value] * size, f"Expected {value} ({where}), got {diagonal}.")
            y = y.masked_fill(own, 0.0)
        require(bool(y.isfinite().all()), f"Expected finite values ({where}), got {y}.")
        require(bool(ladj.isfinite().all()), f"Expected finite log-dets ({where}), got {ladj}.")
        (y.sum() + ladj.sum()).backward()
        for parameter_name, parameter in [("x", x), *transform.named_parameters()]:
            grad = parameter.grad
            require(
                grad is None or bool(grad.isfinite().all()),
                f"Expected a finite gradient of {parameter_name} ({where}), got {grad}.",
            )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def require_close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[want.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(
        got,
        want,
        atol=tolerance,
        rtol=tolerance,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def require_same(transform: Any, expected: tuple[Tensor, ...], of: str) -> None:
    for name, got, want in zip(NAMES, use(transform), expected, strict=True):
        require_close(got, want, f"{name} {of}", 0.0)


def require_value_error(call: Callable[[], Any], numbers: Sequence[int], what: str) -> None:
    try:
        call()
    except ValueError as error:
        missing = [n for n in numbers if str(n) not in str(error)]
        require(not missing, f"Expected {missing} in the message for {what}, got: {error}")
    else:
        raise AssertionError(f"Expected a ValueError for {what}, got none.")


@contextmanager
def no_validation() -> Iterator[None]:
    """Argument validation off, and back to what it was."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def torch_jit_deprecations() -> Iterator[None]:
    """Ignore torch's note that ``torch.jit`` is deprecated (2.13), and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield
