"""The training loop: one pass of step, judge, record, until a reason to stop.

Steps are taken in steps.py. After every window of them the state is judged (see judge.py), which decides about the best
state and about stopping.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from pyro_flowkit.files import check_plain
from pyro_flowkit.training.faults import Interruption
from pyro_flowkit.training.identity import check_probe, probe
from pyro_flowkit.training.plan import Plan
from pyro_flowkit.training.result import FitResult, history_columns
from pyro_flowkit.training.state import random_state, set_random_state
from pyro_flowkit.training.steps import NON_FINITE_LIMIT, Steps
from pyro_flowkit.training.tolerance import Tolerance
from pyro_flowkit.training.variational import Variational
from pyro_flowkit.warning import warn

MAX_SKIPPED = 0.1  # of the steps, without a word
INTERRUPTIONS = ("interrupted", "terminated")


class Loop:
    """One fit; ``run`` returns its result.

    Raises:
        ValueError: If the plan goes on from a checkpoint that is of another model, guide or optimizer.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._state, self._loss = plan, plan.state, plan.loss
        self._batches, self._limits, self._judge = plan.batches, plan.limits, plan.judge
        self._ranks, self._trackers, self._tolerance = plan.ranks, plan.trackers, plan.tolerance
        self._steps = Steps(plan)
        self._warned_of_validation = False
        self._reason = self._divergence = ""
        self._is_final = False  # ended for good, not by a limit or a wish
        if plan.earlier is not None:
            self._load(plan.earlier)

    def run(self) -> FitResult:
        """Trains until a limit, a plateau, a callback, an interruption or persistent NaN."""
        checkpoints = self._plan.checkpoints
        with (
            Interruption() as self._interruption,
            checkpoints.held() if checkpoints else nullcontext(),
        ):
            self._train()
            try:
                kept = self._finish()
            except KeyboardInterrupt:
                self._loss.set_mode(training=False)
                raise
            result = self._result(kept)
            self._call("on_end")
            steps = self._state.step
            summary = {"stop_reason": result.stop_reason, "best_step": kept, "steps": steps}
            self._trackers.end(summary)
            return result

    def _train(self) -> None:
        """All steps; what ended them is the reason."""
        state = self._state
        self._call("on_start")
        plan = self._plan
        plan.bar.begin(state.step, self._limits.max_steps, per_datum=plan.has_data)
        if self._plan.checkpoints is not None:  # what cannot be written is better known now
            check_plain({"schedule": self._plan.schedule.state_dict()})
        self._trackers.start(
            {key: str(value) for key, value in self._plan.settings.items()}, state.step
        )
        self._steps.begin()
        with warnings.catch_warnings():
            # Non-finite steps are counted and reported here, once, instead of by each warning.
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+inf|-inf)")
            try:
                if not self._is_final:
                    self._reason = self._run_steps()
                self._save()
                if self._reason not in INTERRUPTIONS and self._judge.can_judge_last():
                    self._judged()
            except KeyboardInterrupt:  # somewhere in a step: no state to go on from
                self._reason = "interrupted"
            except BaseException as error:
                self._trackers.end({"stop_reason": type(error).__name__, "steps": state.step})
                raise

    def _run_steps(self) -> str:
        state, limits = self._state, self._limits
        if state.stop is not None:  # before it began
            return state.stop
        self._judge.begin()
        if state.step == 0 and self._tolerance is not None and self._starts_near(self._tolerance):
            self._is_final = True
            return "tolerance"
        while True:
            if limits.max_steps is not None and state.step >= limits.max_steps:
                return limits.steps_reason
            if limits.max_seconds is not None and self._steps.seconds >= limits.max_seconds:
                return "max_seconds"
            if self._plan.checkpoints is not None and self._plan.checkpoints.is_due():
                self._save()
            self._steps.take(limits.used(state.step, self._steps.seconds))
            ended = self._judged() if self._judge.is_due else ""
            self._is_final = bool(ended)
            try:
                self._call("on_step")
            except KeyboardInterrupt:
                self._interruption.reason = "interrupted"
            if ended:
                return ended
            if self._steps.have_failed:
                where = self._steps.where_it_failed()
                self._is_final = True
                return (
                    f"non-finite at step {state.step}: {self._steps.last_failure} "
                    f"({NON_FINITE_LIMIT} steps in a row){f'; {where}' if where else ''}"
                )
            stop = self._wish_to_stop()
            if stop is not None:
                return stop

    def _wish_to_stop(self) -> str | None:
        """The reason why a callback or a signal ends the fit; on all processes if on any."""
        own = self._interruption.reason
        code = INTERRUPTIONS.index(own) + 2 if own in INTERRUPTIONS else 1
        if own is None and self._state.stop is None:
            code = 0
        code = int(self._ranks.largest(code)[0])
        if code > 1:
            return INTERRUPTIONS[code - 2]
        return self._state.stop or ("stopped by another process" if code else None)

    def _judged(self) -> str:
        """Judges the state at the end of a window; the reason why the fit should stop, empty if it should not."""
        found = self._judge.judge(self._steps.updated)
        if found is not None:
            if not math.isfinite(found) and not self._warned_of_validation:
                self._warned_of_validation = True
                warn(
                    f"Expected a finite objective on the validation data, got {found} at step {self._state.step}: "
                    "states that cannot be judged are not kept",
                    RuntimeWarning,
                )
            self._state.validation = self._steps.history[-1][-1] = found
            self._call("on_validation")
            self._trackers.log(self._state.step, {"validation": found})
        if self._tolerance is not None and self._is_near(self._tolerance):
            return "tolerance"
        limits = self._limits
        if not (self._judge.has_stalled(limits.patience) and self._plan.schedule.on_plateau()):
            return ""
        lost = self._judge.has_diverged and limits.patience_reason != "patience"
        return "diverged" if lost or limits.patience is None else limits.patience_reason

    def _starts_near(self, tolerance: Tolerance) -> bool:
        """Whether the guide need not be trained."""
        if isinstance(self._loss, Variational) and self._loss.kl_weight != 1.0:
            return False
        self._state.gap = tolerance.judge_start()
        return tolerance.is_met

    def _is_near(self, tolerance: Tolerance) -> bool:
        """Whether the guide is near enough to the posterior; moves the end where more steps at this rate are no use."""
        if isinstance(self._loss, Variational) and self._loss.kl_weight != 1.0:
            return False
        self._state.gap = tolerance.judge(self._state.step)
        self._trackers.log(self._state.step, {"gap": self._state.gap})
        if tolerance.look_ahead(self._state.step):
            self._end_at(tolerance.end)
        return tolerance.is_met

    def _end_at(self, step: int | None) -> None:
        self._limits.max_steps = step
        self._plan.bar.end_at(step)

    def _finish(self) -> int:
        """Puts the parameters that are kept in place; the step that they are from."""
        failed = self._steps.have_failed
        best = (
            self._plan.options.restore_best and self._reason != "tolerance"
        )  # which the last state has met
        kept = self._judge.put_in_place(self._steps.updated, best=best, failed=failed)
        self._divergence = self._judge.conclude(kept, failed=failed)
        if self._plan.keep_better is not None:
            kept = kept if self._ranks.share(self._plan.keep_better()) else 0
            self._ranks.broadcast(self._loss.tensors().values())
        if self._tolerance is not None:
            self._state.gap = self._tolerance.at_the_end(kept)
        self._loss.set_mode(training=False)
        self._state.optimizer.zero_grad(set_to_none=True)
        if failed:
            warn(f"fit stopped early: {self._reason}", RuntimeWarning)
        elif self._steps.skipped > MAX_SKIPPED * self._state.step:
            warn(
                f"{self._steps.skipped} of {self._state.step} steps were left out, the last one for its "
                f"{self._steps.last_failure}: look at the data of those steps, or at where the model has no density",
                RuntimeWarning,
            )
        return kept

    def _save(self) -> None:
        """Writes a checkpoint, where there is a place for it."""
        if self._plan.checkpoints is not None:
            self._trackers.flush()
            self._plan.checkpoints.save(self._state.step, self._content)

    def _content(self) -> dict[str, Any]:
        """All that the next step depends on, and what was recorded so far."""
        return {
            **self._plan.extra,
            **self._steps.state_dict(),
            "ended": self._reason if self._is_final else None,
            "batches": self._batches.state_dict(),
            "random": self._ranks.gather(random_state()),
            "judge": self._judge.state_dict(),
            "tolerance": None if self._tolerance is None else self._tolerance.state_dict(),
            "validation": self._state.validation,
            "objective": probe(self._loss, self._batches),
        }

    def _load(self, content: Mapping[str, Any]) -> None:
        """Goes on from the content of a checkpoint."""
        self._steps.load_state_dict(content)
        check_probe(content["objective"], probe(self._loss, self._batches))
        self._judge.load_state_dict(content["judge"])
        if self._tolerance is not None and content["tolerance"] is not None:
            self._tolerance.load_state_dict(content["tolerance"])
            if self._tolerance.end is not None:
                self._end_at(self._tolerance.end)
        self._state.validation = content["validation"]
        self._reason, self._is_final = content["ended"] or "", content["ended"] is not None
        self._batches.load_state_dict(content["batches"])
        set_random_state(content["random"][self._ranks.number])

    def _call(self, hook: str) -> None:
        for callback in self._plan.options.callbacks:
            getattr(callback, hook)(self._state)

    def _result(self, kept: int) -> FitResult:
        return FitResult(
            model=self._state.model,
            guide=self._state.guide,
            history=history_columns(self._steps.history),
            stop_reason=self._reason,
            best_step=kept,
            skipped_steps=self._steps.skipped,
            notes=self._plan.notes,
            divergence=self._divergence,
            gap=self._state.gap,
            is_point=isinstance(self._loss, Variational) and self._loss.is_point,
            param_names=tuple(self._loss.param_names),
        )
