"""What the hand-written ``autograd.Function`` of this package need: to know that nobody looks inside, and how to be
differentiated twice."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Whether ``torch.jit``, ``torch.func`` or a forward-mode derivative is at work; under ``torch.compile`` too."""
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors in eager mode: no compiler, tracer, ``torch.func``, dispatch mode or
    forward-mode derivative that would have to see every operation."""
    if torch.compiler.is_compiling() or is_transformed() or torch._C._len_torch_dispatch_stack():
        return False
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def was_made_by(node: Any, function: type[torch.autograd.Function]) -> bool:
    """Whether a node of the autograd graph is one of a function; never where PyTorch does not tell."""
    return isinstance(node, getattr(function, "_backward_cls", ()))


def differentiate(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Derivatives of ``function(*tensors)`` that can be differentiated again, for use in a backward pass.

    One of the tensors may depend on another, and a derivative must not follow that path: hence the views.
    """
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    outputs = function(*tensors)
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]
