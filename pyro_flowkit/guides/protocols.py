"""How guides take part in :func:`pyro_flowkit.fit`, beside their ``recipe()``.

Any guide takes part that has these methods, whoever wrote it: where it knows of a good place to start
from what a :class:`StartingGuide` has; where it can begin anew, or has a say in its objective, what a
:class:`RestartingGuide` and an :class:`ObjectiveGuide` have. Diagnostics ask a :class:`DensityGuide` for its density.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pyro.infer import ELBO
from torch import Tensor

from pyro_flowkit.guides.room import Room
from pyro_flowkit.programs.vectorized import Vectorized


class StartingPoint(Protocol):
    """Where a guide's training started, and the way back there.

    Attributes:
        tensors: the guide's ``state_dict`` at that start.
        room: what the guide has left to gain.
    """

    tensors: dict[str, Tensor]
    room: Room

    def take_over(self) -> None:
        """Let the guide as it is now be the start."""

    def keep_better(self) -> bool:
        """Go back to the start unless the trained guide is better; whether that was kept."""


@runtime_checkable
class StartingGuide(Protocol):
    """A guide that finds a place to start from, and does not end below it."""

    def find_start(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        max_seconds: float | None = None,
        found: Mapping[str, Tensor] | None = None,
    ) -> StartingPoint | None:
        """Go there; None, with nothing done, where there is no way to.

        Args:
            model: the model that the guide will be trained on.
            args: its arguments, with all of the data.
            kwargs: its keyword arguments.
            max_seconds: of the search, by the clock on the wall; None where the caller has no limit.
            found: the ``tensors`` of an earlier start, to go on from there without a search.
        """

    def parameter_groups(self) -> Sequence[tuple[Sequence[Tensor], float]]:
        """Parameters that have, after such a start, another learning rate than the recipe's, with that rate."""

    def room(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Room | None:
        """What is left to gain on a model; None where that cannot be told."""


@runtime_checkable
class RestartingGuide(Protocol):
    """A guide, a ``torch.nn.Module``, that can begin anew elsewhere, for ``fit(restarts=...)``."""

    def check_restarts(self) -> None:
        """Raise a ValueError where this guide has one place only, after all; asked before the first fit."""

    def restart(self, number: int, *args: Any, **kwargs: Any) -> None:
        """Begin anew, as if nothing had been learned.

        Args:
            number: of the start, from 1; the guide's own was 0.
            args: the model's arguments, with all of the data.
            kwargs: the model's keyword arguments.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """As a ``torch.nn.Module`` has it."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """As a ``torch.nn.Module`` has it."""


@runtime_checkable
class ObjectiveGuide(Protocol):
    """A guide that has a say in its objective.

    An objective of its own may call the guide by whatever names it has, so ``fit`` puts no handlers around it: in a
    plate of the data it says itself which rows ``val_fraction`` left.
    """

    def elbo(self, program: Vectorized, num_particles: int) -> ELBO | None:
        """An objective for this guide and its model, in the place of ``Trace_ELBO``; None if it has none.

        Args:
            program: the model at many draws.
            num_particles: draws of the guide in a step.
        """

    def check_objective(self, objective: ELBO) -> None:
        """Raise a ValueError for an objective of the caller's that would not train all of the guide."""


@runtime_checkable
class DensityGuide(Protocol):
    """A guide whose density can be had at values that it did not draw."""

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """log q in nats, shape ``(*sample_shape,)``.

        Args:
            values: of all latents, ``{site: value}``, shapes ``(*sample_shape, *batch, *event)``.
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
