"""Memory for what a forward pass keeps for its backward pass, used again from step to step.

Fresh memory is slow: the C library hands what a step frees back to the system, and the next step pays for every page
again, more than for the arithmetic on it. A buffer here is free again as soon as no tensor that was made from it is
alive, whatever aliases there are: its storage counts them.
"""

import threading

import torch
from torch import Tensor

# buffers beyond this are left to PyTorch
LIMIT_BYTES = 256 * 2**20

_lock = threading.Lock()
# by size and type, each with the address by which PyTorch knows its storage
_buffers: dict[tuple[int, torch.dtype], list[tuple[Tensor, int]]] = {}
_held_bytes = 0


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor of shape ``(rows, columns)``."""
    global _held_bytes
    size = rows * columns
    with _lock:
        alike = _buffers.setdefault((size, dtype), [])
        for buffer, storage in alike:
            if _is_free(storage):
                return buffer.view(rows, columns)
        buffer = torch.empty(size, dtype=dtype, device="cpu")
        if _held_bytes + buffer.nbytes > LIMIT_BYTES:
            _drop_free()
        else:
            alike.append((buffer, buffer.untyped_storage()._cdata))
            _held_bytes += buffer.nbytes
        return buffer.view(rows, columns)


def _drop_free() -> None:
    global _held_bytes
    for key, entries in list(_buffers.items()):
        _buffers[key] = [entry for entry in entries if not _is_free(entry[1])]
        if not _buffers[key]:
            del _buffers[key]
    _held_bytes = sum(buffer.nbytes for entries in _buffers.values() for buffer, _ in entries)


def _is_free(storage: int) -> bool:
    return torch._C._storage_Use_Count(storage) == 1
