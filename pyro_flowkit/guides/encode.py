"""Running an encoder: its parameters belong to the guide, and its features have a row for each datum."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_flowkit._pyro import silence
from pyro_flowkit.warning import warn


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
