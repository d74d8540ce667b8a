"""The processes that share a fit, as ``torchrun`` starts them: same parameters, other noise, averaged gradients.

Every process ("rank") holds the whole model and takes its part of each minibatch; without minibatches all see the same
data, and each adds its own particles. With g_r the gradient of rank r, all take the step of

    g = (1 / R) sum_r g_r

so that R ranks with batches of B / R do what one process does with batches of B. What decides about the course of the
fit (the time that has passed, a wish to stop) is agreed upon at every step, so that parameters stay equal bit for bit.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor


class LostRankError(RuntimeError):
    """Another process of the fit is gone.

    Example:
        >>> from pyro_flowkit.training import LostRankError
        >>> try:
        ...     raise LostRankError("process 0 of 2 has lost the others")  # fit does, in the processes that are left
        ... except RuntimeError as error:  # start all of them again, with resume=True
        ...     print(error)
        process 0 of 2 has lost the others
    """


class Ranks:
    """This process among those that share the fit; alone if there is but one.

    Attributes:
        number: Of this process, from 0.
        count: How many there are.
    """

    def __init__(self) -> None:
        self.number, self.count = 0, 1
        self._device = torch.device("cpu")

    @classmethod
    def join(cls, device: torch.device | None) -> Ranks:
        """The ranks of this job: those of the process group, or of the environment that ``torchrun`` sets."""
        ranks = cls()
        if not distributed.is_available():
            return ranks
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2:
                return ranks
            on_gpu = device is not None and device.type == "cuda"
            distributed.init_process_group("nccl" if on_gpu else "gloo")
            atexit.register(distributed.destroy_process_group)
        ranks.number, ranks.count = distributed.get_rank(), distributed.get_world_size()
        if distributed.get_backend() == "nccl":
            ranks._device = torch.device("cuda", torch.cuda.current_device())
        return ranks

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows the bar."""
        return self.number == 0

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        if self.count == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._do(distributed.all_reduce, together, op=distributed.ReduceOp.MAX)
        return together.tolist()

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the ranks."""
        if self.count == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._do(distributed.all_reduce, together)
        return together.tolist()

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the values of the first."""
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self._device, copy=True).contiguous()
            self._do(distributed.broadcast, sent, src=0)
            tensor.copy_(sent)

    def average(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Averages the gradients of all parameters in one go, and the loss with them, which is returned.

        A parameter that got a gradient on some ranks only counts as zero on the others; one that got none anywhere has
        none.
        """
        if self.count == 1:
            return loss
        # Not around all of it: to enter it takes longer than there is to do alone.
        with torch.no_grad():
            return self._average(parameters, loss)

    def _average(self, parameters: Sequence[Tensor], loss: float) -> float:
        flags = [0.0 if p.grad is None else 1.0 for p in parameters]
        dtype = torch.float32
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        pieces = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(self._device, dtype)
            for p in parameters
        ]
        extra = torch.tensor([loss, *flags], dtype=dtype, device=self._device)
        together = torch.cat([extra, *pieces])
        self._do(distributed.all_reduce, together)
        numbers, mean = together[: len(extra)].tolist(), together[len(extra) :] / self.count
        parts = mean.split([p.numel() for p in parameters])
        for parameter, flag, part in zip(parameters, numbers[1:], parts, strict=True):
            if flag:
                part = part.view_as(parameter).to(parameter)
                if parameter.grad is None:
                    parameter.grad = part
                else:
                    parameter.grad.copy_(part)
        return numbers[0] / self.count

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in their order."""
        found = [value] * self.count
        if self.count > 1:
            self._do(distributed.all_gather_object, found, value)
        return found

    def share(self, value: Any) -> Any:
        """What the first rank has."""
        if self.count == 1:
            return value
        sent = [value]
        self._do(distributed.broadcast_object_list, sent, src=0)
        return sent[0]

    def _do(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            operation(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise LostRankError(
                f"rank {self.number} of {self.count} has lost the others, of which at least one has ended: {reason}. "
                "Start all of them again, with resume=True to go on from the last checkpoint."
            ) from error
