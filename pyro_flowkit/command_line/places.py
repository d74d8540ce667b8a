"""Where files go: into new places, or in place of what was written there before, and of nothing else.

A run goes into a folder beside its target, which takes the target's name only when all of its files are on disk. Where
the target holds a run, its files are exchanged one by one; the folder itself, and what else is in it, stays.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_flowkit.command_line.errors import CommandError
from pyro_flowkit.training.lock import HeldError, locked_file

FORMAT = "pyro-flowkit run"
FILES = (
    "run.json",
    "preparation.json",
    "metrics.json",
    "flow.pt",
    "atoms.pt",
    "history.csv",
    "validation.csv",
    "test.csv",
)
_PREFIX = ".pyro-flowkit-"


@contextmanager
def reserved(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """The folder that a run will be written to, behind links, for one process at a time.

    Raises:
        CommandError: if something is there that may not be replaced, another process is about to write there, or the
            disk refuses.
    """
    try:
        target = folder.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CommandError(f"Expected a folder for the run, got {folder}: {error}") from error
    _old_files(target, overwrite=overwrite)
    expected = f"a folder that no other fit is to write, got {folder}"
    try:
        with locked_file(target.parent / f".{target.name}.lock", expected):
            yield target
    except HeldError as error:
        raise CommandError(str(error)) from error


def write_folder(target: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Have a function write files into a folder that becomes the target; after an error nothing has changed.

    Raises:
        CommandError: if something is there that may not be replaced, or the disk refuses.
    """
    old = _old_files(target, overwrite=overwrite)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
        try:
            scratch.chmod(0o755)
            write(scratch)
            if target.exists():
                _exchange(scratch, target, old)
            else:
                os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise CommandError(f"Expected to write {target}, got {error}") from error


@contextmanager
def new_file(path: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A name to write to, whose file takes the place of ``path`` at the end. Devices and pipes are written to directly.

    Args:
        path: of the file.
        overwrite: whether there may be one already.
        inputs: files that it must not replace.

    Raises:
        CommandError: if there is such a file and it may not be replaced, or the disk refuses.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_dir() and not target.is_file():
            yield target
            return
        if target.is_dir() or (target.exists() and not overwrite):
            advice = "" if target.is_dir() else ", which exists: --overwrite replaces it"
            raise CommandError(f"Expected a new file, got {path}{advice}")
        of_a_run = target.name in FILES and is_run(target.parent)
        if of_a_run or target in [file.resolve() for file in inputs]:
            owner = "is part of a run" if of_a_run else "holds the rows to score"
            raise CommandError(f"Expected another file to write to, got {path}, which {owner}")
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=target.parent) as scratch:
            yield Path(scratch) / target.name
            os.replace(Path(scratch) / target.name, target)
    except (OSError, RuntimeError) as error:
        raise CommandError(f"Expected to write {path}, got {error}") from error


def is_run(folder: Path) -> bool:
    """Whether a folder was written by ``fit``, damaged or not."""
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # damaged, but ours: nobody else writes both names
        return (folder / "run.json").is_file() and (folder / "preparation.json").is_file()
    return isinstance(content, dict) and content.get("format") == FORMAT


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _old_files(target: Path, *, overwrite: bool) -> list[str]:
    """Names of the files that a new run replaces.

    Raises:
        CommandError: if there is something else that it may not replace.
    """
    if not target.exists():
        if not target.parent.is_dir():
            raise CommandError(
                f"Expected a folder {target.parent} to write {target.name} to, got none"
            )
        return []
    if not target.is_dir():
        raise CommandError(f"Expected a folder for the run, got the file {target}")
    if not any(target.iterdir()):
        return []
    if not is_run(target):
        raise CommandError(
            f"Expected a new folder for the run, got {target}, which holds something else"
        )
    if not overwrite:
        raise CommandError(
            f"Expected a new folder for the run, got {target}, which holds one: --overwrite replaces it"
        )
    try:
        files = json.loads((target / "run.json").read_text(encoding="utf-8"))["files"]
        known = {name: files[name] for name in FILES if name in files}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CommandError(
            f"Expected a whole run to overwrite in {target}, got a damaged run.json: remove it by hand"
        ) from error
    there = [name for name in FILES[1:] if (target / name).exists()]
    foreign = [
        name for name in there if name not in known or checksum(target / name) != known[name]
    ]
    if foreign:
        raise CommandError(
            f"Expected the files in {target} as `fit` wrote them, to overwrite them, got others: {', '.join(foreign)}"
        )
    return [*there, "run.json"]


def _exchange(scratch: Path, target: Path, old: list[str]) -> None:
    """Move the old files out and the new ones in; after an error the old ones are back."""
    kept = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
    out, new = [], []
    try:
        for name in old:
            os.replace(target / name, kept / name)
            out.append(name)
        for path in sorted(scratch.iterdir()):
            os.replace(path, target / path.name)
            new.append(path.name)
    except BaseException:
        for name in new:
            (target / name).unlink()
        for name in out:
            os.replace(kept / name, target / name)
        kept.rmdir()
        raise
    shutil.rmtree(kept, ignore_errors=True)
