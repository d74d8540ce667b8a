"""The plate of the data: which one it is, how many data there are, and which of them make a batch.

The plate belongs to the model: its size scales the batch up to the data, and its rows say which data a batch holds.
Both may change from call to call, so the guide asks the model, by running it up to the plate.

A row of that plate is what an encoder has features for; its parameters belong to the guide.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.util import ignore_jit_warnings
from torch import Tensor, nn

from pyro_flowkit._pyro import silence
from pyro_flowkit.warning import warn


def choose_plate(nodes: list[dict[str, Any]], wanted: str | None) -> Any:
    """The frame of the data's plate: the one wanted, the only subsampled one, or the only one.

    Args:
        nodes: the latent sites of a prototype.
        wanted: its name, or None.

    Raises:
        ValueError: if no latent lies in the plate, or several plates could be meant.
    """
    frames = {frame.name: frame for node in nodes for frame in node["cond_indep_stack"]}
    names = ", ".join(repr(name) for name in frames)
    if not frames:
        raise ValueError(
            "Expected local latents, inside a plate of the data, got none: use AutoSplineFlow for a model without."
        )
    if wanted is not None:
        if wanted not in frames:
            raise ValueError(
                f"Expected plate to be one that holds latents ({names}), got {wanted!r}."
            )
        return frames[wanted]
    subsampled = [frame for frame in frames.values() if is_subsampled(frame)]
    candidates = subsampled or list(frames.values())
    if len(candidates) > 1:
        kind = "subsampled plate" if subsampled else "plate"
        names = ", ".join(repr(frame.name) for frame in candidates)
        raise ValueError(
            f"Expected one {kind} that holds latents, got {len(candidates)}: {names}. Say which is the data's: "
            f"plate={candidates[0].name!r}."
        )
    return candidates[0]


def split(
    nodes: list[dict[str, Any]], plate: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those sites of a trace that lie in a plate, and the others."""
    inside: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    for node in nodes:
        is_inside = any(frame.name == plate for frame in node["cond_indep_stack"])
        (inside if is_inside else outside).append(node)
    return inside, outside


def refuse_other_subsampled(nodes: list[dict[str, Any]], plate: str) -> None:
    """Raise a ValueError if one of these latents lies in another subsampled plate than the data's."""
    for node in nodes:
        for frame in node["cond_indep_stack"]:
            if frame.name != plate and is_subsampled(frame):
                raise ValueError(
                    f"Expected {plate!r} to be the only subsampled plate with latents, got {node['name']!r} inside "
                    f"plate {frame.name!r}, which subsamples {frame.size} of {frame.full_size}: use the whole plate, "
                    "or an AutoGuideList with one AmortizedSplineFlow for each."
                )


def is_subsampled(frame: Any) -> bool:
    """Whether a plate holds fewer rows than it stands for."""
    return frame.full_size is not None and frame.full_size != frame.size


@dataclass(frozen=True)
class PlateCall:
    """How a model calls its plate for some arguments.

    Attributes:
        size: number of data that the batch stands for.
        rows: number of rows in the batch.
        subsample: the rows, if the model says which.
        seen: False if only a site inside the plate was seen, and what the model says of the rows is not known.
    """

    size: int
    rows: int
    subsample: Any = None
    seen: bool = True

    def plate(self, name: str, dim: int) -> pyro.plate:
        """A plate of the guide for this call.

        Raises:
            ValueError: if the rows of a batch are not known.
        """
        if not self.seen and self.rows != self.size:
            raise ValueError(
                f"Expected to see how the model calls plate {name!r}, got only a site inside, for {self.rows} rows of "
                f"{self.size}: pass create_plates, or hide latents of the model instead of exposing some."
            )
        drawn = self.subsample is None and self.rows != self.size
        return pyro.plate(
            name,
            self.size,
            subsample_size=self.rows if drawn else None,
            subsample=self.subsample,
            dim=dim,
        )


class _Reached(Exception):
    """The model came to its plate."""


class _PlateFinder(Messenger):
    """Stops a model at the plate of a name; latents on the way take known values."""

    def __init__(self, name: str, values: Mapping[str, Tensor]):
        super().__init__()
        self.name = name
        self.values = values
        self.call: PlateCall | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == self.name:
            fn, subsample = msg["fn"], msg["value"]
            rows = fn.subsample_size
            if rows is None:
                rows = fn.size if subsample is None else len(subsample)
            self.call = PlateCall(fn.size, min(rows, fn.size), subsample)
            raise _Reached
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.name:
                self.call = PlateCall(frame.full_size or frame.size, frame.size, seen=False)
                raise _Reached
        if msg["type"] == "sample" and msg["value"] is None and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def plate_call(
    model: Callable[..., Any], name: str, values: Mapping[str, Tensor], args: tuple, kwargs: dict
) -> PlateCall:
    """Run a model up to its plate and say how it calls it.

    Args:
        model: the model.
        name: of the plate.
        values: of the latents that the model meets on the way.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Raises:
        RuntimeError: if the model does not come to such a plate.
    """
    finder = _PlateFinder(name, values)
    try:
        with torch.no_grad(), poutine.block(), finder, ignore_jit_warnings():
            model(*args, **kwargs)
    except _Reached:
        pass
    if finder.call is None:
        raise RuntimeError(f"Expected the model to enter plate {name!r} at every call, got none.")
    return finder.call


def encode(encoder: Callable[..., Tensor], args: tuple, kwargs: dict, context_dim: int) -> Tensor:
    """Features of shape ``(rows, context_dim)``.

    Args:
        encoder: a module, whose parameters are in the param store as the guide's, or a function.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        context_dim: number of features.

    Raises:
        ValueError: for an output of another shape.
    """
    if isinstance(encoder, nn.Module):
        silence(encoder)
    features = encoder(*args, **kwargs)
    if not isinstance(features, Tensor):
        raise ValueError(
            f"Expected the encoder to return a tensor of shape (batch, {context_dim}), got {type(features).__name__}."
        )
    if torch.jit.is_tracing():  # sizes are tensors there, and comparing them warns
        return features
    if features.dim() != 2 or features.shape[-1] != context_dim:
        raise ValueError(
            f"Expected the encoder to return shape (batch, {context_dim}), as context_dim={context_dim}, got "
            f"{tuple(features.shape)}."
        )
    return features


def warn_of_untrained(features: Tensor, guide: nn.Module) -> None:
    """Warn if features depend on parameters that neither the guide nor the param store knows."""
    known = {id(parameter) for parameter in guide.parameters()}
    known |= {id(parameter) for parameter in pyro.get_param_store()._params.values()}
    unknown = sum(id(leaf) not in known for leaf in _leaves(features))
    if unknown:
        warn(
            f"The encoder's features depend on {unknown} parameters that neither the guide nor the param store knows, "
            "so that SVI does not train them: give the encoder as a module, or call pyro.module in it."
        )


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """Tensors at the leaves of a graph."""
    seen: set[Any] = set()
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            if hasattr(node, "variable"):
                yield node.variable
