"""What of a function depends on no input, computed while the function is recorded instead of in its graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary


class ConstantsFirst(TorchDispatchMode):
    """Under ``make_fx``: keeps out of the graph what follows from tensors that are neither inputs nor parameters.

    Their values can then be read. What the graph keeps of them are their values as they were.

    Args:
        inputs: of the function.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self._varying = WeakTensorKeyDictionary()
        self._own = WeakTensorKeyDictionary()  # constants that the function itself has made
        for tensor in inputs:
            self._varying[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._is_constant(func, tensors) and self._may_change(func, args, kwargs):
            with disable_proxy_modes_tracing():
                found = func(*args, **kwargs)
            is_view = any(value.alias_info is not None for value in func._schema.returns)
            if not is_view or all(tensor in self._own for tensor in tensors):
                self._note(self._own, found)
            return found
        found = func(*args, **kwargs)
        self._note(self._varying, found)
        return found

    def _is_constant(self, func: Any, tensors: list[Tensor]) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        return not any(tensor.requires_grad or tensor in self._varying for tensor in tensors)

    def _may_change(self, func: Any, args: Any, kwargs: Any) -> bool:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = [
            given.get(argument.name)
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        leaves = [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, Tensor)]
        return all(leaf in self._own for leaf in leaves)

    @staticmethod
    def _note(where: Any, found: Any) -> None:
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                where[leaf] = True
