"""Memory for what a forward pass keeps for its backward pass, used again from step to step.

Fresh memory is slow: the C library hands what a step frees back to the system, and the next step pays for every page
again, more than for the arithmetic on it. A buffer here is free again as soon as no tensor that was made from it is
alive, whatever aliases there are: its storage counts them. Where PyTorch does not tell the count, memory is fresh.
"""

import sys
import threading

import torch
from torch import Tensor

# buffers beyond this are left to PyTorch
LIMIT_BYTES = 256 * 2**20

_count_owners = getattr(torch._C, "_storage_Use_Count", None)
_lock = threading.Lock()
_held_bytes = 0


class _Buffer:
    """A piece of memory, which knows how many owners its storage has while nobody uses it."""

    def __init__(self, size: int, dtype: torch.dtype):
        self.tensor = torch.empty(size, dtype=dtype, device="cpu")
        self.storage = self.tensor.untyped_storage()
        self.idle = self._count_owners()

    def _count_owners(self) -> tuple[int, int]:
        """Of the memory in PyTorch, and of the object that stands for it in Python."""
        assert _count_owners is not None
        return _count_owners(self.storage._cdata), sys.getrefcount(self.storage)

    def is_free(self) -> bool:
        return self._count_owners() == self.idle


_buffers: dict[tuple[int, torch.dtype], list[_Buffer]] = {}


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor of shape ``(rows, columns)``."""
    global _held_bytes
    if _count_owners is None:
        return torch.empty(rows, columns, dtype=dtype, device="cpu")
    size = rows * columns
    with _lock:
        alike = _buffers.setdefault((size, dtype), [])
        for buffer in alike:
            if buffer.is_free():
                return buffer.tensor.view(rows, columns)
        buffer = _Buffer(size, dtype)
        if _held_bytes + buffer.tensor.nbytes > LIMIT_BYTES:
            _drop_free()
        else:
            alike.append(buffer)
            _held_bytes += buffer.tensor.nbytes
        return buffer.tensor.view(rows, columns)


def _drop_free() -> None:
    global _held_bytes
    for key, alike in list(_buffers.items()):
        _buffers[key] = [buffer for buffer in alike if not buffer.is_free()]
        if not _buffers[key]:
            del _buffers[key]
    _held_bytes = sum(buffer.tensor.nbytes for alike in _buffers.values() for buffer in alike)
