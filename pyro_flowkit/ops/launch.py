"""Calls of the kernel: addresses instead of tensors, and large calls shared out among threads by rows."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_flowkit.ops.backend import kernel
from pyro_flowkit.ops.threads import run_in_threads


def launch(
    name: str,
    header: tuple[tuple[Any, ...], tuple[Any, ...]],
    rows: int,
    tensors: Sequence[Tensor | None],
    by_row: Sequence[bool | None],
    threads: int,
) -> None:
    """Call a function of the kernel.

    Args:
        name: of the function.
        header: its arguments before and after the number of rows, up to the addresses.
        rows: how many; they are shared out among the threads.
        tensors: contiguous. None stands for a tensor that is not there.
        by_row: for each of them, True if it has those rows, False if every thread needs all of it, None if it comes
            from :func:`per_thread`.
        threads: how many.
    """
    before, after = header
    function = getattr(kernel, name)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    if threads == 1:
        function(*before, rows, *after, *addresses)
        return
    parts = {True: rows, False: 1, None: threads}
    steps = [
        0 if t is None else t.nbytes // parts[by] for t, by in zip(tensors, by_row, strict=True)
    ]

    def work(thread: int) -> None:
        start, stop = rows * thread // threads, rows * (thread + 1) // threads
        first = {True: start, False: 0, None: thread}
        mine = [a + first[by] * step for a, step, by in zip(addresses, steps, by_row, strict=True)]
        function(*before, stop - start, *after, *mine)

    run_in_threads(work, threads)


def count_rows(x: Tensor) -> int:
    """Number of vectors in a tensor of shape ``(*batch, dim)``."""
    return x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])


def per_thread(like: Tensor, size: int, threads: int) -> Tensor:
    """An uninitialised vector of this size for every thread."""
    return like.new_empty(size) if threads == 1 else like.new_empty(threads, size)


def total(parts: Tensor) -> Tensor:
    """The sum over the threads of what :func:`per_thread` gave."""
    return parts if parts.dim() == 1 else parts.sum(0)
