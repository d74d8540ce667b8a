"""What a fit returns, and how it goes to disk: plain tensors, nothing executable."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyro
import torch

from pyro_flowkit.training.state import modules_of

FORMAT = 1


def versions() -> dict[str, str]:
    """Versions of what a fit's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyro-flowkit", "pyro-ppl", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass
class FitResult:
    """A trained model and guide, and how they came about.

    Attributes:
        model: The trained model (the object passed in, in eval mode where it is a module).
        guide: The trained guide, or None.
        history: 1-d arrays of equal length, one entry per step: "step" (from 1), "elbo" (nats; per
            datum where data were given; NaN where the loss was), "learning_rate", "grad_norm"
            (before clipping, of the objective in the units of "elbo"), "seconds" (since the start).
        validation: 1-d arrays "step" and "elbo" (nats per datum, fixed noise); empty without
            validation data.
        stop_reason: Why the fit ended: "max_steps", "max_epochs", "max_seconds", "converged",
            "patience", "interrupted", a callback's text, or a text that names the step at which the
            loss or the gradient became non-finite for good.
        best_step: The step whose parameters were kept.
        skipped_steps: Number of steps skipped because of a non-finite loss or gradient.
        versions: Versions of Python, pyro-flowkit, Pyro, PyTorch and NumPy.
    """

    model: Any
    guide: Any
    history: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    stop_reason: str
    best_step: int
    skipped_steps: int
    versions: dict[str, str] = field(default_factory=versions)
    param_names: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, buffers and history as plain tensors.

        The file holds tensors, numbers and text only, so `torch.load(path, weights_only=True)`
        reads it.
        """
        store = pyro.get_param_store()
        content = {
            "format": FORMAT,
            "modules": [dict(module.state_dict()) for module in self._modules()],
            "params": {
                name: store._params[name].detach().clone()
                for name in self.param_names
                if name in store
            },
            "history": {key: torch.from_numpy(value) for key, value in self.history.items()},
            "validation": {key: torch.from_numpy(value) for key, value in self.validation.items()},
            "stop_reason": self.stop_reason,
            "best_step": self.best_step,
            "skipped_steps": self.skipped_steps,
            "versions": self.versions,
        }
        torch.save(content, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, guide: Any = None) -> FitResult:
        """Reads a saved result into a model and guide of the same structure.

        Parameters that come into being at the first call must exist: call `guide(*args)` (or
        `guide.setup(*args)` where there is one) before loading into a fresh lazy guide.

        Args:
            path: A file written by `save`.
            model: A model built like the saved one; its parameters are overwritten.
            guide: Likewise, or None.

        Raises:
            ValueError: If the file has another format, or its parameters do not fit.
        """
        content = torch.load(path, weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            got = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"expected a fit result of format {FORMAT}, got {got!r}")
        result = cls(
            model=model,
            guide=guide,
            history={key: value.numpy() for key, value in content["history"].items()},
            validation={key: value.numpy() for key, value in content["validation"].items()},
            stop_reason=content["stop_reason"],
            best_step=content["best_step"],
            skipped_steps=content["skipped_steps"],
            versions=content["versions"],
            param_names=tuple(content["params"]),
        )
        targets = _targets(result._modules(), content)
        with torch.no_grad():
            for target, saved in targets:
                target.copy_(saved)
        return result

    def _modules(self) -> list[torch.nn.Module]:
        return modules_of(self.model, self.guide)


def _targets(
    modules: list[torch.nn.Module], content: dict[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (live tensor, saved tensor), all checked before any is written."""
    if len(modules) != len(content["modules"]):
        raise ValueError(
            f"expected {len(content['modules'])} modules as in the file, got {len(modules)}"
        )
    store = pyro.get_param_store()
    live_sets = [module.state_dict(keep_vars=True) for module in modules]
    live_sets.append({name: store._params[name] for name in content["params"] if name in store})
    pairs = []
    for live, saved in zip(live_sets, [*content["modules"], content["params"]], strict=True):
        missing = sorted(saved.keys() - live.keys())
        if missing:
            raise ValueError(
                f"expected the parameters of the file, got none named {', '.join(missing)}; "
                "call the model and the guide once before loading if they create parameters lazily"
            )
        for name, tensor in saved.items():
            if live[name].shape != tensor.shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(tensor.shape)} as in the file, "
                    f"got {tuple(live[name].shape)}"
                )
            pairs.append((live[name], tensor))
    return pairs
