"""Attributes of ArviZ's InferenceData schema, which every Dataset of this package carries.

netCDF knows neither bool nor None nor dict, so there are none of these among them.
"""

import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import pyro
import xarray as xr

EXACT = "exact"
LOWER_BOUND = "lower bound"
ESTIMATE = "estimate"
STANDARD_ERROR = "standard error"
DIAGNOSTIC = "diagnostic"

DRAWS = ("chain", "draw")


def schema_attrs(sample_dims: Sequence[str] = (), **extra: Any) -> dict[str, Any]:
    """The attributes of one group; ``extra`` values must be str, int, float or lists of str."""
    attrs: dict[str, Any] = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "pyro_flowkit",
        "creation_library_version": _version("pyro-flowkit"),
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }
    if sample_dims:
        attrs["sample_dims"] = list(sample_dims)
    return attrs | extra


def arviz_generation() -> int:
    """The major version of the installed ArviZ: 0 with ``InferenceData``, 1 with ``DataTree``."""
    return int(importlib.metadata.version("arviz").split(".")[0])


def as_tree(data: Any) -> Any:
    """ArviZ 0.23's InferenceData, such as ``az.from_netcdf`` returns it, as a tree; others as they are."""
    convert = getattr(data, "to_datatree", None)
    return convert() if convert is not None else data


def as_result(data: Any) -> Any:
    """The same for what must be a result of a diagnostic.

    Raises:
        TypeError: for anything else, such as the guide itself.
    """
    found = as_tree(data)
    if not isinstance(found, xr.DataTree | xr.Dataset):
        raise TypeError(
            f"Expected a result of from_svi or of another diagnostic, got {type(data).__name__}: "
            "from_svi(model, guide) makes one"
        )
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
