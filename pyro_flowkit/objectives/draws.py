"""Draws of a guide with a cut behind each of them: what a gradient estimator may see of the way to a draw.

A program computes draws one after another, ``z_i = T_i(noise, phi, z_<i)``. An estimator in which a draw has another
weight on the way back than the parameters beside it needs to stop at the draw: ``Gated`` puts a gate behind every
reparameterised draw, open at first, so that ``d log w / d z_i`` comes with all that follows from z_i, and shut later,
so that only the direct way from a draw to its own distribution is left. ``Detached`` takes the draws as given values.

Both are handlers around the guide, so that whatever the guide computes from a draw, a later distribution for one, is
behind the cut as well. The draw that leaves the cut is another tensor: its density is then computed from the value,
not from what a distribution remembers of the way there.
"""

from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flowkit.programs.sites import is_point_mass, is_scored


class Draw(NamedTuple):
    """A draw before and behind its gate; both have shape ``batch + event``."""

    name: str
    before: Tensor
    behind: Tensor
    event_dim: int


class Detached(Messenger):
    """Makes every draw a given value, except what a Delta computes from others."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_draw(msg):
            msg["value"] = msg["value"].detach()


class Gated(Messenger):
    """Puts a gate behind every draw that gradients can pass; :meth:`shut` closes them all."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self._gate = _Gate()

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_draw(msg) and msg["value"].requires_grad:
            before = msg["value"]
            behind = _Passage.apply(before, self._gate)
            msg["value"] = behind
            self.draws.append(Draw(msg["name"], before, behind, msg["fn"].event_dim))

    def shut(self) -> None:
        """From now on nothing passes back."""
        self._gate.open = False


class _Gate:
    open = True


class _Passage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return (grad if ctx.gate.open else None), None


def _is_draw(msg: Any) -> bool:
    return is_scored(msg) and not (msg["is_observed"] or is_point_mass(msg["fn"]))
