"""A fixed permutation of the dimensions: the cheapest mixing layer."""

import torch
from torch import Tensor

from pyro_flowkit.ops import chain
from pyro_flowkit.ops.chain import Link
from pyro_flowkit.transforms.base import FlowTransformModule


class Permute(FlowTransformModule):
    """``y[..., i] = x[..., permutation[i]]``; volume preserving, log-det 0.

    Args:
        permutation: integer tensor of shape ``(D,)`` holding 0 to D - 1 in some order. It is a buffer, so
            ``state_dict`` carries it.

    Raises:
        ValueError: if it is no permutation.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> T.Permute(torch.tensor([1, 0])).inv(torch.tensor([1.0, 2.0]))
        tensor([2., 1.])
    """

    is_affine = True

    def __init__(self, permutation: Tensor):
        permutation = checked_permutation(permutation)
        super().__init__(len(permutation))
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", permutation.argsort())
        self._read: tuple[Tensor, int, tuple[int, ...]] | None = None

    @property
    def sign(self) -> int:
        """+1 for an even permutation, -1 for an odd one."""
        matrix = torch.eye(self.input_dim)[self.permutation.cpu()]
        return int(torch.linalg.det(matrix).round())

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        return x.index_select(-1, self.permutation), x.new_zeros(()).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        return y.index_select(-1, self.inverse_permutation), y.new_zeros(()).expand(y.shape[:-1])

    @torch.no_grad()
    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        return derivative.index_select(-1, self.permutation)

    def link(self) -> Link | None:
        if type(self) is not Permute:
            return None
        now = self.permutation
        if self._read is None or self._read[0] is not now or self._read[1] != now._version:
            self._read = (now, now._version, tuple(now.tolist()))
        return chain.permutation(self._read[2])

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


def checked_permutation(permutation: Tensor, input_dim: int | None = None) -> Tensor:
    """The permutation on the CPU, in int64.

    Raises:
        ValueError: if it is none, or of another size than ``input_dim``.
    """
    permutation = torch.as_tensor(permutation)
    if permutation.dim() != 1 or permutation.is_floating_point() or permutation.numel() == 0:
        raise ValueError(
            f"Expected permutation to be an integer tensor of shape (D,), got dtype {permutation.dtype} and "
            f"shape {tuple(permutation.shape)}."
        )
    if input_dim is not None and len(permutation) != input_dim:
        raise ValueError(
            f"Expected a permutation of {input_dim} dimensions, got {len(permutation)} entries."
        )
    permutation = permutation.detach().cpu().long()
    if permutation.sort().values.tolist() != list(range(len(permutation))):
        raise ValueError(
            f"Expected a permutation of 0 to {len(permutation) - 1}, got {permutation.tolist()}."
        )
    return permutation


def permute(input_dim: int, permutation: Tensor | None = None, *, seed: int = 0) -> Permute:
    """A :class:`Permute`; without a permutation, the random one that follows from ``seed``.

    Args:
        input_dim: size D of the event.
        permutation: integer tensor of shape ``(D,)``.
        seed: of the random permutation; the global random state is neither read nor changed.

    Raises:
        ValueError: if the permutation is none, or of another size.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> T.permute(3, torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """
    if permutation is None:
        permutation = torch.randperm(input_dim, generator=torch.Generator().manual_seed(seed))
    return Permute(checked_permutation(permutation, input_dim))
