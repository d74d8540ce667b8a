"""One fit at a time in a folder: a lock that the system takes back from a process that has ended, however it did."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"


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
    file = _taken(path, expected)
    try:
        yield
    finally:
        if file is not None:
            Path(file.name).unlink(missing_ok=True)
            file.close()


def _taken(path: Path, expected: str) -> IO[str] | None:
    """The locked file, or None where the system has no locks."""
    if fcntl is None:
        return None
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise HeldError(f"expected {expected}, in which {holder} trains") from None
        except OSError:  # a file system without locks
            file.close()
            path.unlink(missing_ok=True)
            return None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # it was removed by the one before, in between
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {now})\n")
    file.flush()
    return file
