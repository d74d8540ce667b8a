"""Drawing from a seed of one's own: the random states of the caller come back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_seed(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Draw from a seed for a while; the random states of the CPU and of this device come back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
