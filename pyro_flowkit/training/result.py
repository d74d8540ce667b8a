"""What a fit returns, and how it goes to disk: plain tensors, nothing executable."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyro
import torch

from pyro_flowkit.files import read_file, write_file
from pyro_flowkit.programs.modules import (
    DIVIDER,
    buffers_of,
    copied,
    modules_of,
    registered_modules,
)
from pyro_flowkit.training.state import check_fit, module_tensors, write_into

KIND = "fit result"
HISTORY = ("step", "elbo", "learning_rate", "grad_norm", "seconds", "validation")


def history_columns(records: list[list[float]]) -> dict[str, np.ndarray]:
    """The columns of a history, from its rows in the order of ``HISTORY``."""
    table = np.array(records, dtype=np.float64).reshape(-1, len(HISTORY)).T
    columns = {name: np.ascontiguousarray(row) for name, row in zip(HISTORY, table, strict=True)}
    return {**columns, "step": columns["step"].astype(np.int64)}


def versions() -> dict[str, str]:
    """Versions of what a fit's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyro-flowkit", "pyro-ppl", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Restart:
    """How one of several fits ended.

    Attributes:
        number: From 0, the guide's own start.
        elbo: Of the guide that it ended with, in nats.
        log_evidence: By importance sampling, in nats: of the modes that the guide has found. Modes apart from each
            other share the posterior's mass in proportion to their evidences. NaN where there is no way to estimate it.
        steps: That it took.
        stop_reason: Why it ended.
    """

    number: int
    elbo: float
    log_evidence: float
    steps: int
    stop_reason: str

    def plain(self) -> dict[str, Any]:
        """As numbers and text."""
        return asdict(self)


@dataclass(repr=False)
class FitResult:
    """A trained model and guide, and how they came about.

    Attributes:
        model: The trained model (the object passed in, in eval mode where it is a module).
        guide: The trained guide, or None.
        history: 1-d arrays of equal length, one entry per step: "step" (from 1), "elbo" (nats; per
            datum where data were given; NaN where the loss was), "learning_rate", "grad_norm"
            (before clipping, of the objective in the units of "elbo"), "seconds" (since the start),
            "validation" (nats per held-out datum, fixed noise; NaN at steps without a validation).
        stop_reason: Why the fit ended: "tolerance", "max_steps", "max_epochs", "max_seconds", "converged",
            "patience", "diverged", "interrupted", a callback's text, or a text that names the step at which the
            loss or the gradient became non-finite for good.
        best_step: The step whose parameters were kept.
        skipped_steps: Number of steps skipped because of a non-finite loss or gradient.
        notes: What was decided on the way, in words.
        divergence: By how much the objective has fallen below its best, and what to do, where that is far; else "".
        gap: What is left between log evidence and ELBO, an estimate by importance sampling, of an ``AutoSplineFlow``
            whose model can be run for many draws at a time (nats); else None.
        is_point: Whether the guide is a point estimate (Delta) of all latents, as ``AutoDelta`` is. "elbo" is then
            log p(x, z) there: no bound on the evidence, and no number to compare with one.
        restarts: How each of several fits ended, where there were several (``restarts=``).
        versions: Versions of Python, pyro-flowkit, Pyro, PyTorch and NumPy.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow, FitResult, fit
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> flow = SplineFlow(2)
        >>> fit(flow, data=x, max_steps=5, seed=0, progress=False).save("moons.fit")
        >>> FitResult.load("moons.fit", SplineFlow(2)).best_step
        5
    """

    model: Any
    guide: Any
    history: dict[str, np.ndarray]
    stop_reason: str
    best_step: int
    skipped_steps: int
    notes: tuple[str, ...] = ()
    divergence: str = ""
    gap: float | None = None
    is_point: bool = False
    restarts: tuple[Restart, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    param_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        elbo, count = self._late_elbo()
        parts = [
            f"stop_reason={self.stop_reason!r}",
            f"{len(self.history['step'])} steps",
            f"best_step={self.best_step}",
        ]
        if elbo is not None:
            name = "log_joint" if self.is_point else "elbo"
            parts.append(f"{name}={elbo:.5g} (mean of the last {count} steps)")
        if len(self.validation["elbo"]):
            parts.append(f"validation={self.validation['elbo'].max():.5g} (best)")
        if self.gap is not None:
            parts.append(f"gap={self.gap:.2g}")
        if self.skipped_steps:
            parts.append(f"skipped_steps={self.skipped_steps}")
        if self.divergence:
            parts.append(f"divergence={self.divergence!r}")
        return f"FitResult({', '.join(parts)})"

    def _repr_html_(self) -> str:
        elbo, count = self._late_elbo()
        validations = self.validation["elbo"]
        rows = {
            "stopped by": self.stop_reason,
            "steps": f"{len(self.history['step']):,}; the state of step {self.best_step:,} was kept",
            "log p(x, z) at the point" if self.is_point else "ELBO": (
                "" if elbo is None else f"{elbo:.5g} nats, mean of the last {count:,} steps"
            ),
            "validation": f"{validations.max():.5g} nats, the best" if len(validations) else "",
            "gap": "" if self.gap is None else f"{self.gap:.2g} nats",
            "steps left out": self.skipped_steps or "",
            "divergence": self.divergence,
            "notes": "; ".join(self.notes),
        }
        lines = "".join(
            f"<tr><th style='text-align: left'>{name}</th><td style='text-align: left'>{escape(str(text))}</td></tr>"
            for name, text in rows.items()
            if text
        )
        return f"<table>{lines}</table>"

    def _late_elbo(self) -> tuple[float | None, int]:
        """The mean ELBO of the last tenth of the steps, and their number."""
        late = self.history["elbo"][-max(1, len(self.history["step"]) // 10) :]
        finite = late[np.isfinite(late)]
        return (float(finite.mean()) if len(finite) else None), len(late)

    @property
    def validation(self) -> dict[str, np.ndarray]:
        """The validations alone: 1-d arrays "step" and "elbo"; empty without validation data."""
        done = np.isfinite(self.history["validation"])
        return {"step": self.history["step"][done], "elbo": self.history["validation"][done]}

    def plot(self, ax: Any = None) -> Any:
        """Draws the ELBO against the steps, by :func:`pyro_flowkit.diagnostics.plot_elbo`.

        Args:
            ax: Matplotlib Axes to draw into; None makes new ones.

        Returns:
            The Axes.
        """
        from pyro_flowkit.diagnostics import plot_elbo

        return plot_elbo(self, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, buffers and history as plain tensors.

        The file holds tensors, numbers and text only, so ``torch.load(path, weights_only=True)``
        reads it.
        """
        content = {
            "modules": [dict(module.state_dict()) for module in self._modules()],
            "params": copied(self._params()),
            "buffers": copied(self._buffers()),
            "history": {key: torch.from_numpy(value) for key, value in self.history.items()},
            "stop_reason": self.stop_reason,
            "best_step": self.best_step,
            "skipped_steps": self.skipped_steps,
            "notes": list(self.notes),
            "divergence": self.divergence,
            "gap": self.gap,
            "is_point": self.is_point,
            "restarts": [restart.plain() for restart in self.restarts],
            "versions": self.versions,
        }
        write_file(path, KIND, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, guide: Any = None) -> FitResult:
        """Reads a saved result into a model and guide of the same structure.

        Parameters that come into being at the first call must exist: call ``guide(*args)`` (or
        ``guide.setup(*args)`` where there is one) before loading into a fresh lazy guide.

        Args:
            path: A file written by ``save``.
            model: A model built like the saved one; its parameters are overwritten.
            guide: Likewise, or None.

        Raises:
            ValueError: If the file is damaged or something else, or its parameters do not fit.
        """
        content = read_file(path, KIND)
        result = cls(
            model=model,
            guide=guide,
            history={key: value.numpy() for key, value in content["history"].items()},
            stop_reason=content["stop_reason"],
            best_step=content["best_step"],
            skipped_steps=content["skipped_steps"],
            notes=tuple(content["notes"]),
            divergence=content["divergence"],
            gap=content["gap"],
            is_point=content["is_point"],
            restarts=tuple(Restart(**restart) for restart in content["restarts"]),
            versions=content["versions"],
            param_names=tuple(content["params"]),
        )
        modules, states = result._modules(), content["modules"]
        if len(modules) != len(states):
            raise ValueError(f"Expected {len(states)} modules as in the file, got {len(modules)}")
        live = [result._params(), result._buffers()]
        saved = [content["params"], content["buffers"]]
        for module, state in zip(modules, states, strict=True):
            live.append(module.state_dict(keep_vars=True))
            saved.append(state)
        for tensors, values in zip(live, saved, strict=True):
            check_fit(tensors, values)
        for tensors, values in zip(live, saved, strict=True):
            write_into(tensors, values)
        return result

    def _params(self) -> dict[str, torch.Tensor]:
        """Entries of the param store that belong to the fit and to no module, unconstrained."""
        params = pyro.get_param_store()._params
        of_modules = {id(tensor) for tensor in module_tensors(self._modules()).values()}
        return {
            name: params[name]
            for name in self.param_names
            if name in params and id(params[name]) not in of_modules
        }

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Buffers of the modules that plain functions have registered."""
        fitted = {name.partition(DIVIDER)[0] for name in self.param_names if DIVIDER in name}
        registered = registered_modules(self.model, self.guide)
        return buffers_of({name: registered[name] for name in registered if name in fitted})

    def _modules(self) -> list[torch.nn.Module]:
        return modules_of(self.model, self.guide)
