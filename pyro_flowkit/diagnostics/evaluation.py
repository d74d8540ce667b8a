"""What holds while a diagnostic looks at programs: no gradients, modules in eval mode, a seed of its own."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pyro_flowkit.programs.modules import registered_modules


@contextlib.contextmanager
def evaluation(*programs: Any, seed: int | None = None) -> Iterator[None]:
    """No gradients, modules in eval mode, and a seed of its own, all undone afterwards.

    Those that plain functions register by ``pyro.module`` are among the modules.
    """
    owners = [owner(program) for program in programs]
    roots = [*filter(lambda owner: isinstance(owner, nn.Module), owners)]
    roots += registered_modules(*programs).values()
    modules = [module for root in roots for module in root.modules()]
    modes = [module.training for module in modules]
    devices = range(torch.cuda.device_count()) if seed is not None else ()
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def owner(program: Any) -> Any:
    """The module that a program is, or is a method of."""
    while isinstance(program, functools.partial):
        program = program.func
    return getattr(program, "__self__", program)
