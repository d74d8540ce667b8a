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
# each with the address by which PyTorch knows its storage
_buffers: list[tuple[Tensor, int]] = []


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor of shape ``(rows, columns)``."""
    size = rows * columns
    with _lock:
        held = 0
        for buffer, storage in _buffers:
            fits = buffer.dtype == dtype and size <= buffer.numel() <= 2 * size
            if fits and _is_free(storage):
                return buffer[:size].view(rows, columns)
            held += buffer.nbytes
        buffer = torch.empty(size, dtype=dtype, device="cpu")
        if held + buffer.nbytes > LIMIT_BYTES:
            _buffers[:] = [entry for entry in _buffers if not _is_free(entry[1])]
        else:
            _buffers.append((buffer, buffer.untyped_storage()._cdata))
        return buffer.view(rows, columns)


def _is_free(storage: int) -> bool:
    return torch._C._storage_Use_Count(storage) == 1
