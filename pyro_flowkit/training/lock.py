"""One fit at a time in a folder: a lock that the system takes back from a process that has ended, however it did.

POSIX locks the file (``flock``), Windows a byte far beyond its text, which others can go on reading. Where a file
system has neither, as some of networks, a file that can be created only once says which process is at work; that of a
process of this machine that has ended holds nobody up.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def _module(name: str) -> Any:
    """A module of the standard library that not every system has, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")

_NAME = ".lock"
_BEYOND = 2**30  # where no text is


class HeldError(ValueError):
    """A folder in which somebody else is at work."""


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a checkpoint_dir; its file says who does.

    Raises:
        HeldError: If another fit holds it, with the process.
    """
    expected = f"a checkpoint_dir that no other fit is using, got {folder}"
    return locked_file(folder / _NAME, expected)


@contextlib.contextmanager
def locked_file(path: Path, expected: str) -> Iterator[None]:
    """Holds a lock by a file.

    Args:
        path: Of the file, which is there for as long.
        expected: What the error says before it names the holder.

    Raises:
        HeldError: If another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked_by_system(path, expected))
        except _NoLocksError:
            path.unlink(missing_ok=True)
            stack.enter_context(_created_once(path.with_name(f"{path.name}.held"), expected))
        yield


class _NoLocksError(Exception):
    """A file system without locks."""


@contextlib.contextmanager
def _locked_by_system(path: Path, expected: str) -> Iterator[None]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise HeldError(f"Expected {expected}, in which {holder} trains") from None
        except OSError:
            file.close()
            raise _NoLocksError from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # it was removed by the one before, in between
    file.truncate(0)
    file.write(_holder())
    file.flush()
    try:
        yield
    finally:
        if fcntl is not None:
            path.unlink(
                missing_ok=True
            )  # while it is locked: who has opened it sees that it is gone
        file.close()
        if fcntl is None:  # Windows removes no open file, which another may have by now
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _lock(file: IO[str]) -> None:
    """Lock a file, or raise a BlockingIOError where somebody else has; another OSError where there are no locks."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    file.seek(_BEYOND)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError from error


@contextlib.contextmanager
def _created_once(path: Path, expected: str) -> Iterator[None]:
    while True:
        try:
            number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            holder = path.read_text(encoding="utf-8").strip()
            if not _has_ended(holder):
                raise HeldError(
                    f"Expected {expected}, in which {holder or 'another process'} trains: if it does not, remove {path}"
                ) from None
            path.unlink(missing_ok=True)
        else:
            break
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(_holder())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder() -> str:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} (since {now})\n"


def _has_ended(holder: str) -> bool:
    """Whether this machine knows that a process has ended."""
    found = re.match(r"process (\d+) on (\S+) ", holder)
    if found is None or found[2] != socket.gethostname() or os.name == "nt":
        return False  # Windows would end the process that is asked for
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
