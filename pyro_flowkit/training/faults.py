"""What goes wrong in a fit, in plain words; and interruptions that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_flowkit.programs.sites import scored_sites
from pyro_flowkit.training.losses import Batch, MaximumLikelihood
from pyro_flowkit.training.variational import Variational

SAME_WISH = 0.25  # seconds in which a second signal says nothing new


class Interruption:
    """Takes note of Ctrl-C (SIGINT), and of SIGTERM, as schedulers of clusters send it, until a step is done.

    A later signal interrupts at once, but not one that comes with the first, as of a key that bounces or is pressed
    twice: that would lose what the first is to give. Handlers that somebody else has set are left alone, and outside
    the main thread nothing is caught.

    Attributes:
        reason: "interrupted" or "terminated" once a signal has come, else None.
    """

    _REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
    _DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number, default in self._DEFAULTS.items():
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before and self.reason is not None:
            time.sleep(max(0.0, self._since + SAME_WISH - time.monotonic()))
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason, self._since = self._REASONS[signal.Signals(number)], time.monotonic()
        elif time.monotonic() >= self._since + SAME_WISH:
            raise KeyboardInterrupt


def caused_by_numbers(error: Exception) -> bool:
    """Whether it is an error of values that training has brought about, and not one of the program.

    A matrix that cannot be decomposed, a parameter of a distribution that has left its domain (a scale that has become
    0), or a value that is NaN or infinite.
    """
    text = str(error)
    if isinstance(error, torch.linalg.LinAlgError) or "to satisfy the constraint" in text:
        return True
    return "to be within the support" in text and ("nan" in text or "inf" in text)


def worst_site(loss: MaximumLikelihood | Variational, batch: Batch) -> str:
    """Where the numbers stop being finite: a parameter, a site or rows of data; empty where that cannot be said."""
    for name, parameter in loss.learned.items():
        if not bool(parameter.isfinite().all()):
            return f"parameter {name!r} has {_count(parameter)}"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pyro.validation_enabled(False):
                found = (
                    _worst_rows(loss, batch)
                    if isinstance(loss, MaximumLikelihood)
                    else _worst_sample(loss, batch)
                )
    except Exception as error:  # a program that is given NaN may do anything
        found = f"the program then fails with {type(error).__name__}: {str(error)[:200]}"
    if found:
        return found
    for name, parameter in loss.learned.items():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of parameter {name!r} has {_count(parameter.grad)}"
    return ""


def _worst_rows(loss: MaximumLikelihood, batch: Batch) -> str:
    log_prob = loss.row_log_probs(batch)
    bad = (~log_prob.isfinite()).nonzero()
    if not len(bad):
        return ""
    row = int(bad[0, 0])
    return f"log_prob of {len(bad)} of {len(log_prob)} rows is not finite, row {row} of the batch the first"


def _worst_sample(loss: Variational, batch: Batch) -> str:
    model_trace, guide_trace = loss.traces(batch)
    for program, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in scored_sites(trace):
            value = site["value"]
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                return f"the value of site {name!r} of the {program} has {_count(value)}"
            log_prob = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
            if not bool(log_prob.isfinite().all()):
                return (
                    f"the log-probability of site {name!r} of the {program} has {_count(log_prob)}"
                )
    return ""


def _count(tensor: Tensor) -> str:
    bad = ~tensor.isfinite()
    kinds = [
        f"{int(found.sum())} {kind}"
        for kind, found in (("NaN", tensor.isnan()), ("inf", tensor.isinf()))
        if bool(found.any())
    ]
    return f"{' and '.join(kinds)} among {bad.numel()} values"
