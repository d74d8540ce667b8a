"""What makes a fit that very fit: a checkpoint binds it, and resuming another one is an error that says what differs.

Bound are the data, the arguments, the structure of the modules, the settings that the steps depend on, the versions of
the libraries, and the value that the objective had at the checkpoint, by fixed noise: that sees whatever a model takes
from elsewhere, closures and globals included. Free are the limits (steps, epochs, seconds, patience, tolerance),
trackers, callbacks, the bar, the device, and how often a checkpoint is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_flowkit.files import digest_of
from pyro_flowkit.programs.modules import modules_of
from pyro_flowkit.training.data import Batch, Batches, RowBatches
from pyro_flowkit.training.losses import MaximumLikelihood
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.state import evaluating, random_state, set_random_state
from pyro_flowkit.training.variational import Variational

PROBE_SEED = 20_241_129
SAME = 1e-4  # relative difference of the objective that another processor may make
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(batches: Batches, ranks: Ranks) -> dict[str, Any]:
    """What kind of data a fit has, and who shares it."""
    return {
        "number of processes": ranks.count,
        "data": type(batches).__name__,
        "number of data": batches.size,
        "batch_size": batches.batch_size if isinstance(batches, RowBatches) else None,
        "steps per epoch": batches.steps_per_epoch,
    }


def identity(
    batches: Batches,
    held_out: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    programs: Sequence[Any],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Everything but the objective's value that has to be the same, by names for people.

    Args:
        batches: Of the training.
        held_out: Rows, or a source of them.
        args, kwargs: Of model and guide.
        programs: Model and guide, set up.
        settings: Of the call.
    """
    modules = modules_of(*programs)
    found = {
        "contents of data": _contents(batches.rows if isinstance(batches, RowBatches) else None),
        "contents of validation data": _contents(held_out),
        "args": _contents(list(args)),
        "kwargs": _contents(dict(kwargs)),
        "model and guide": ", ".join(_name(program) for program in programs),
        "structure of model and guide": _contents([_structure(module) for module in modules]),
    }
    return found | {name: _text(value) for name, value in settings.items()}


def check_identity(
    saved: Mapping[str, Any], now: Mapping[str, Any], versions: Sequence[Mapping[str, str]]
) -> None:
    """Compares a checkpoint with the call that is to go on from it.

    Args:
        saved, now: What each of them is bound to.
        versions: Of the libraries, then and now.

    Raises:
        ValueError: If they differ.
    """
    for name in {**saved, **now}:
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"Expected the call that the checkpoint was written by, with {name} = {saved.get(name)}, got "
                f"{now.get(name)}"
            )
    then, today = versions
    for library in {**then, **today}:
        if then.get(library) != today.get(library):
            raise ValueError(
                f"Expected the library that the checkpoint was written by, {library} {then.get(library)}, got "
                f"{today.get(library)}: a fit that goes on with another one is not the same; resume=False begins anew"
            )


def probe(loss: MaximumLikelihood | Variational, batches: Batches) -> float | None:
    """The objective of the first rows by fixed noise; None where batches cannot be asked for out of their order."""
    if not isinstance(batches, RowBatches):
        return None
    batch: Batch = tuple(rows[: batches.batch_size] for rows in batches.rows)
    before = random_state()
    try:
        torch.manual_seed(PROBE_SEED)
        with torch.no_grad(), evaluating([*loss.modules, *loss.registered.values()]):
            return loss.evaluate(batch)
    finally:
        set_random_state(before)


def check_probe(saved: float | None, now: float | None) -> None:
    """Compares the objective at a checkpoint with what it is for the call that is to go on from it.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    if saved is None or now is None or (math.isnan(saved) and math.isnan(now)):
        return
    if not math.isclose(saved, now, rel_tol=SAME, abs_tol=SAME):
        raise ValueError(
            f"Expected the model and the data that the checkpoint was written by, whose objective there is "
            f"{-saved:.7g}, got another one of {-now:.7g}: what a model takes from elsewhere (closures, globals) counts"
        )


def _structure(module: nn.Module) -> list[Any]:
    text = _ADDRESS.sub("", repr(module))
    return [text, [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in module.state_dict().items()]]


def _name(program: Any) -> str:
    if isinstance(program, nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)


def _text(value: Any) -> str:
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__name__)
    return _ADDRESS.sub("", str(value))


def _contents(value: Any) -> str:
    return digest_of(_plain(value))[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return f"{type(value).__module__}.{type(value).__qualname__}"
