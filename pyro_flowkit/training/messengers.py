"""Effect handlers of a step: which parameters a program touches, and the weight of its KL."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger


class ParamCapture(Messenger):
    """Records the unconstrained parameters that a program touches; gives those that await a value theirs.

    Args:
        known: Names of parameters that are not recorded.
        awaited: Values for entries of the param store that do not exist yet.
    """

    def __init__(self, known: Container[str], awaited: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._known, self._awaited = known, awaited
        self.found: dict[str, torch.Tensor] = {}

    # Not by a method for each kind of site, which Pyro looks for by name, at every site of every step.

    def _process_message(self, msg: Any) -> None:
        if self._awaited and msg["type"] == "param" and msg["name"] in self._awaited:
            msg["fn"](*msg["args"], **msg["kwargs"])  # comes into being
            store = pyro.get_param_store()
            store._params[msg["name"]].data.copy_(self._awaited.pop(msg["name"]))

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param" and msg["name"] not in self._known:
            value = msg["value"]
            # Inside a subsampled plate the value is a slice that remembers the whole.
            whole = getattr(value, "_pyro_unconstrained_param", None)
            self.found[msg["name"]] = value.unconstrained() if whole is None else whole


class KLWeight(Messenger):
    """Multiplies the log-probabilities of latent sites by a weight."""

    weight = 1.0

    def _pyro_sample(self, msg: Any) -> None:
        if self.weight != 1.0 and not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight
