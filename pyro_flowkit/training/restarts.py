"""Several fits of one guide, each from another start: the best is kept, and the result knows them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_flowkit.guides.protocols import RestartingGuide, StartingGuide
from pyro_flowkit.programs.modules import copied
from pyro_flowkit.training.arguments import as_tensors
from pyro_flowkit.training.data import as_rows
from pyro_flowkit.training.device import chosen_device, moved
from pyro_flowkit.training.result import FitResult, Restart

Run = Callable[..., FitResult]


def best_of(count: int, run: Run, call: Mapping[str, Any]) -> FitResult:
    """Fits from so many starts; the guide is that of the largest ELBO afterwards.

    Args:
        count: Number of starts: the guide's own, then draws of the prior.
        run: ``fit``.
        call: Its arguments by name.

    Raises:
        ValueError: For a guide that has one place to start from only, data that cannot be had at once, or trackers.
    """
    if count < 1:
        raise ValueError(f"Expected restarts >= 1, got {count}")
    guide, args, kwargs = call["guide"], tuple(call["args"]), dict(call["kwargs"] or {})
    if not isinstance(guide, RestartingGuide):
        raise ValueError(
            f"Expected a guide that can begin anew, such as an AutoSplineFlow, for restarts={count}, "
            f"got {type(guide).__name__}"
        )
    guide.check_restarts()
    if callable(call["data"]) or hasattr(call["data"], "dataset"):
        raise ValueError(
            f"Expected data in tensors for restarts={count}, got {type(call['data']).__name__}"
        )
    if call["trackers"]:
        raise ValueError(f"Expected no trackers for restarts={count}, got {call['trackers']}")
    data = as_tensors(call["data"], call["model"])
    rows = () if data is None else as_rows(data)
    found: list[Restart] = []
    inputs = moved((*rows, *args), chosen_device(call["device"]))
    best: dict[str, torch.Tensor] = {}
    for number in range(count):
        options = {**call, **_own_options(number, count, call)}
        if number:
            guide.restart(number, *inputs, **kwargs)
        result = run(**options)
        found.append(_end_of(number, result, inputs, kwargs))
        if found[-1] is max(found, key=lambda restart: _or_lowest(restart.elbo)):
            best, kept = copied(guide.state_dict()), result
        if result.stop_reason in ("interrupted", "terminated"):
            break
    guide.load_state_dict(best)
    kept.restarts = tuple(found)
    return kept


def _end_of(number: int, result: FitResult, inputs: tuple, kwargs: Mapping[str, Any]) -> Restart:
    guide = result.guide
    room = guide.room(result.model, inputs, kwargs) if isinstance(guide, StartingGuide) else None
    gap = None if room is None else room.gap(number)
    elbo = result.history["elbo"][-max(1, len(result.history["elbo"]) // 10) :]
    return Restart(
        number=number,
        elbo=float(np.mean(elbo)) if gap is None else gap.elbo,
        log_evidence=math.nan if gap is None else gap.elbo + gap.nats,
        steps=len(result.history["step"]),
        stop_reason=result.stop_reason,
    )


def _own_options(number: int, count: int, call: Mapping[str, Any]) -> dict[str, Any]:
    folder, seconds, seed = call["checkpoint_dir"], call["max_seconds"], call["seed"]
    return {
        "restarts": 1,
        "seed": None if seed is None else seed + number,
        "max_seconds": None if seconds is None else seconds / count,
        "checkpoint_dir": None if folder is None else Path(folder) / f"restart-{number}",
    }


def _or_lowest(elbo: float) -> float:
    return -math.inf if math.isnan(elbo) else elbo
