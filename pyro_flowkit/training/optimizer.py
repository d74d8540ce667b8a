"""The optimizer of a fit: how it is built, its groups with rates of their own, and its state by parameter name.

PyTorch numbers an optimizer's state by the order of the parameters. Parameters of a Pyro program come into being when
it first runs, in an order of their own; so here the state goes to disk under their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from pyro_flowkit.training.adam import IS_POSSIBLE, Adam

DEFAULT_LR = 3e-3
MAX_COPIED = 2**18  # numbers

Factory = Callable[..., Any]  # params, lr=... -> torch.optim.Optimizer


def build_optimizer(
    factory: Factory | None, params: list[Tensor], lr: float | None, default_lr: float
) -> torch.optim.Optimizer:
    """The caller's optimizer, or Adam in one fused kernel.

    Raises:
        TypeError: If the factory gives anything else than an optimizer that needs no closure.
    """
    if factory is None:
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
        is_own = IS_POSSIBLE and fused and all(p.device.type == "cpu" for p in params)
        kind = Adam if is_own else torch.optim.Adam
        return kind(params, lr=default_lr if lr is None else lr, fused=fused)
    built = factory(params) if lr is None else factory(params, lr=lr)
    if not isinstance(built, torch.optim.Optimizer) or isinstance(built, torch.optim.LBFGS):
        raise TypeError(
            "Expected optimizer(params) to return a torch.optim.Optimizer that needs no closure, "
            f"got {type(built).__name__}"
        )
    return built


def add_group(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], lr: float) -> None:
    """Moves parameters into a group with a learning rate of its own."""
    chosen = {id(parameter): parameter for parameter in params}
    group = optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    optimizer.add_param_group({"params": list(chosen.values()), "lr": lr})


class GradientNorm:
    """Euclidean norm of all gradients together.

    The copy that it takes of small ones is a fifth of the time of the general way, which counts where a step takes a
    millisecond.
    """

    def __init__(self) -> None:
        self._seen, self._is_copied = 0, False

    def __call__(self, parameters: list[Tensor], grads: list[Tensor]) -> Tensor:
        """A scalar.

        Args:
            parameters: all of them, in a list that may have grown since the last call.
            grads: of those that have one.
        """
        if len(parameters) != self._seen:
            self._seen = len(parameters)
            kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
            is_small = sum(parameter.numel() for parameter in parameters) <= MAX_COPIED
            self._is_copied = is_small and len(kinds) == 1
        if grads and self._is_copied:
            return torch.linalg.vector_norm(_flatten_dense_tensors(grads))
        return torch.nn.utils.get_total_norm(grads)


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What the optimizer holds, under the names of its parameters.

    Args:
        optimizer: The optimizer.
        names: Name of every parameter, by ``id``.
    """
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "state": {
            names[id(parameter)]: {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state[parameter].items()
            }
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in optimizer.state
        },
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Mapping[int, str]
) -> dict[str, Any]:
    """Puts back what :func:`optimizer_state` took.

    Returns:
        The state of parameters that the optimizer does not have yet, by name.

    Raises:
        ValueError: If the optimizer is of another class or has other groups.
    """
    if saved["class"] != type(optimizer).__name__ or len(saved["groups"]) != len(
        optimizer.param_groups
    ):
        raise ValueError(
            f"Expected the optimizer of the checkpoint, {saved['class']} with {len(saved['groups'])} groups, got "
            f"{type(optimizer).__name__} with {len(optimizer.param_groups)}"
        )
    left = dict(saved["state"])
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
        for parameter in group["params"]:
            if names[id(parameter)] in left:
                load_parameter_state(optimizer, group, parameter, left.pop(names[id(parameter)]))
    return left


def load_parameter_state(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    parameter: Tensor,
    saved: Mapping[str, Any],
) -> None:
    """Puts back the state of one parameter; its count of steps stays on the CPU where the optimizer wants that."""
    on_device = group.get("fused") or group.get("capturable")
    optimizer.state[parameter] = {
        key: value.to(parameter.device)
        if isinstance(value, Tensor) and (on_device or key != "step")
        else value
        for key, value in saved.items()
    }
