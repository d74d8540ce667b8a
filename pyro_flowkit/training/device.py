"""Where a fit computes: models, guides, data and arguments go to one device, if the caller names one."""

from __future__ import annotations

import os
from typing import Any

import torch

from pyro_flowkit.programs.modules import modules_of


def chosen_device(device: str | torch.device | None) -> torch.device | None:
    """The device that is meant; "auto" is the GPU of this process if there is one, None whatever the model is on.

    Raises:
        ValueError: If it is no device, or one that is not there.
    """
    if device is None:
        return None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if (
        str(device) == "cuda" and torch.cuda.is_available()
    ):  # under torchrun each process has its own
        chosen = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        )
        torch.cuda.set_device(chosen)
        return chosen
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"Expected device to be 'auto' or a device of this machine, got {device!r}: {reason}"
        ) from None
    return chosen


def moved(value: Any, device: torch.device | None) -> Any:
    """Tensors in nested tuples, lists and dicts on another device; everything else as it is."""
    if device is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(part, device) for part in value)
    if type(value) is dict:
        return {key: moved(part, device) for key, part in value.items()}
    return value


def move_modules(device: torch.device | None, *programs: Any) -> None:
    """Puts model and guide there, in place."""
    if device is not None:
        for module in modules_of(*programs):
            module.to(device)
