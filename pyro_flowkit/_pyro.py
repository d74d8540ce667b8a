"""How the modules of this package stay in step with Pyro's param store.

A module of this package owns its parameters. Under a deterministic name it lends them to Pyro's param store at every
forward, so that the store holds the very tensors that the module computes with:

- nothing under the name: the module's tensors go into the store;
- tensors that came from outside, a store that was loaded or set, of the same names and shapes: their values are copied
  into the module, and the module's tensors take their place;
- tensors that a module lent which is gone: they are nobody's, and dropped. A loop over folds, or a cell that is run
  again, starts as in a process of its own;
- tensors that another live module lent: the new module takes a suffix and starts fresh. A guide warns, since two of one
  name are rarely meant; flows that stand by themselves are many in one program, and numbered in the order of their use.

Float buffers and frozen parameters are part of what the store holds, but not of what Pyro's optimizers see. As
everything in the store is taken for trainable (people hang gradient hooks on it), their entries are aliases that ask
for gradients and never get any.
"""

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.nn.module import _Context, _is_module_local_param_enabled
from torch import Tensor, nn

from pyro_flowkit.transforms.tensors import forget_unconstrained
from pyro_flowkit.warning import warn

# What the store has as the constraint of an entry that was lent. Pyro looks at the type alone, and puts its own object
# in the place of this one where a state is loaded or set.
_LENT = type(constraints.real)()

_lenders: "weakref.WeakValueDictionary[str, StoreModule]" = weakref.WeakValueDictionary()
_lent: dict[str, "_Loan"] = {}
_uses: Counter[str] = Counter()  # by the lender of today
_short_lives: Counter[str] = Counter()  # of lenders in a row that were trained after their only use


class _Loan(NamedTuple):
    """An entry of the store, who lent it, and the version of the tensor then."""

    entry: "weakref.ref[Tensor]"
    lender: "weakref.ref[PyroModule]"
    version: int


class StoreModule(PyroModule):
    """A ``PyroModule`` whose parameters, however deep, are in Pyro's param store under ``name.path.to.parameter``.

    Children named in ``_keep_own_entries`` see to their entries themselves, under the module's name.
    """

    _pyro_name: str
    _warns_of_other_name = False
    _keep_own_entries: tuple[str, ...] = ()

    def __init__(self, name: str):
        super().__init__(name=name)
        self._store_name: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which cannot enter Pyro's context of names in the store
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # PyroModule would register plain submodules a second time, under other names and without reading them back.
        return nn.Module.__getattr__(self, name)

    def sync_with_store(self, *, lend: bool = True) -> None:
        """Bring module and param store in step.

        Args:
            lend: put the module's tensors into the store, and state its trainable parameters as ``pyro.param`` sites;
                otherwise only read what the store holds under the module's name.

        Raises:
            ValueError: if the store holds entries under the module's name that do not fit it.
        """
        if torch.compiler.is_compiling():  # a graph has the module's own tensors, and no store
            return
        if _is_module_local_param_enabled():
            if lend:
                self._state_local_params()
            return
        if not self._claim_name(lend):
            return
        _uses[self._pyro_name] += lend
        params = pyro.get_param_store()._params
        for name, tensor in _own_tensors(self, f"{self._pyro_name}."):
            stored = params.get(name)
            if stored is not tensor and (stored is None or not _is_entry_of(stored, tensor)):
                if stored is not None and not _was_lent_by(self, name, stored):
                    if stored.shape != tensor.shape:  # loaded since the name was claimed
                        raise ValueError(_misfit(self._pyro_name, self))
                    with torch.no_grad():
                        tensor.copy_(stored)
                    self._stored_values_taken()
                if lend:
                    _lend(self, name, tensor)
            if lend and tensor.requires_grad:
                _state(name, tensor, constraint=constraints.real, name=name)

    def _stored_values_taken(self) -> None:
        """Called when values of a store that was loaded have become the module's."""

    def _claim_name(self, lend: bool) -> bool:
        """Find the module's name in the store; False if all there is to read there is another module's."""
        if self._store_name == self._pyro_name and _lenders.get(self._pyro_name) is self:
            return True
        candidates = _candidates(self._pyro_name)
        name = next(n for n in candidates if not _is_lent_by_another(n, self, collect=lend))
        if not lend and name != self._pyro_name:
            return False
        if name != self._pyro_name and self._store_name is None and self._warns_of_other_name:
            warn(
                f"The param store holds the parameters of another live {self._pyro_name}: this one starts fresh, under "
                f"the name {name}."
            )
        if _is_left_over(name, self):
            if not lend:
                return False
            _drop(name, list(_entries(name, self)))
        if not _fits(name, self):
            raise ValueError(_misfit(name, self))
        if lend:
            self._store_name = name
            _lenders[name] = self
            for path, module in self.named_modules():
                if isinstance(module, PyroModule):
                    module._pyro_name = f"{name}.{path}" if path else name
        return True

    def _state_local_params(self) -> None:
        # As PyroModule does it: handlers see the parameter, the store does not.
        for name, parameter in _own_tensors(self, f"{self._pyro_name}."):
            if parameter.requires_grad:
                _state(name, parameter, constraint=constraints.real, name=name)

    def __getstate__(self) -> dict[str, Any]:
        forget_unconstrained(self)
        return super().__getstate__()


class _Silence(_Context):
    """The context of a ``PyroModule`` that takes itself for one outside of any call, and states no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.param_state: dict[str, dict] = {"params": {}, "constraints": {}}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        pass


def silence(module: nn.Module) -> None:
    """Keep every ``PyroModule`` in it from stating parameters by itself: its owner does."""
    for part in module.modules():
        if isinstance(part, PyroModule) and not isinstance(part._pyro_context, _Silence):
            part._pyro_context = _Silence()


@pyro.poutine.runtime.effectful(type="param")
def _state(name: str, parameter: Tensor, *, constraint: constraints.Constraint) -> Tensor:
    """``pyro.param``, for a parameter whose store entry is known to be the parameter itself."""
    if "unconstrained" not in parameter.__dict__:
        parameter.__dict__["unconstrained"] = weakref.ref(parameter)  # as the store does
    return parameter


class _Attributes(dict):
    """The attributes of a parameter, with a call when Pyro's param store makes it fit to be saved."""

    def __init__(self, attributes: dict[str, Any], call: "weakref.WeakMethod[Callable[[], None]]"):
        super().__init__(attributes)
        self._call = call

    def pop(self, name: str, *default: Any) -> Any:
        call = self._call() if name == "unconstrained" else None
        if call is not None:
            call()
        return super().pop(name, *default)


def before_saving(parameter: nn.Parameter, method: Callable[[], None]) -> None:
    """Have a method called before the state of the param store is taken, or written to a file.

    ``ParamStoreDict.get_state`` tells nobody, but takes the weak reference off every parameter that it hung there.
    """
    parameter.__dict__ = _Attributes(parameter.__dict__, weakref.WeakMethod(method))


def _own_tensors(module: StoreModule, prefix: str = "") -> list[tuple[str, Tensor]]:
    """What ``module.state_dict(keep_vars=True)`` holds in floating point, at a fraction of its cost.

    Without that of children which keep their own entries.
    """
    found: list[tuple[str, Tensor]] = []
    waiting: list[tuple[str, nn.Module]] = [(prefix, module)]
    while waiting:
        path, part = waiting.pop()
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                found.append((path + name, parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                if name not in part._non_persistent_buffers_set:
                    found.append((path + name, buffer))
        if part._modules:
            skipped = module._keep_own_entries if part is module else ()
            children = [
                (f"{path}{name}.", child)
                for name, child in part._modules.items()
                if child is not None and name not in skipped
            ]
            waiting += reversed(children)
    return found


def _candidates(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{i}" for i in itertools.count(1))


def _entries(name: str, module: StoreModule) -> Iterator[str]:
    others = tuple(f"{name}.{child}." for child in module._keep_own_entries)
    return (
        key
        for key in pyro.get_param_store()._params
        if key.startswith(f"{name}.") and not key.startswith(others)
    )


def _is_lent_by_another(name: str, module: StoreModule, *, collect: bool) -> bool:
    def lent() -> bool:
        owner = _lenders.get(name)
        if owner is None or owner is module:
            return False
        params = pyro.get_param_store()._params
        pairs = ((params.get(f"{name}.{key}"), tensor) for key, tensor in _own_tensors(owner))
        return any(stored is not None and _is_entry_of(stored, tensor) for stored, tensor in pairs)

    if not (lent() and collect):
        return lent()
    gc.collect()  # an owner kept only by reference cycles is no live owner; once in a module's life, for it is slow
    return lent()


def _is_left_over(name: str, module: StoreModule) -> bool:
    """Whether entries are there, all lent by modules that are gone, and none loaded or set since."""
    entries, constraint_of = list(_entries(name, module)), pyro.get_param_store()._constraints
    return bool(entries) and all(
        constraint_of.get(key) is _LENT and _lent[key].lender() is None for key in entries
    )


def _drop(name: str, entries: list[str]) -> None:
    """Take entries of a module that is gone out of the store; a word where modules live for one step each."""
    store = pyro.get_param_store()
    was_trained = any(store._params[key]._version != _lent[key].version for key in entries)
    for key in entries:
        del store[key]
    _short_lives[name] = _short_lives[name] + 1 if was_trained and _uses[name] == 1 else 0
    _uses[name] = 0
    if _short_lives[name] == 2:
        warn(
            f"{name} was built anew for every step, the third time now, so that it never learns: build it once, "
            "outside of model and guide."
        )


def _fits(name: str, module: StoreModule) -> bool:
    stored = {
        key.removeprefix(f"{name}."): pyro.get_param_store()._params[key].shape
        for key in _entries(name, module)
    }
    return not stored or stored == {key: tensor.shape for key, tensor in _own_tensors(module)}


def _misfit(name: str, module: StoreModule) -> str:
    params = pyro.get_param_store()._params
    tensors = dict(_own_tensors(module))
    for key, tensor in tensors.items():
        stored = params.get(f"{name}.{key}")
        if stored is None or stored.shape != tensor.shape:
            got = "nothing" if stored is None else f"shape {tuple(stored.shape)}"
            problem = f"Expected {name}.{key} of shape {tuple(tensor.shape)}, got {got}"
            break
    else:
        extra = next(
            key for key in _entries(name, module) if key.removeprefix(f"{name}.") not in tensors
        )
        problem = f"Expected {len(tensors)} entries under {name}, got also {extra}"
    return (
        f"The param store holds {name} with other shapes. {problem}. Build the module with the settings that the store "
        "was saved with, or call pyro.clear_param_store() first."
    )


def _lend(module: PyroModule, name: str, tensor: Tensor) -> None:
    store = pyro.get_param_store()
    if name in store:
        del store[name]
    entry = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    store._params[name] = entry
    store._param_to_name[entry] = name
    store._constraints[name] = _LENT
    _lent[name] = _Loan(weakref.ref(entry), weakref.ref(module), entry._version)


def _is_entry_of(stored: Tensor, tensor: Tensor) -> bool:
    """Whether a store entry is the tensor itself or its alias."""
    if (
        stored is tensor or torch.jit.is_tracing()
    ):  # what is traced has been run, and brought into step, before
        return True
    shares = not tensor.requires_grad and stored.data_ptr() == tensor.data_ptr()
    return shares and stored.shape == tensor.shape and stored.dtype == tensor.dtype


def _was_lent_by(module: PyroModule, name: str, stored: Tensor) -> bool:
    """Whether an entry is what this module lent earlier, before ``.to()`` or the like gave it another tensor."""
    if name not in _lent:
        return False
    loan = _lent[name]
    return loan.entry() is stored and loan.lender() is module
