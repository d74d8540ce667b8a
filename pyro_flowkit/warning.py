"""Warnings that point at the caller's line, however many rooms lie in between."""

import inspect
import warnings
from pathlib import Path

import pyro
import torch

INSIDE = tuple(f"{Path(str(module.__file__)).parent}/" for module in (pyro, torch)) + (
    f"{Path(__file__).parent}/",
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issues a warning at the innermost frame that is not of this package, Pyro or PyTorch.

    Args:
        message: What to say.
        category: Of the warning.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
