"""Which dimensions pass through a coupling to its conditioner, and which are transformed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowkit.nn import checked_hidden_dims, make_conditioner
from pyro_flowkit.ops import Columns, SplineSettings
from pyro_flowkit.transforms.base import check_size


class Split:
    """The columns of a mask, in the combinations that a coupling sends through splines."""

    def __init__(self, mask: Tensor):
        flags = mask.tolist()
        self.dim = dim = len(flags)
        self.passed = tuple(i for i in range(dim) if flags[i])
        self.passed_range = None
        if self.passed and self.passed[-1] - self.passed[0] + 1 == len(self.passed):
            self.passed_range = (self.passed[0], self.passed[-1] + 1)
        transformed = tuple(i for i in range(dim) if not flags[i])
        self.transformed = Columns(dim, own=transformed)
        self.both = Columns(dim, own=transformed, shared=self.passed)
        self.only_passed = Columns(dim, own=(), shared=self.passed)


def half_mask(input_dim: int, *, flip: bool = False) -> Tensor:
    """Bool mask of shape ``(input_dim,)`` that passes the first half through, or the second with ``flip``.

    With one dimension nothing passes: it is always the one transformed.
    """
    mask = torch.arange(input_dim) < input_dim // 2
    return ~mask if flip and input_dim > 1 else mask


def make_mask(input_dim: int, split_dim: int | None, mask: Tensor | None) -> Tensor:
    check_size("input_dim", input_dim)
    if mask is not None:
        return _checked_mask(mask, input_dim)
    if split_dim is None:
        return half_mask(input_dim)
    if not (1 <= split_dim < input_dim or (input_dim == 1 and split_dim == 0)):
        raise ValueError(
            f"Expected split_dim between 1 and input_dim - 1 = {input_dim - 1}, got {split_dim!r}."
        )
    return torch.arange(input_dim) < split_dim


def _checked_mask(mask: Tensor, input_dim: int) -> Tensor:
    mask = torch.as_tensor(mask).cpu()
    if mask.dtype != torch.bool or mask.shape != (input_dim,):
        raise ValueError(
            f"Expected mask to be a bool tensor of shape ({input_dim},), got dtype {mask.dtype} and shape "
            f"{tuple(mask.shape)}."
        )
    passed = int(mask.sum())
    if passed == input_dim:
        raise ValueError(
            f"Expected mask to leave at least one dimension to transform, got {passed} of {input_dim} passed through."
        )
    if passed == 0 and input_dim > 1:
        raise ValueError(
            f"Expected mask to pass at least one dimension through to the conditioner, got 0 of {input_dim}."
        )
    return mask


def conditioner_of(
    mask: Tensor,
    hidden_dims: Sequence[int] | None,
    settings: SplineSettings,
    context_dim: int,
    network: dict[str, Any],
) -> nn.Module:
    """The network that reads what a mask passes through, and gives the parameters of the other splines."""
    input_dim, split_dim = len(mask), int(mask.sum())
    return make_conditioner(
        2 * split_dim if settings.tails == "circular" else split_dim,
        (input_dim - split_dim) * settings.num_params,
        checked_hidden_dims(hidden_dims, input_dim),
        context_dim=context_dim,
        **network,
    )
