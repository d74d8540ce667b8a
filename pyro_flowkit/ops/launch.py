"""Calls of the kernel: addresses instead of tensors, and large calls shared out among threads by rows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_flowkit.ops.backend import kernel
from pyro_flowkit.ops.threads import run_in_threads


def launch(
    name: str,
    header: tuple[tuple[Any, ...], tuple[Any, ...]],
    tensors: Sequence[Tensor | None],
    by_row: Sequence[bool | None],
    threads: int,
) -> None:
    """Call a function of the kernel.

    Args:
        name: of the function.
        header: its arguments before and after the number of rows, up to the addresses.
        tensors: contiguous; the first has the rows that are shared out. None stands for a tensor that is not there.
        by_row: for each of them, True if it has those rows too, False if every thread needs all of it, None if it has
            one row for every thread.
        threads: how many.
    """
    before, after = header
    function = getattr(kernel, name)
    rows = tensors[0].shape[0]  # type: ignore[union-attr]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    if threads == 1:
        function(*before, rows, *after, *addresses)
        return
    steps = [0 if t is None else t[0].numel() * t.element_size() for t in tensors]

    def work(thread: int) -> None:
        start, stop = rows * thread // threads, rows * (thread + 1) // threads
        first = {True: start, False: 0, None: thread}
        mine = [a + first[by] * step for a, step, by in zip(addresses, steps, by_row, strict=True)]
        function(*before, stop - start, *after, *mine)

    run_in_threads(work, threads)


def total(parts: Tensor) -> Tensor:
    """The sum over the threads."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
