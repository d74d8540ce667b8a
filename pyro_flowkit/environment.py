"""What a report of a fault should say: versions, the kernel, threads and GPUs."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from pyro_flowkit.ops.backend import backend

PACKAGES = (
    "pyro-flowkit",
    "torch",
    "pyro-ppl",
    "numpy",
    "scipy",
    "pandas",
    "xarray",
    "arviz",
    "h5netcdf",
    "matplotlib",
    "lightning",
    "tensorboard",
)


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that are used where they are installed, and what computes."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = str(torch.__version__)  # with the build
    found["splines on the CPU"] = {"fused": "the fused kernel", "reference": "PyTorch"}[backend()]
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["GPUs"] = ", ".join(gpus) or "none"
    return found


def show_versions() -> None:
    """Print what a report of a fault should say: versions, the kernel, threads and GPUs.

    >>> import pyro_flowkit
    >>> pyro_flowkit.show_versions()  # doctest: +ELLIPSIS
    python              3...
    """
    found = environment()
    width = max(map(len, found)) + 2
    print("\n".join(f"{name:{width}}{value}" for name, value in found.items()))
