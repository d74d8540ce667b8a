"""The tensors that modules, transforms and distributions compute with, and whether one was written to since."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform


def stamp(tensors: list[Tensor], value: Tensor) -> tuple:
    """What must not have changed for a result computed from ``tensors`` and ``value`` to hold still."""
    return torch.is_grad_enabled(), version(value), [*map(id, tensors)], [*map(version, tensors)]


def version(tensor: Tensor) -> int:
    """Number of in-place writes so far; inference tensors do not count them, nor can they be written later."""
    return -1 if tensor.is_inference() else tensor._version


def modules_in(root: nn.Module) -> Iterable[nn.Module]:
    """The same as ``root.modules()``, which spends most of its time on names."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(module._modules.values())
    return found


def tensors_in(root: nn.Module) -> list[Tensor]:
    """The same as ``[*root.parameters(), *root.buffers()]`` in another order, without their names."""
    tensors: list[Tensor] = []
    for module in modules_in(root):
        for owned in (module._parameters, module._buffers):
            tensors += [tensor for tensor in owned.values() if tensor is not None]
    return tensors


def tensors_of(*parts: Any) -> list[Tensor]:
    """The tensors that distributions and transforms compute with."""
    tensors: list[Tensor] = []
    seen: set[int] = set()  # a transform and its inverse may refer to each other
    waiting = list(parts)
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, _LISTS):
            waiting.extend(part)
        elif isinstance(part, _OWNERS) and id(part) not in seen:
            seen.add(id(part))
            if isinstance(part, nn.Module):
                tensors += tensors_in(part)
            else:
                waiting.extend(vars(part).values())
    return tensors


def forget_unconstrained(module: nn.Module) -> None:
    """Remove the weak references that Pyro's param store hangs on parameters, which cannot be pickled."""
    for tensor in tensors_in(module):
        tensor.__dict__.pop("unconstrained", None)


_LISTS = (list, tuple)
_OWNERS = (nn.Module, torch.distributions.Distribution, Transform)
