"""Guides in files: settings and latents beside the parameters, so that a fresh program needs the model alone.

A guide's parameters mean nothing without the latents that they belong to: their names, sizes and supports, in the
model's order. A file therefore holds those, too, and a model with others is refused.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from pyro_flowkit.files import read_file, write_file
from pyro_flowkit.guides.constrained import ConstrainedLatents
from pyro_flowkit.programs.modules import copied

KIND = "guide"


class Storage(ConstrainedLatents):
    """``save`` and ``load`` of a guide that is set up by the model's arguments."""

    setup: Callable[..., Any]
    _settings: Callable[[], dict[str, Any]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide: its settings, the names of its latents, and all tensors.

        The file holds tensors, numbers and text; ``torch.load(path, weights_only=True)`` reads it, and nothing in it
        can be executed. The model and ``init_loc_fn`` are code, and not in it.

        Args:
            path: the file; it is replaced if it exists.

        Raises:
            RuntimeError: before the guide's first call, or :meth:`setup`.
            OSError: if the file cannot be written.
        """
        self._require_setup()
        content = {
            "guide": type(self).__name__,
            "settings": self._settings(),
            "latents": self._latents(),
            "dtype": str(_dtype_of(self)).removeprefix("torch."),
            "state": copied(self.state_dict()),
        }
        write_file(path, KIND, content)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable[..., Any],
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """A guide that :meth:`save` wrote, for the same model::

            guide.save("posterior.guide")
            guide = AutoSplineFlow.load("posterior.guide", model)

        Args:
            path: the file.
            model: the model that it was trained on, or one with the same latents.
            args: the model's arguments, by which the guide is set up; of other data, too.
            kwargs: its keyword arguments.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is damaged, or something else.
            ValueError: if the model's latents are not those of the file: names, sizes or supports.
        """
        content = read_file(path, KIND)
        if content["guide"] != cls.__name__:
            raise ValueError(
                f"Expected {content['guide']}.load, by whose guide the file was written, got {cls.__name__}.load"
            )
        new = cls(model, **content["settings"]).to(getattr(torch, content["dtype"]))
        new._warns_of_other_name = False  # what the store holds of another guide is not missed
        new.setup(*args, **(kwargs or {}))
        if new._latents() != content["latents"]:
            raise ValueError(
                f"Expected a model with the latents of the file, {_listed(content['latents'])}, got "
                f"{_listed(new._latents())}"
            )
        state = new.state_dict()
        differ = [
            name
            for name in sorted(state.keys() | content["state"].keys())
            if name not in state
            or name not in content["state"]
            or state[name].shape != content["state"][name].shape
        ]
        if differ:
            raise ValueError(
                f"Expected a guide with the tensors of the file, got others in {', '.join(differ)}: its model may mask "
                "other latents, or have angles where this one has not"
            )
        new.load_state_dict(content["state"])
        return new

    def _latents(self) -> list[list[Any]]:
        """Name, unconstrained shape and kind of support of every latent, in the order of the guide's vector."""
        nodes = self.prototype_trace.nodes
        return [
            [name, list(shape), _kind(nodes[name]["fn"].support)]
            for name, shape in self._unconstrained_shapes.items()
        ]


def _dtype_of(guide: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in guide.parameters())


def _kind(support: Any) -> str:
    """Of a support, without its bounds, which may be data."""
    base = getattr(support, "base_constraint", support)
    return type(base).__name__.strip("_")


def _listed(latents: list[list[Any]]) -> str:
    return ", ".join(f"{name} {tuple(shape)} {kind}" for name, shape, kind in latents)
