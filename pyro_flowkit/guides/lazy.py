"""What guides have in common whose parameters exist only after they have seen the model."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.util import detach
from torch import Tensor, nn

from pyro_flowkit._pyro import StoreModule


class LazyGuide(nn.Module):
    """A guide that is set up by its first call, or by ``setup``; the first of the bases, before Pyro's.

    Until then whatever needs its parameters is an error, and conversions (``.to()``, ``.double()``) are kept for later.
    """

    prototype_trace: Any
    _model: Any
    _conversions: list[Callable[[Tensor], Tensor]]
    _create_plates: Callable[..., Any]  # as Pyro has it

    def _require_setup(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters yet: call setup(*args, **kwargs) with the model's arguments, "
                "or the guide itself, first."
            )

    def _convert(self) -> None:
        """Apply the conversions that came before the setup."""
        for conversion in self._conversions:
            self._apply(conversion)
        self._conversions.clear()

    # Parameters exist only after setup; to give out none instead would train nothing, silently.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._require_setup()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self._require_setup()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._require_setup()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.prototype_trace is None:
            self._conversions.append(fn)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Unlike Pyro's, leaves the guide itself as it is: only the copy is without model and master.
        state = self.__dict__.copy()
        if self.prototype_trace is not None:
            state = StoreModule.__getstate__(cast(StoreModule, self))
        return {**state, "_model": None, "master": None, "_conversions": []}

    def __deepcopy__(self, memo: dict) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model = self._model  # the same model: a copy can be trained on
        new._conversions = list(self._conversions)
        return new


def lighten(trace: poutine.Trace) -> None:
    """Keep of a prototype its shapes, supports and first values: it is copied and pickled with the guide.

    The data, the model's parameters and every graph are dropped.
    """
    trace.nodes["_INPUT"].update(args=(), kwargs={})
    trace.nodes["_RETURN"]["value"] = None
    for site in trace.nodes.values():
        if site["type"] == "sample":
            fn = site["fn"]
            support = detach(fn.support)
            site["fn"] = dist.ImproperUniform(support, fn.batch_shape, fn.event_shape)
            site["value"] = site["value"].detach()
