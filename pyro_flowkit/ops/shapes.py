"""The shape that several broadcast to."""

from collections.abc import Sequence

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """As ``torch.broadcast_shapes``, which imports SymPy when it is first called and takes 30 microseconds after that.

    Raises:
        RuntimeError: if they do not broadcast.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # sizes are symbols there
        return torch.Size(torch.broadcast_shapes(*shapes))
    sizes = [1] * max(map(len, shapes))
    for shape in shapes:
        for i, size in enumerate(reversed(shape), 1):
            if sizes[-i] == 1:
                sizes[-i] = size
            elif size not in (1, sizes[-i]):
                return torch.Size(torch.broadcast_shapes(*shapes))  # which says what does not fit
    return torch.Size(sizes)
