"""What an optimizer does to parameters from one call to the next, and the way back from what is too far.

The learning rate is the caller's, and so is the optimizer. But a module is told of gradients by hooks on its
parameters, and at its next call it sees how far they were moved: :class:`Moves` takes back what a subclass finds too
far, and steps to what is no number. Until that call the parameters are where the optimizer has put them; whatever
reads them in between (a ``state_dict``, copies, pickles, the saving of Pyro's param store) looks first.

:class:`Stride` is for conditional flows that are drawn from in training, as posteriors are. A rate that suits a
location (.01 to .05) is none for networks of a context: when splines whose conditioners have 128 units join in
(:mod:`pyro_flowkit.head_start`) at .02, the loss explodes within some dozens of steps. So networks and splines that an
optimizer moves at a larger rate than :data:`RATE` go in the same direction as if the rate were that; what it moves at a
smaller one stays as it is, bit for bit. The constants and the linear part of the affine map move at the caller's rate,
as the encoder does, which is the caller's: they have to follow what it says. Maximum likelihood, where nothing is
drawn, has no limit at all.

The rate of an optimizer is not said, but seen: under Adam and its relatives the first move of every number is of the
same size, the rate. Later moves are smaller, as gradients disagree; where their median is larger, under a rate that
rises, it is the rate from then on. A rate that falls is a schedule of the caller's, which goes on top of the limit; a
new optimizer begins with even moves again. Under one whose first moves are uneven (SGD) every step is held to a root
mean square of :data:`RATE`.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowkit._pyro import StoreModule, before_saving
from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.warning import warn

RATE = 4e-3  # that of a recipe is 3e-3
# In a first step of Adam the moves are of one size; in the second half of them may be, those of layers that had no
# gradient in the first.
EVEN, TAIL = 1.01, 1 / 16
THINNED = 256


class Moves(nn.Module):
    """Watches the steps of an optimizer; a subclass says in :meth:`_place` where they may lead.

    It holds no parameters. Its buffers say how training went, not what was learned: they are no part of a
    ``state_dict``, but of checkpoints.

    Args:
        parts: parameters, those that move at one pace together; empty ones are left out.
        owner: what they are parts of, in words for warnings.

    Attributes:
        is_resting: while True nothing is watched, and no hook is on a parameter.
    """

    seen: Tensor

    def __init__(self, parts: Iterable[Iterable[nn.Parameter]], owner: str):
        super().__init__()
        filled = [part for part in map(tuple, parts) if part]
        self._parts: list[tuple[nn.Parameter, ...]] = filled
        self._sizes = [sum(parameter.numel() for parameter in part) for part in filled]
        like = filled[0][0].detach()
        self.register_buffer("seen", like.new_zeros(sum(self._sizes)), persistent=False)
        self._owner = owner
        self._is_resting = False
        self._is_traced = False
        self._has_warned = False
        self._hooks: dict[int, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Take the parameters as they are now: somebody else wrote them."""
        self._is_pending = False

    @property
    def is_resting(self) -> bool:
        return self._is_resting

    @is_resting.setter
    def is_resting(self, is_resting: bool) -> None:
        self._is_resting = is_resting
        while is_resting and self._hooks:
            self._hooks.popitem()[1].remove()

    @property
    def is_pending(self) -> bool:
        """Whether gradients came since the last look."""
        return self._is_pending

    def look(self) -> None:
        """Take back what the optimizer has done since the last look and what is too far."""
        if torch.jit.is_tracing() and torch.is_grad_enabled():
            self._is_traced = True  # there is no next call: a trace keeps its parameters
        if is_transformed() or self.is_resting:
            return
        with torch.no_grad():
            self._listen()
            self._compare(flat(self._parameters_in_order()))

    def _compare(self, now: Tensor) -> None:
        if not self._is_pending or self._is_traced:
            self.seen.copy_(now)
            return
        self._is_pending = False
        wanted = now - self.seen
        if not bool(wanted.any()):
            return  # gradients without a step, so far
        if not bool(wanted.isfinite().all()):
            self._warn("A step of the optimizer led to parameters that are not finite")
            self._write(self.seen.clone())
            return
        place = self._place(now, wanted)
        if place is None:
            self.seen.copy_(now)
        else:
            self._write(place)

    def _place(self, now: Tensor, wanted: Tensor) -> Tensor | None:
        """Where a step leads.

        Args:
            now: all parameters, where the optimizer has put them.
            wanted: how far that is from where they were.

        Returns:
            Where they shall be; None for where they are.
        """
        raise NotImplementedError

    def _write(self, values: Tensor) -> None:
        parameters = self._parameters_in_order()
        for parameter, value in zip(
            parameters, values.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.copy_(value.view_as(parameter))
        self.seen.copy_(values)

    def _listen(self) -> None:
        """Have the gradients of every parameter pass through :meth:`_receive`; copies and pickles lose that."""
        for i, parameter in enumerate(self._parameters_in_order()):
            if parameter.requires_grad and i not in self._hooks:
                self._hooks[i] = parameter.register_hook(partial(self._receive, i))
                before_saving(parameter, self.look)

    def _receive(self, i: int, gradient: Tensor) -> Tensor:
        self._is_pending = True
        norm = float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64))
        if not math.isfinite(norm):
            self._warn("A gradient was not finite")
            return torch.zeros_like(gradient)
        return self._handed_on(i, gradient, norm)

    def _handed_on(self, i: int, gradient: Tensor, norm: float) -> Tensor:
        """What the optimizer gets for a gradient of the i-th parameter, which is finite."""
        return gradient

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"{what} in the training of {self._owner}: its parameters did not follow. The model's density may "
                "overflow where the guide draws; this is said once, however often it happens."
            )

    def _parameters_in_order(self) -> list[nn.Parameter]:
        return [parameter for part in self._parts for parameter in part]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.look()  # a state_dict shares the memory of the parameters
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": {}}


class Stride(Moves):
    """Keeps parts of a conditional flow from moving at a rate beyond :data:`RATE` while it is drawn from.

    Args:
        parts: modules, those that move at one rate together.
        owner: what they are parts of, in words for warnings.

    Attributes:
        rates: that the optimizer moves each part at, 0 while it is not known.
    """

    rates: Tensor

    def __init__(self, parts: Iterable[Iterable[nn.Module]], owner: str):
        super().__init__(
            ([p for module in part for p in module.parameters()] for part in parts), owner
        )
        self.register_buffer("rates", self.seen.new_zeros(len(self._parts)), persistent=False)
        self._is_drawn = False

    def follow(self, distribution: FlowDistribution) -> None:
        """Be told of the draws of the flow's distribution."""
        if not torch.compiler.is_compiling():
            distribution._on_draw = self._drew

    def look(self) -> None:
        if self._hooks:  # of a flow that was never drawn from nothing is known, nor asked
            super().look()

    def _drew(self) -> None:
        super().look()
        self._is_drawn = True

    def _place(self, now: Tensor, wanted: Tensor) -> Tensor | None:
        was_drawn, self._is_drawn = self._is_drawn, False
        if not was_drawn:
            return None
        moves = wanted.split(self._sizes)
        factors = self._factors(moves, is_first=is_even(wanted, EVEN, TAIL))
        if min(factors) == 1.0:
            return None
        before, after = self.seen.split(self._sizes), now.split(self._sizes)
        return torch.cat(
            [
                there if factor == 1.0 else here + factor * move
                for here, there, move, factor in zip(before, after, moves, factors, strict=True)
            ]
        )

    def _factors(self, moves: Sequence[Tensor], *, is_first: bool) -> list[float]:
        """What the moves of every part are multiplied by; ``is_first`` of an optimizer, whose rate may be smaller."""
        rates, factors = self.rates.tolist(), []
        for i, move in enumerate(moves):
            rate = 0.0
            if bool(move.any()):
                if is_first or (rates[i] == 0.0 and is_even(move, EVEN, TAIL)):
                    rates[i] = quantiles(move, [0.5])[0]
                elif rates[i] > 0.0:
                    rates[i] = max(rates[i], quantiles(move, [0.5])[0])
                rate = rates[i] or float(move.square().mean().sqrt())
            factors.append(min(1.0, RATE / rate) if rate > 0.0 else 1.0)
        self.rates.copy_(torch.tensor(rates))
        return factors


class StridingModule(StoreModule):
    """A module of the param store with a :class:`Stride` as ``stride``, which looks before the parameters are read.

    There may be None, or none yet.
    """

    def _look(self) -> None:
        stride = self._modules.get("stride")
        if isinstance(stride, Stride) and not torch.compiler.is_compiling():
            stride.look()

    def sync_with_store(self, *, lend: bool = True) -> None:
        super().sync_with_store(lend=lend)
        self._look()

    def _stored_values_taken(self) -> None:
        stride = self._modules.get("stride")
        if isinstance(stride, Stride):
            stride.forget()

    def __getstate__(self) -> dict[str, Any]:
        self._look()
        return super().__getstate__()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Their values, one after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def quantiles(moves: Tensor, shares: Sequence[float]) -> list[float]:
    """Of the sizes of those that are not zero, by :data:`THINNED` of them; there must be one."""
    moving = moves[moves != 0]
    sizes = moving[:: 1 + len(moving) // THINNED].abs().double().sort().values
    return [float(sizes[int(share * len(sizes))]) for share in shares]


def is_even(moves: Tensor, ratio: float, tail: float) -> bool:
    """Whether all but a share of moves at either end are of one size, as the first ones of Adam are."""
    low, high = quantiles(moves, (tail, 1.0 - tail))
    return high <= ratio * low
