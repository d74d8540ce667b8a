"""What every function here expects of its tensors."""

from torch import Tensor


def check_floating(x: Tensor, what: str) -> None:
    """Raise a ValueError for integers and booleans, which results would be cut to."""
    if not x.is_floating_point():
        raise ValueError(
            f"Expected {what} in floating point, got {x.dtype}: convert it, x.float()."
        )
