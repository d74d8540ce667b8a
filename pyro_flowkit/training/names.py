"""Modules that would share entries of the param store without meaning to: the second one gets a name of its own.

Pyro names the parameters of a ``PyroModule`` after its name, and all ``AutoNormal`` have the same. The second one of a
program would train the parameters of the first, whose posterior then changes with it, silently; and one that is built
when the first is gone, in a loop over folds or in a cell that is run again, would begin where that ended.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import nn

from pyro_flowkit._pyro import StoreModule
from pyro_flowkit.programs.modules import DIVIDER, modules_of
from pyro_flowkit.warning import warn

_names: set[str] = set()  # that were ever trained under
_owners: weakref.WeakValueDictionary[str, PyroModule] = weakref.WeakValueDictionary()


def separate_names(*programs: Any) -> None:
    """Renames modules whose name another live module has trained under, with a warning.

    Modules of this package see to their names themselves. One that has run before it came here has already taken over
    the other's parameters: that is said, and left.
    """
    for module in modules_of(*programs):
        if not isinstance(module, PyroModule) or isinstance(module, StoreModule):
            continue
        name = module._pyro_name
        owner = _owner(name, module)
        if owner is None and name in _names:
            _drop_left_over(name, module)
        if owner is not None and owner is not module and _lends(owner):
            kind = type(module).__name__
            if _parameters(owner) & _parameters(module):
                warn(
                    f"This {kind} shares its parameters with another live one of the same name, {name!r}: training one "
                    "changes the other. Train it before the other is called, or call pyro.clear_param_store() between."
                )
                continue
            numbered = (f"{name or kind}_{i}" for i in itertools.count(1))
            own = next(candidate for candidate in numbered if candidate not in _owners)
            warn(
                f"The param store holds the parameters of another live {type(owner).__name__} under the name of this "
                f"{kind}, {name!r}: this one is trained by itself, under the name {own!r}."
            )
            module._pyro_set_supermodule(own, module._pyro_context)
            name = own
        _owners[name] = module
        _names.add(name)


def _owner(name: str, module: PyroModule) -> PyroModule | None:
    """The live module that trained under a name."""
    owner = _owners.get(name)
    if owner is None or owner is module:
        return owner
    del owner
    gc.collect()  # one that only reference cycles keep is not live
    return _owners.get(name)


def _drop_left_over(name: str, module: PyroModule) -> None:
    """Take the entries out of the store that were trained under a name by a module that is gone.

    Those that were loaded or set, or saved, since the last run of that module are left: Pyro hangs an attribute on an
    entry without a constraint when it is used, and takes it off when a state is taken.
    """
    store, own = pyro.get_param_store(), _parameters(module)
    full_names = {
        f"{part._pyro_name}.{parameter}" if part._pyro_name else parameter
        for part in module.modules()
        if isinstance(part, PyroModule)
        for parameter in part._parameters
    }
    left = {
        key: entry
        for key, entry in store._params.items()
        if key in full_names or (name and key.startswith((f"{name}.", f"{name}{DIVIDER}")))
    }
    was_used = any("unconstrained" in entry.__dict__ for entry in left.values())
    if was_used and not own & {id(entry) for entry in left.values()}:
        for key in left:
            del store[key]


def _parameters(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _lends(module: nn.Module) -> bool:
    """Whether the param store still holds the module's own tensors."""
    own = _parameters(module)
    return any(id(entry) in own for entry in pyro.get_param_store()._params.values())
