"""What people pass to ``fit``: data in whatever holds them, and words for what cannot be meant.

numpy arrays and pandas' frames become tensors of their own dtype. A dict of arrays becomes a tuple in the order of the
model's parameters, so that its keys say what is what.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn

from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.preprocessing import as_tensor
from pyro_flowkit.training.callbacks import Callback
from pyro_flowkit.warning import warn

MAX_FAR = 0.5  # of the rows

P = ParamSpec("P")
R = TypeVar("R")


def two_by_place(fit: Callable[P, R]) -> Callable[P, R]:
    """``fit`` that says where arguments go which follow the guide, as those of ``svi.step`` do."""

    @functools.wraps(fit)
    def call(*given: P.args, **options: P.kwargs) -> R:
        if len(given) > 2:
            raise TypeError(
                f"Expected the model's arguments in args, got {len(given) - 2} after the guide: "
                "fit(model, guide, args=(x, y)), or fit(model, guide, data=(x, y)) for rows in minibatches"
            )
        return fit(*given, **options)

    return call


def check_programs(model: Any, guide: Any) -> None:
    """Says what is wrong with what is to be trained.

    Raises:
        TypeError: If the model is a distribution, if it or the guide is a class or nothing that can be called.
        ValueError: If model and guide have changed places.
        RuntimeError: In inference mode, in which nothing has a gradient.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Expected fit outside of torch.inference_mode(), which has no gradients")
    if isinstance(model, torch.distributions.Distribution):
        raise TypeError(
            "Expected a module with log_prob, such as a SplineFlow, or a Pyro model, got a distribution, "
            f"{type(model).__name__}: pass flow, not flow()"
        )
    for program in (model, guide):
        if isinstance(program, type):
            raise TypeError(
                f"Expected a model and a guide, got the class {program.__name__}: make one of it first, "
                f"{program.__name__}(...)"
            )
    if isinstance(model, AutoGuide) and guide is not None:
        raise ValueError(
            f"Expected fit(model, guide), got a guide, {type(model).__name__}, for the model: change their places"
        )
    if not callable(model):
        raise TypeError(f"Expected a model that can be called, got {type(model).__name__}")
    if guide is not None and not callable(guide):
        raise TypeError(
            f"Expected a guide that can be called, got {type(guide).__name__}: rows to train on go into data=, further "
            "arguments of the model into args="
        )


def check_args(args: Any) -> None:
    """Raises a TypeError for a single argument where there should be a tuple of them."""
    if not isinstance(args, Sequence) or isinstance(args, str):
        raise TypeError(
            f"Expected args to be a tuple of arguments, got {type(args).__name__}: args=(x,)"
        )


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raises a TypeError for a callback without the hooks."""
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    for callback in callbacks:
        missing = [name for name in hooks if not hasattr(callback, name)]
        if missing:
            raise TypeError(
                f"Expected callbacks with the hooks of pyro_flowkit.training.Callback, got {type(callback).__name__} "
                f"without {missing[0]}: derive a class from Callback"
            )


def check_optimizer(optimizer: Any) -> None:
    """Raises a TypeError for an optimizer of Pyro, or one that is built already."""
    if isinstance(optimizer, pyro.optim.PyroOptim):
        raise TypeError(
            "Expected optimizer to be a callable from parameters to a torch.optim.Optimizer, got one of Pyro's: pass "
            "torch.optim.Adam, with lr=..., or a function for its other settings"
        )
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            "Expected optimizer to be a callable from parameters to a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}: pass the class, or a function that builds one"
        )


def whole(name: str, value: Any) -> int | None:
    """An option that counts something.

    Raises:
        TypeError: If it is no whole number.
    """
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"Expected {name} to be an integer, got {value!r}") from None


def as_tensors(data: Any, model: Any, name: str = "data") -> Any:
    """Data with tensors in the place of arrays and frames, and a tuple in the place of a dict.

    Args:
        data: Any data of ``fit``; what is no array, frame or dict, or a tuple of some, is given back as it is.
        model: The flow or model, whose parameters the keys of a dict name.
        name: What to call them in error messages.

    Raises:
        TypeError: If an array holds no numbers.
        ValueError: If the keys of a dict are not the model's first parameters.
    """
    if isinstance(data, Mapping):
        ordered = _in_order(data, model, name)
        return tuple(as_tensor(data[key], f"{name}[{key!r}]") for key in ordered)
    if isinstance(data, tuple | list):
        return type(data)(as_tensor(part, name) for part in data)
    return as_tensor(data, name)


@torch.no_grad()
def warn_of_far_rows(model: Any, rows: torch.Tensor) -> None:
    """Warns where most of the rows are where the splines of a flow are linear, before it is trained on them."""
    if not isinstance(model, SplineFlow) or model.affine is not None or model.tails != "linear":
        return
    if rows.shape[-1:] != (model.input_dim,):
        return  # whatever is wrong is said where it is used
    inside = model.standardization.inv(rows if rows.is_floating_point() else rows.double())
    far = (inside.abs() > model.bound).reshape(-1, model.input_dim).double().mean(0)
    worst = int(far.argmax())
    if float(far[worst]) > MAX_FAR:
        warn(
            f"{float(far[worst]):.0%} of the rows are beyond the splines' bound of {model.bound:g} in column {worst}, "
            "where the flow is linear and has far to go: fit(flow.standardize(data), data=data)."
        )


def _in_order(data: Mapping[Any, Any], model: Any, name: str) -> list[str]:
    program: Any = model
    if isinstance(model, nn.Module):
        program = getattr(model, "log_prob", model.forward)
    parameters = [
        parameter.name
        for parameter in inspect.signature(program).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    first = parameters[: len(data)]
    if not data or set(first) != set(data):
        raise ValueError(
            f"Expected the keys of {name} to be the first parameters of the model, {', '.join(parameters) or 'none'}, "
            f"got {', '.join(map(str, data)) or 'none'}"
        )
    return first
