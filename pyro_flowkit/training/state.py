"""Copies of everything a fit changes: parameters (modules' and param store's) and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def modules_of(*functions: Any) -> list[torch.nn.Module]:
    """The modules among callables; a bound method stands for the module that it belongs to."""
    found: list[torch.nn.Module] = []
    for function in functions:
        module = getattr(function, "__self__", function)
        if isinstance(module, torch.nn.Module) and all(module is not other for other in found):
            found.append(module)
    return found


@contextmanager
def evaluating(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Puts modules into eval mode, and every submodule back into its own mode afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


class Snapshot:
    """A copy of parameters and buffers that can be put back in place.

    Args:
        modules: Modules whose buffers belong to the state.
        parameters: Called to list the parameters.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        parameters: Callable[[], list[torch.Tensor]],
    ) -> None:
        self._modules = modules
        self._parameters = [(tensor, tensor.detach().clone()) for tensor in parameters()]
        self._buffers = [
            {name: buffer.clone() for name, buffer in module.named_buffers()} for module in modules
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the copied values back into the live tensors."""
        for tensor, saved in self._parameters:
            tensor.copy_(saved)
        for module, buffers in zip(self._modules, self._buffers, strict=True):
            live = dict(module.named_buffers())
            for name, saved in buffers.items():
                live[name].copy_(saved)
