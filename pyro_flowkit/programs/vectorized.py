r"""A model for many draws of its latents at a time, whatever the style that it is written in.

There are three ways to the densities of a model at many draws:

- **graph**: the model is run for one draw while its tensor operations are recorded; the recording is then run for all
  draws (:mod:`pyro_flowkit.programs.graph`). ``b[group]`` and ``x @ w`` mean what they mean for one draw, and Pyro's
  handlers cost nothing. A model that reads values, branches on them or draws by itself has no such recording.
- **plate**: the draws are one more plate to the left of the model's own, as in Pyro's ``vectorize_particles``. It is up
  to the model to be written for that.
- **rows**: one draw after the other.

A way is taken only if it gives the log-densities of plain runs: at every site, in every element, for two draws at
first, and for one at calls 1, 2, 4, 8 and so on and wherever the shapes of arguments are new.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_flowkit.programs.agreement import gradient_gap, row_disagreement
from pyro_flowkit.programs.given import Frames, Given
from pyro_flowkit.programs.graph import Unrecordable
from pyro_flowkit.programs.layout import Layout, Layouts
from pyro_flowkit.programs.recording import Recording, Totals
from pyro_flowkit.programs.runs import (
    BesideEachOther,
    Densities,
    Program,
    Values,
    each_draw,
    own_values,
    run_given,
    scaled,
    stacked,
)
from pyro_flowkit.warning import warn

Way = Literal["graph", "plate", "rows"]
WAYS: tuple[Way, ...] = ("graph", "plate", "rows")


class Vectorized:
    """A model at many draws at a time. Called in a plate of particles, it has the sites that the model has.

    Args:
        model: a Pyro model, without enumerated sites.
        plain_run: gives a trace of a program for arguments ``(args, kwargs)``, with values for all latents.
        latents: their names, with the number of their batch dimensions in a plain run.
        nesting: number of batch dimensions of the plates of the model and its guide; the draws are left of them.
        with_deterministic: whether the values of deterministic sites are wanted, too.
        num_varying: how many of the first arguments are other tensors from call to call.

    Attributes:
        way: how densities are computed, after :meth:`settle`.
        reasons: why not in the ways before that, clauses by way.
    """

    def __init__(
        self,
        model: Program,
        plain_run: Callable[[Program, tuple, dict], poutine.Trace],
        latents: Mapping[str, int],
        nesting: int,
        *,
        with_deterministic: bool = False,
        num_varying: int = 0,
    ):
        self.model, self.nesting, self.latents = model, nesting, dict(latents)
        self.way: Way = "rows"
        self.reasons: dict[str, str] = {}
        self._with_deterministic = with_deterministic
        self._recording = Recording(model, with_deterministic, num_varying)
        self._layouts = Layouts(model, plain_run, self.latents)
        self._agrees: dict[Way, bool] = {}
        self._calls = 0

    def settle(self, values: Values, args: tuple, kwargs: dict, ways: Sequence[Way] = WAYS) -> Way:
        """Choose the first way that agrees with plain runs; "rows" does by its nature.

        Args:
            values: of all latents at two draws or more, as :meth:`log_probs` takes them.
            args: of the model.
            kwargs: of the model.
            ways: those to try.
        """
        for way in ways:
            self.way = way
            reason = None if way == "rows" else self._objection(values, args, kwargs)
            if reason is None:
                return way
            self.reasons[way] = reason
        self.way = "rows"
        return self.way

    def look_again(self) -> None:
        """Compare with a plain run at the next call: time has passed."""
        self._calls = 0

    def takes_recording(self) -> bool:
        """Whether the next call need not be compared with a plain run, but is the recording's; counts it then."""
        if self.way != "graph" or self._is_due(self._calls + 1):
            return False
        self._calls += 1
        return True

    def recorded_totals(
        self, values: Values, rows: Values, args: tuple, kwargs: dict
    ) -> Totals | None:
        """The log joint density as a function of tensors; None where the way is not the recording."""
        if self.way != "graph":
            return None
        return self._recording.totals(values, rows, args, kwargs)

    def agrees(self, way: Way, values: Values, args: tuple, kwargs: dict) -> bool:
        """Whether another way than the one that was taken gives the densities of plain runs, too."""
        if way not in self._agrees:
            taken, self.way = self.way, way
            self._agrees[way] = way == taken or self._objection(values, args, kwargs) is None
            self.way = taken
        return self._agrees[way]

    def padded(self, name: str, value: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Values of a site ``(n, *batch, *event)`` as they are in a plate of n draws."""
        return self._wide(value, self.layout(args, kwargs)[name].fn.event_dim)

    def complaint(self) -> str:
        """Why the model is not run for all draws at once, for people."""
        graph, plate = self.reasons.get("graph"), self.reasons.get("plate")
        parts = []
        if graph is not None:
            parts.append(f"it cannot be recorded: {graph}")
        if plate is not None:
            parts.append(f"it is not written for a plate to the left of its own: {plate}")
        return "; ".join(parts)

    def layout(self, args: tuple, kwargs: dict) -> dict[str, Layout]:
        """The model's sites for arguments of these shapes."""
        return self._layouts.of(args, kwargs)

    def drawn_rows(self, args: tuple, kwargs: dict) -> Values:
        """Rows of those plates that have some of theirs only."""
        layout = self.layout(args, kwargs)
        return {name: site.fn() for name, site in layout.items() if site.kind == "subsample"}

    # ---- densities

    def log_probs(self, values: Values, args: tuple, kwargs: dict) -> Values:
        """log-densities of all sites at many draws, with scales and masks, in nats; now and then they are verified.

        Args:
            values: of all latents, shapes ``(n, *batch, *event)`` with the batch shape of a plain run.
            args: of the model.
            kwargs: of the model.

        Returns:
            ``{site: log_prob}``, shapes ``(n, *nesting dims)``.
        """
        return scaled(self._checked(values, self.drawn_rows(args, kwargs), args, kwargs))

    def log_joint(self, values: Values, args: tuple, kwargs: dict) -> Tensor:
        """log p(x, z) at many draws, shape ``(n,)``, in nats."""
        if self.way == "rows":  # whose sites may differ from draw to draw
            runs = [self._run(self.model, draw, args, kwargs) for draw in each_draw(values)]
            totals = [[part.sum() for part in scaled(run).values()] for run in runs]
            return torch.stack([torch.stack(total).sum() for total in totals])
        parts = self.log_probs(values, args, kwargs).values()
        return torch.stack([part.reshape(len(part), -1).sum(-1) for part in parts]).sum(0)

    def _densities(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> Densities:
        """What a run says at many draws: densities of shape ``(n, *nesting dims)``."""
        if self.way == "graph":
            found = self._recording(values, rows, args, kwargs)
        elif self.way == "plate":
            size = len(next(iter(values.values())))
            padded = {name: self.padded(name, v, args, kwargs) for name, v in values.items()}
            program = BesideEachOther(size, self.nesting)(self.model)
            found = self._run(program, {**padded, **rows}, args, kwargs)
            layout = self.layout(args, kwargs)
            own = {
                name: own_values(value, layout[name].fn, size, self.nesting)
                for name, value in found.values.items()
                if name in layout
            }
            return found._replace(values=own)
        else:
            found = stacked(
                [
                    self._run(self.model, {**draw, **rows}, args, kwargs)
                    for draw in each_draw(values)
                ]
            )
        wide = {name: self._wide(value, 0) for name, value in found.unscaled.items()}
        scales = {
            name: self._wide(value, 0) if isinstance(value, Tensor) else value
            for name, value in found.scales.items()
        }
        return found._replace(unscaled=wide, scales=scales)

    def _run(self, program: Program, values: Values, args: tuple, kwargs: dict) -> Densities:
        return run_given(program, values, args, kwargs, with_deterministic=self._with_deterministic)

    def _wide(self, value: Tensor, event_dim: int) -> Tensor:
        missing = self.nesting + 1 + event_dim - value.dim()
        return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])

    # ---- the program

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """To be run in a plate of particles, with values for the latents from outside (``poutine.replay``)."""
        # a diagnostic looks at the distributions, too, and has settled the way just now
        if self.way == "plate" and (self._with_deterministic or not self._is_due(self._calls + 1)):
            self._calls += 1
            self.model(*args, **kwargs)
            return
        layout = self.layout(args, kwargs)
        wide, latents = {}, {}
        rows: Values = {}
        with Frames() as frames:
            for name, site in layout.items():
                if site.kind in ("subsample", "plate"):
                    frames.settle((), 1.0)
                    drawn = pyro.sample(name, site.fn, infer=site.infer)
                    rows |= {name: drawn} if site.kind == "subsample" else {}
                elif site.kind == "latent":
                    frames.settle(site.stack, site.scale)
                    latents[name] = given = Given(site.fn)
                    wide[name] = pyro.sample(name, given, infer=site.infer)
            size = max(
                self._count(value, layout[name].fn, latents[name]) for name, value in wide.items()
            )
            values = {
                name: own_values(value, layout[name].fn, size, self.nesting)
                for name, value in wide.items()
            }
            found = self._checked(values, rows, args, kwargs)
            for name, given in latents.items():
                scale = found.scales.get(name, 1.0)
                is_known = not isinstance(scale, Tensor) and scale == layout[name].scale
                given.settle(
                    found.unscaled[name] * (1.0 if is_known else scale / layout[name].scale)
                )
            for name, site in layout.items():
                if site.kind == "observed":
                    frames.settle(site.stack, found.scales.get(name, 1.0))
                    given = Given(site.fn)
                    given.settle(found.unscaled[name])
                    pyro.sample(name, given, obs=found.values[name][0], infer=site.infer)
                elif site.kind == "deterministic" and self._with_deterministic:
                    frames.settle(site.stack, 1.0)
                    pyro.deterministic(
                        name,
                        self._wide(found.values[name], site.fn.event_dim),
                        event_dim=site.fn.event_dim,
                    )

    def _count(self, value: Tensor, fn: Any, given: Given) -> int:
        """How many draws a value or the plates around its site have."""
        dim = -1 - self.nesting
        shapes = (value.shape[: value.dim() - fn.event_dim], given.expanded_shape)
        return max((shape[dim] for shape in shapes if len(shape) >= -dim), default=1)

    # ---- whether it is right

    @staticmethod
    def _is_due(calls: int) -> bool:
        return calls & (calls - 1) == 0

    def _checked(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> Densities:
        """The densities, now and then after a look at whether they are still right."""
        self._calls += 1
        if self.way == "rows":
            return self._densities(values, rows, args, kwargs)
        made = self._recording.made
        try:
            found = self._densities(values, rows, args, kwargs)
        except Unrecordable as error:
            return self._otherwise(str(error), values, rows, args, kwargs)
        if not self._is_due(self._calls) and self._recording.made == made:
            return found
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                reason = self._difference(found, values, rows, 0, args, kwargs)
        except torch.linalg.LinAlgError:  # far out, where a plain run has no density
            return found
        return found if reason is None else self._otherwise(reason, values, rows, args, kwargs)

    def _otherwise(
        self, reason: str, values: Values, rows: Values, args: tuple, kwargs: dict
    ) -> Densities:
        """Take the next way that is right, and say so; the densities by that one."""
        before = self.way
        self.reasons[before] = reason
        self.way = "plate"
        if before == "plate" or self._objection(values, args, kwargs) is not None:
            self.way = "rows"
        what = "recording of the model" if before == "graph" else "model in a plate of draws"
        instead = "in a plate of draws" if self.way == "plate" else "one draw after the other"
        warn(
            f"The {what} does not hold any more, {reason}: from now on it is run {instead}, which takes longer. "
            "Numbers that change from step to step belong into its arguments, as tensors."
        )
        return self._densities(values, rows, args, kwargs)

    def _objection(self, values: Values, args: tuple, kwargs: dict) -> str | None:
        """Why the way is not to be taken, as a clause; None if it may be."""
        try:
            with torch.random.fork_rng(devices=[]):
                rows = self.drawn_rows(args, kwargs)
                with torch.no_grad():
                    found = self._densities(values, rows, args, kwargs)
                    for row in (0, -1):
                        reason = self._difference(found, values, rows, row, args, kwargs)
                        if reason is not None:
                            return reason
                return (
                    self._gradient_gap(values, rows, args, kwargs) if self.way == "graph" else None
                )
        except torch.OutOfMemoryError:
            raise
        except Unrecordable as error:
            return str(error)
        except Exception as error:  # whatever a model may raise that is not written for a plate
            lines = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"

    def _difference(
        self, found: Densities, values: Values, rows: Values, row: int, args: tuple, kwargs: dict
    ) -> str | None:
        """Where one of the draws has other densities than in a plain run, as a clause."""
        latents = {name: value[row] for name, value in values.items()}
        return row_disagreement(
            scaled(found), row, self.nesting, self._plain_density(rows, args, kwargs), latents
        )

    def _gradient_gap(self, values: Values, rows: Values, args: tuple, kwargs: dict) -> str | None:
        """Which derivative of the recording is another than that of a plain run, as a clause."""

        def at_once(wide: Values) -> Values:
            return scaled(self._densities(wide, rows, args, kwargs))

        learned = self._recording.learned(values, rows, args, kwargs)
        return gradient_gap(self._plain_density(rows, args, kwargs), at_once, values, learned)

    def _plain_density(self, rows: Values, args: tuple, kwargs: dict) -> Callable[[Values], Values]:
        """The densities of a plain run, with these rows of plates, as a function of the latents."""
        return lambda latents: scaled(self._run(self.model, {**latents, **rows}, args, kwargs))
