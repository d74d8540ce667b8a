"""Sites whose densities are computed elsewhere, in the plates where a model has them."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor


class Given(TorchDistribution):
    """Stands for the distribution of a site; its log-density is settled by the time that somebody asks.

    Args:
        like: the distribution.
        batch_shape: another batch shape than that.
    """

    arg_constraints: dict = {}  # noqa: RUF012  (torch's own attribute)

    def __init__(self, like: Any, batch_shape: torch.Size | None = None):
        self._like = like
        self._shared: dict[str, Any] = {}  # with what this is expanded to
        batch_shape = like.batch_shape if batch_shape is None else batch_shape
        super().__init__(batch_shape, like.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self._like.support

    def settle(self, log_prob: Tensor) -> None:
        """Say what the log-density is, in nats."""
        self._shared["log_prob"] = log_prob

    @property
    def expanded_shape(self) -> torch.Size:
        """The batch shape in the plates around the site, once it has passed them."""
        return self._shared["batch_shape"] if "batch_shape" in self._shared else self.batch_shape

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Given":
        new = Given(self._like, torch.Size(batch_shape))
        new._shared = self._shared
        new._shared["batch_shape"] = new.batch_shape
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self._shared["log_prob"]
        return log_prob

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        raise NotImplementedError("a draw comes from a guide")


class Frames(Messenger):
    """Puts the next sites into the plates, and under the scale, that they have in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.settle((), 1.0)

    def settle(self, stack: tuple, scale: Any) -> None:
        """Say which plates and which scale."""
        self._stack, self._scale = stack, scale

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = (*self._stack, *msg["cond_indep_stack"])
        if isinstance(self._scale, Tensor) or self._scale != 1.0:
            msg["scale"] = msg["scale"] * self._scale
