"""A folder of checkpoints: the newest two of a fit, so that a damaged one leaves the one before it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pyro_flowkit.files import DamagedFileError, read_file, write_file
from pyro_flowkit.training.lock import HeldError, locked
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.warning import warn

KIND = "checkpoint"
KEPT = 2
_PATTERN = "step-*.pt"


class Checkpoints:
    """Writes and finds checkpoints.

    Args:
        folder: Where they are; made if it is not there.
        every: Seconds between them.
        resume: Whether to go on from what the folder holds.
        ranks: The processes that share the fit, of which the first writes.

    Raises:
        ValueError: If another fit is using the folder, or it holds checkpoints and ``resume`` is False.
    """

    def __init__(
        self, folder: str | os.PathLike[str], every: float, *, resume: bool, ranks: Ranks
    ) -> None:
        self._folder, self._every, self._ranks = Path(folder), every, ranks
        self._folder.mkdir(parents=True, exist_ok=True)
        if ranks.leads:
            with locked(self._folder):
                pass
        found = self._paths()
        if found and not resume:
            raise ValueError(
                f"Expected a checkpoint_dir without checkpoints, or resume=True, got {len(found)} in "
                f"{self._folder} (the newest: {found[-1].name})"
            )
        self.saved = 0  # the step of the last one; before the first there is nothing to save
        self._next = time.perf_counter() + every
        self._warned = False

    def newest(self) -> dict[str, Any] | None:
        """The newest readable checkpoint, with a warning for every damaged one; None if there is no checkpoint.

        Raises:
            DamagedFileError: If there are checkpoints but none is readable.
        """
        problems: list[DamagedFileError] = []
        for path in reversed(self._paths()):
            try:
                content = read_file(path, KIND)
            except DamagedFileError as error:
                problems.append(error)
                continue
            for problem in problems:
                warn(f"{problem}. The one before it is taken.")
            return content
        if problems:
            raise DamagedFileError(f"{problems[0]}. Without it, the fit would start afresh.")
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other fits out of the folder.

        Raises:
            ValueError: On all processes, if another fit is using it.
        """
        with ExitStack() as stack:
            problem = ""
            if self._ranks.leads:
                try:
                    stack.enter_context(locked(self._folder))
                except HeldError as error:
                    problem = str(error)
            problem = self._ranks.share(problem)
            if problem:
                raise ValueError(problem)
            yield

    def is_due(self) -> bool:
        """Whether it is time for the next one, for any of the processes."""
        now = float(time.perf_counter() >= self._next)
        return bool(self._ranks.largest(now)[0])

    def save(self, step: int, content: Callable[[], dict[str, Any]]) -> None:
        """Writes the checkpoint of a step, unless there is one; all processes make their content.

        A disk that is full, or a folder that is gone, is said once, and training goes on.
        """
        if step == self.saved:
            return
        made = content()
        if self._ranks.leads:
            try:
                self._write(step, made)
            except (OSError, RuntimeError) as error:
                if not self._warned:
                    warn(
                        f"Expected to write a checkpoint at step {step}, got {type(error).__name__}: {error}. "
                        "Training goes on.",
                        RuntimeWarning,
                    )
                self._warned = True
        self.saved, self._next = step, time.perf_counter() + self._every

    def _write(self, step: int, content: dict[str, Any]) -> None:
        """Writes a file, then removes those no longer needed."""
        name = self._folder / f"step-{step:010d}.pt"
        write_file(name, KIND, content)
        paths = [path for path in self._paths() if path <= name]
        for path in paths[:-KEPT]:
            path.unlink(missing_ok=True)
        for left_over in self._folder.glob(".step-*.tmp"):  # of a process that was killed
            left_over.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(_PATTERN) if path.is_file())


def open_checkpoints(
    folder: Any, every: float, resume: bool, ranks: Ranks
) -> tuple[Checkpoints | None, dict[str, Any] | None]:
    """The folder, and its newest checkpoint if the fit is to go on from it; the first process reads for all."""
    if folder is None:
        if resume:
            raise ValueError("Expected a checkpoint_dir for resume=True, got checkpoint_dir=None")
        return None, None
    found: tuple[Checkpoints | None, dict[str, Any] | None] = None, None
    problem = ""
    if ranks.leads:
        try:
            checkpoints = Checkpoints(folder, every, resume=resume, ranks=ranks)
            found = checkpoints, checkpoints.newest() if resume else None
        except DamagedFileError:
            if ranks.count == 1:
                raise
            problem = "a damaged checkpoint"
        except ValueError as error:
            problem = str(error)
    problem = ranks.share(problem)
    if problem:
        raise ValueError(problem)
    checkpoints = found[0] or Checkpoints(folder, every, resume=True, ranks=ranks)
    earlier = ranks.share(found[1])
    if earlier is not None:
        checkpoints.saved = earlier["step"]
    return checkpoints, earlier
