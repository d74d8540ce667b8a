"""Whether arguments are those of the last call, without reading them."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

_PLAIN = (bool, int, float, str, bytes, type(None))


class SameCall:
    """Remembers the arguments of the last call: tensors by what they are and whether they were written to.

    Objects that are neither tensors nor plain values may have changed. Copies and pickles remember nothing.
    """

    def __init__(self) -> None:
        self._last: tuple | None = None

    def __call__(self, args: tuple, kwargs: dict) -> bool:
        """Whether these are the arguments of the last call; they are then the last."""
        leaves, structure = tree_flatten((args, kwargs))
        last = self._last
        known = all(isinstance(leaf, _PLAIN) or _has_version(leaf) for leaf in leaves)
        self._last = (structure, [_note(leaf) for leaf in leaves]) if known else None
        if last is None or not known:
            return False
        return structure == last[0] and all(
            _is_same(leaf, note) for leaf, note in zip(leaves, last[1], strict=True)
        )

    def forget(self) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}


def _has_version(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not torch.is_inference(leaf)


def _note(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return weakref.ref(leaf), leaf._version
    return type(leaf), leaf


def _is_same(leaf: Any, note: tuple) -> bool:
    if isinstance(leaf, Tensor):
        refers = isinstance(note[0], weakref.ref)
        return refers and note[1] == leaf._version and note[0]() is leaf
    return note == (type(leaf), leaf)
