"""Threads for large calls of the kernel: a pool that sleeps between calls, as many as PyTorch is allowed to use.

PyTorch's own threads wait for work by spinning; these do not, and they only work while PyTorch waits for the kernel.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

# what a thread should have to do at least, in splines: about half a millisecond
SPLINES_PER_THREAD = 16_384

# of each process, with the number of their threads: threads do not survive a fork
_pools: dict[int, tuple[int, ThreadPoolExecutor]] = {}


def count_threads(num_splines: int) -> int:
    """How many threads a call with so many splines should use."""
    if num_splines < 2 * SPLINES_PER_THREAD:
        return 1
    return max(1, min(torch.get_num_threads(), num_splines // SPLINES_PER_THREAD))


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` at the same time, the first in this thread."""
    size, pool = _pools.get(os.getpid(), (0, None))
    if pool is None or size < count - 1:
        pool = ThreadPoolExecutor(count - 1, thread_name_prefix="pyro_flowkit")
        _pools[os.getpid()] = count - 1, pool
    futures = [pool.submit(work, i) for i in range(1, count)]
    try:
        work(0)
    finally:  # nobody may still write when this returns
        wait(futures)
    for future in futures:
        future.result()
