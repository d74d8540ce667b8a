"""The modules of programs: what a method belongs to, and what plain functions register by ``pyro.module``.

Of the latter the param store knows the parameters, but neither their buffers (the running statistics of batch
normalisation) nor their mode (dropout in training, none in validation), which both matter. The modules are found among
what the functions mention: in closures, globals and defaults, and in the object or partial that they are bound to.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
from torch import Tensor, nn

DIVIDER = "$$$"  # Pyro's, between the name of a module and that of its parameter


def modules_of(*functions: Any) -> list[nn.Module]:
    """The modules among callables; a bound method stands for the module that it belongs to."""
    found: list[nn.Module] = []
    for function in functions:
        module = getattr(function, "__self__", function)
        if isinstance(module, nn.Module) and all(module is not other for other in found):
            found.append(module)
    return found


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share nothing with the originals."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def registered_modules(*programs: Callable[..., Any] | None) -> dict[str, nn.Module]:
    """Modules by the name that they have in the param store, without those that the programs belong to."""
    entries: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in pyro.get_param_store()._params.items():
        name, divider, path = full_name.partition(DIVIDER)
        if divider:
            entries.setdefault(name, {})[path] = tensor
    if not entries:
        return {}
    own = {id(part) for module in modules_of(*programs) for part in module.modules()}
    found: dict[str, nn.Module] = {}
    for root in _mentioned(programs):
        for part in root.modules():
            if id(part) in own:
                continue
            parameters = dict(part.named_parameters())
            for name, stored in entries.items():
                if all(parameters.get(path) is tensor for path, tensor in stored.items()):
                    found.setdefault(name, part)
    return dict(sorted(found.items()))


def buffers_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Their buffers, named as the param store names their parameters."""
    return {
        f"{name}{DIVIDER}{path}": buffer
        for name, module in modules.items()
        for path, buffer in module.named_buffers()
    }


def _mentioned(programs: Iterable[Any]) -> Iterator[nn.Module]:
    waiting, seen = list(programs), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            waiting += [
                value.__func__,
                value.__self__,
                *getattr(value.__self__, "__dict__", {}).values(),
            ]
        elif inspect.isfunction(value):
            waiting += _mentioned_by(value)
        elif type(value) in (list, tuple):
            waiting += [part for part in value if isinstance(part, nn.Module)]
        elif type(value) is dict:
            waiting += [part for part in value.values() if isinstance(part, nn.Module)]


def _mentioned_by(function: types.FunctionType) -> list[Any]:
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    values += [
        function.__globals__[name]
        for name in _names(function.__code__)
        if name in function.__globals__
    ]
    # other functions of the same file, not whole libraries
    return [
        value
        for value in values
        if not inspect.isfunction(value) or value.__module__ == function.__module__
    ]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
