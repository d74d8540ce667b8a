"""Everything a fit changes, by name: parameters and buffers of modules, entries of the param store, random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def module_tensors(modules: list[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers, those that are in no ``state_dict`` included, as ``"<module>.<path>"``."""
    return {
        f"{number}.{name}": tensor
        for number, module in enumerate(modules)
        for tensors in (module.named_parameters(), module.named_buffers())
        for name, tensor in tensors
    }


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Puts modules into eval mode, and every submodule back into its own mode afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


Tensors = dict[str, Tensor]


def check_fit(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Checks that every saved tensor has a live one to go to.

    Raises:
        ValueError: If a saved tensor has no live one, or another shape.
    """
    missing = sorted(saved.keys() - live.keys())
    if missing:
        raise ValueError(
            f"Expected the parameters of the file, got none named {', '.join(missing)}; "
            "call the model and the guide once before loading if they create parameters lazily"
        )
    for name, tensor in saved.items():
        if live[name].shape != tensor.shape:
            raise ValueError(
                f"Expected {name} of shape {tuple(tensor.shape)} as in the file, "
                f"got {tuple(live[name].shape)}"
            )


@torch.no_grad()
def write_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Writes saved values into live tensors, in place, after :func:`check_fit`."""
    check_fit(live, saved)
    for name, tensor in saved.items():
        if not torch.equal(
            live[name], tensor.to(live[name])
        ):  # a buffer may be a view that cannot be written to
            live[name].copy_(tensor)


def random_state() -> dict[str, Any]:
    """The states of the random number generators of PyTorch, NumPy and Python, as plain tensors and numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.random.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss_next],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the generators back to where :func:`random_state` found them."""
    torch.random.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
