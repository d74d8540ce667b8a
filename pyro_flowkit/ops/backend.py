"""Which implementation of the spline runs: the fused kernel, or the reference in PyTorch.

The kernel is an optional extension module: without a compiler the package installs without it. It computes on CPU
tensors in float32 and float64; everything else (other devices, tracing, ``torch.func``) takes the reference.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

kernel: ModuleType | None
try:
    kernel = importlib.import_module("pyro_flowkit.ops._fused")
except ImportError:
    kernel = None
if kernel is not None and not hasattr(kernel, "MAX_CHAIN"):
    raise ImportError(
        f"Expected a kernel built from the sources beside it, got an older one, {kernel.__file__}: pip install -e . "
        "builds it anew"
    )

# layers of a network, blocks of a hierarchy and layers of a chain that the kernel takes, as it says itself
MAX_LAYERS: int = kernel.MAX_LAYERS if kernel else 0
MAX_BLOCKS: int = kernel.MAX_BLOCKS if kernel else 0
MAX_CHAIN: int = kernel.MAX_CHAIN if kernel else 0

ENVIRONMENT_VARIABLE = "PYRO_FLOWKIT_REFERENCE"
COMPILE_VARIABLE = "PYRO_FLOWKIT_COMPILE"

_reference_wanted = os.environ.get(ENVIRONMENT_VARIABLE, "") not in ("", "0")
_compile_wanted = os.environ.get(COMPILE_VARIABLE, "") not in ("", "0")


def backend() -> Literal["fused", "reference"]:
    """The implementation that CPU tensors get here and now.

    "reference" where the extension was not built, inside :func:`use_reference`, or with ``PYRO_FLOWKIT_REFERENCE=1`` in
    the environment of the process.

    Example:
        >>> from pyro_flowkit.ops import backend
        >>> backend() in ("fused", "reference")
        True
    """
    return "reference" if kernel is None or _reference_wanted else "fused"


@contextmanager
def use_reference() -> Iterator[None]:
    """Take the PyTorch reference for a while, in the whole process.

    To find out whether a result depends on the kernel::

        with use_reference():
            flow.log_prob(x)

    Example:
        >>> from pyro_flowkit.ops import backend, use_reference
        >>> with use_reference():
        ...     print(backend())
        reference
    """
    global _reference_wanted
    before, _reference_wanted = _reference_wanted, True
    try:
        yield
    finally:
        _reference_wanted = before


def compiles_reference() -> bool:
    """Whether the PyTorch reference is to go through ``torch.compile``."""
    return _compile_wanted


@contextmanager
def use_compiled() -> Iterator[None]:
    """Send the PyTorch reference through ``torch.compile`` for a while, in the whole process.

    For splines on a GPU, where the kernel does not run: one compiled call instead of about a hundred operations. The
    first call of each kind compiles, which takes half a minute or more; second derivatives are not to be had. Also
    with ``PYRO_FLOWKIT_COMPILE=1`` in the environment of the process. The kernel, where it applies, is not touched.

    Example:
        >>> import torch
        >>> from pyro_flowkit.ops import use_compiled
        >>> with use_compiled():
        ...     pass
    """
    global _compile_wanted
    before, _compile_wanted = _compile_wanted, True
    try:
        yield
    finally:
        _compile_wanted = before
