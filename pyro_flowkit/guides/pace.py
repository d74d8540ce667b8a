r"""How far a guide moves at a step of the user's own optimizer.

A learning rate that suits ``AutoNormal`` (.01 to .05, one particle) is no rate for networks, and a rate that suits
networks (.001) is slow for a location. A guide cannot choose the optimizer, but it can see what it does: how far every
parameter moved since the last call. At its next call it takes the moves back to what its parts bear:

- *location and scale* move in units of the guide's standard deviations, the scale ten times as far as the rate says and
  the location at first fifty times, up to a limit; a wide posterior and a narrow one take the same number of steps. A
  guide that widens before it arrives can settle on several modes at once, as one broad Gaussian;
- the *matrix*, the *hierarchy* and the *flow* (networks and LU layers) move as the rate says, up to limits of their
  own.

The limits fall as noise takes over. What is new in a move, ``e_t = move_t - .9 move_{t-1}`` under Adam, points the same
way from step to step while the guide travels, and any way once it has arrived; so do, less sharply, the moves of many
steps together. With r the running cosine of e_t and e_{t-2} over .3, or the share of the moves' power that is in their
mean (less that of noise), whichever is larger, the clock n of a part advances by ``1 - r`` (0 to 2) at every step, and
its limit falls as ``(1 + n / T)^-a``, down to a floor that is higher for more particles. That is a stochastic
approximation with the steps of Kesten, who slows down when successive gradients disagree. The user's rate sets the pace
within the limits, and a schedule of the user's goes on top of them.

Gradients are handed to the optimizer in units of their own size over the last steps, times .01. Adam and its relatives
do not mind a factor; but what the gradients of a start far away leave in Adam's second moment would hold it up for a
thousand steps, and ``ClippedAdam`` cuts every number at 10: cut gradients are biased, and with one particle they widen
a guide without end. As the size is that of earlier steps, nothing is biased by it. Whether an optimizer is of Adam's
kind is seen in its first step, whose moves are then all of one size; for others (SGD) the factor is made up for. A
gradient that is not finite is no step, and said once.

A guide that was not called since the optimizer's last step has not taken it back yet: every summary, ``state_dict``,
copies, pickles and the saving of Pyro's param store see to that.

References:
    Harry Kesten. Accelerated Stochastic Approximation. Annals of Mathematical Statistics 1958.

    Bernard Delyon, Anatoli Juditsky. Accelerated Stochastic Approximation. SIAM Journal on Optimization 1993.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowkit.moves import Moves, is_even

SHRINK = 0.01  # of the gradients
MOMENTUM = 0.9  # of Adam and its relatives
AGREEMENT = 0.3  # cosine from which on a step counts as travel alone
MEMORY = 0.95
DRIFT_MEMORY = 0.98
# share of the moves' power that is in their mean: in noise alone (0.19, and a margin), and on the way
NO_DRIFT, DRIFT = 0.25, 0.6
OUTLYING = 30.0  # a gradient so many times as large as usual counts as if it were just that
SCALE_MEMORY, GROWTH_MEMORY = 0.9, 0.5  # of the gradients' log size, falling and rising
FORGETTING = 0.99  # of the largest move seen
FOREIGN = 10.0  # a move so many times the largest one seen is no optimizer's
UNEVEN = 3.0  # ratio of the quartiles of the first moves that tells SGD from Adam

_OWN_PACE = ("raw_loc", "raw_log_scale")
_CLOCK = ("even", "steps")
_EVEN, _STEPS = range(len(_CLOCK))
_SIGNS = ("cosine", "power", "noisy")
_COSINE, _POWER, _NOISY = range(len(_SIGNS))


@dataclass(frozen=True)
class Limit:
    """The largest move of a part: ``first (1 + n / steps)^-power`` after n noisy steps, and not below the floor.

    Attributes:
        gain: moves in the part's units for a unit of its parameters.
        floor: with one particle; it rises with the square root of their number.
        boost: by how much more than the optimizer says the part moves at first, where the limit allows; falls to 1.
    """

    first: float
    steps: float
    power: float
    floor: float
    gain: float = 1.0
    boost: float = 1.0

    def after(self, noisy_steps: float, num_particles: float) -> float:
        falling = self.first * self._share(noisy_steps)
        return max(falling, min(self.first, self.floor * num_particles**0.5))

    def boost_after(self, noisy_steps: float) -> float:
        return 1.0 + (self.boost - 1.0) * self._share(noisy_steps)

    def _share(self, noisy_steps: float) -> float:
        return (1.0 + noisy_steps / self.steps) ** -self.power


LOCATION = Limit(0.4, 8.0, 1.0, 1e-3, gain=10.0, boost=5.0)
SCALE = Limit(0.08, 40.0, 1.0, 1e-3, gain=10.0)
MATRIX = Limit(0.02, 30.0, 1.0, 2e-4, gain=10.0)
HIERARCHY = Limit(3e-3, 50.0, 0.75, 3e-4)
FLOW = Limit(1e-3, 50.0, 0.75, 1e-4)


@dataclass(frozen=True)
class Part:
    """Parameters that move at one pace.

    Attributes:
        parameters: those of one kind.
        limit: of their moves.
        is_affine: whether the clock listens to them.
    """

    parameters: tuple[nn.Parameter, ...]
    limit: Limit
    is_affine: bool = False

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


class Pace(Moves):
    """Watches the steps of an optimizer and shortens them; see the module's docstring.

    Args:
        affine: the guide's last layer.
        parts: the parameters of the layers before it, with the limits of their moves.
        is_active: False never does anything.
    """

    reach: Tensor
    last: Tensor
    innovations: Tensor
    drift: Tensor
    signs: Tensor
    clock: Tensor
    sizes: Tensor

    def __init__(
        self, affine: Any, parts: Iterable[tuple[nn.Module, Limit]], *, is_active: bool = True
    ):
        matrix = [p for name, p in affine.named_parameters() if name not in _OWN_PACE]
        owned = [
            Part((affine.raw_loc,), LOCATION, is_affine=True),
            Part((affine.raw_log_scale,), SCALE, is_affine=True),
            *([Part(tuple(matrix), MATRIX, is_affine=True)] if matrix else []),
            *(Part(tuple(module.parameters()), limit) for module, limit in parts),
        ]
        self._owned = [part for part in owned if part.size]
        super().__init__([part.parameters for part in self._owned], "an AutoSplineFlow")
        self._rate: float = affine.rate
        count = sum(part.size for part in self._owned if part.is_affine)
        for name, shape in (
            ("reach", (len(self._owned),)),
            ("last", (count,)),
            ("innovations", (2, count)),
            ("drift", (count,)),
            ("signs", (sum(part.is_affine for part in self._owned), len(_SIGNS))),
            ("clock", (len(_CLOCK),)),
            ("sizes", (len(self._parameters_in_order()),)),
        ):
            self.register_buffer(name, self.seen.new_zeros(shape), persistent=False)
        self._is_active = is_active
        self._others_stepped = False
        self._draws = 0
        self._usual: list[float] = []  # the sizes while a step's gradients come, and what came
        self._heard: dict[int, list[float]] = {}

    def drew(self, count: int) -> None:
        """Take note of draws of the guide in training."""
        self._draws += count

    def look(self, *, others_stepped: bool = False) -> None:
        """Shorten what the optimizer has done since the last look to what the guide's parts bear.

        Args:
            others_stepped: gradients came to other components of the guide: without any of its own this one has been
                moved by momentum alone, and goes back.
        """
        if self._is_active:
            self._others_stepped = others_stepped
            super().look()

    def _compare(self, now: Tensor) -> None:
        if self._others_stepped and self._heard:
            self._is_pending = True
        if self._others_stepped and (self._is_traced or not self._is_pending):
            self._write(self.seen.clone())
        else:
            super()._compare(now)

    def _place(self, now: Tensor, wanted: Tensor) -> Tensor | None:
        moves, log_scale = list(wanted.split(self._sizes)), self.seen.split(self._sizes)[1]
        largest = torch.stack([move.abs().max() for move in moves])
        if not bool((largest[:2] > 0).all()):  # no step leaves location or scale where it is
            return None
        if not bool(self.reach.any()):
            self.clock[_EVEN] = float(is_even(wanted, UNEVEN, 0.25))
        elif bool(self.clock[_EVEN]) and bool((largest > FOREIGN * self.reach.max()).any()):
            return None
        torch.maximum(FORGETTING * self.reach, largest, out=self.reach)
        self._measure_gradients()
        self.clock[_STEPS] += 1.0
        noisy_steps = self._tick(moves)
        for i, part in enumerate(self._owned):
            moves[i] = self._shortened(moves[i], part, float(self.reach[i]), noisy_steps[i])
        moves[0] = moves[0] * (self._rate * log_scale).exp()
        self._draws = 0
        return self.seen + torch.cat(moves)

    def _shortened(self, move: Tensor, part: Part, reach: float, noisy_steps: float) -> Tensor:
        # where the gradients' size counts, they came smaller than they are
        limit = part.limit
        factor = limit.boost_after(noisy_steps) / (1.0 if bool(self.clock[_EVEN]) else SHRINK)
        allowed = limit.after(noisy_steps, max(1, self._draws))
        return move * min(factor, allowed / (limit.gain * reach + 1e-30))

    def _tick(self, moves: Sequence[Tensor]) -> list[float]:
        """Let the clocks advance by what this step says; the number of noisy steps for every part."""
        affine = [move for move, part in zip(moves, self._owned, strict=True) if part.is_affine]
        sizes = [len(move) for move in affine]
        steps, signs = float(self.clock[_STEPS]), self.signs.tolist()
        memories = (self.last, self.innovations, self.drift)
        rows = zip(
            affine, self.reach.tolist(), *(m.split(sizes, dim=-1) for m in memories), strict=False
        )
        for own, (move, reach, last, innovations, drift) in zip(signs, rows, strict=True):
            move = move / (reach + 1e-30)
            innovation = move - MOMENTUM * last
            size = float(innovation.norm() * innovations[0].norm())
            if size > 0.0:
                cosine = float(innovation @ innovations[0]) / size
                own[_COSINE] += (1 - MEMORY) * (cosine - own[_COSINE])
            elif steps <= 2.0:
                own[_COSINE] = 1.0
            drift.lerp_(move, 1 - DRIFT_MEMORY)
            own[_POWER] += (1 - DRIFT_MEMORY) * (float(move @ move) - own[_POWER])
            last.copy_(move)
            innovations[0] = innovations[1]
            innovations[1] = innovation
            share = float(drift @ drift) / (own[_POWER] + 1e-30) / (1.0 - DRIFT_MEMORY**steps)
            travel = max(own[_COSINE] / AGREEMENT, (share - NO_DRIFT) / (DRIFT - NO_DRIFT))
            own[_NOISY] += min(max(1.0 - travel, 0.0), 2.0)
        self.signs.copy_(torch.tensor(signs))
        noisy = [own[_NOISY] for own in signs]
        return noisy + (len(self._owned) - len(noisy)) * [sum(noisy) / len(noisy)]

    def _handed_on(self, i: int, gradient: Tensor, norm: float) -> Tensor:
        if not self._usual:
            self._usual = self.sizes.tolist()
        size = norm / gradient.numel() ** 0.5
        self._usual[i] = self._usual[i] or size
        self._heard.setdefault(i, []).append(size)
        return gradient * (SHRINK / max(self._usual[i], size / OUTLYING, 1e-30))

    def _measure_gradients(self) -> None:
        """Follow the size of gradients with what came since the last step."""
        if not self._heard:
            return
        for i, sizes in self._heard.items():
            usual, now = self._usual[i], sum(sizes) / len(sizes)
            share = GROWTH_MEMORY if now > usual else SCALE_MEMORY
            self._usual[i] = usual**share * now ** (1 - share) if now > 0.0 else usual
        self.sizes.copy_(torch.tensor(self._usual))
        self._usual, self._heard = [], {}
