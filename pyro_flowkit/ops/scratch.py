"""Memory for what a forward pass keeps for its backward pass, used again from step to step.

Fresh memory is slow: the C library hands what a step frees back to the system, and the next step pays for every page
again, more than for the arithmetic on it. A buffer here is free again as soon as no tensor that was made from it is
alive, which the graph of a step sees to.
"""

import threading
import weakref

import torch
from torch import Tensor

# buffers beyond this are left to PyTorch
LIMIT_BYTES = 256 * 2**20

_lock = threading.Lock()
_buffers: list[tuple[Tensor, "weakref.ref[Tensor]"]] = []


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor of shape ``(rows, columns)``."""
    size = rows * columns
    with _lock:
        held = 0
        for i, (buffer, user) in enumerate(_buffers):
            fits = buffer.dtype == dtype and size <= buffer.numel() <= 2 * size
            if fits and user() is None:
                return _lend(i, buffer, rows, columns)
            held += buffer.nbytes
        buffer = torch.empty(size, dtype=dtype)
        if held + buffer.nbytes > LIMIT_BYTES:
            _buffers[:] = [entry for entry in _buffers if entry[1]() is not None]
            return buffer.view(rows, columns)
        _buffers.append((buffer, weakref.ref(buffer)))
        return _lend(len(_buffers) - 1, buffer, rows, columns)


def _lend(i: int, buffer: Tensor, rows: int, columns: int) -> Tensor:
    user = buffer[: rows * columns].view(rows, columns)
    _buffers[i] = (buffer, weakref.ref(user))
    return user
