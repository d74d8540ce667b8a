"""Files of plain tensors: written whole or not at all, and known to be what was written when they are read.

A file is what ``torch.save`` makes of nested dicts and lists of tensors, numbers and text, so that
``torch.load(path, weights_only=True)`` opens it, and nothing in it can be executed. It goes to a temporary file first,
which takes the name only once it is on the disk. PyTorch's archives have no check of their contents that reading would
look at, so a digest over all of them travels inside.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FORMAT = 4
DIGEST = "sha256"


class DamagedFileError(ValueError):
    """A file that is not, or no longer, what this package wrote.

    Example:
        >>> from pathlib import Path
        >>> from pyro_flowkit import FitResult, SplineFlow
        >>> from pyro_flowkit.training import DamagedFileError
        >>> written = Path("noise.fit").write_text("noise")
        >>> try:
        ...     FitResult.load("noise.fit", SplineFlow(2))
        ... except DamagedFileError as error:
        ...     print(error)
        Expected a fit result that PyTorch can read ...
    """


def write_file(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Writes content under a name, atomically.

    Args:
        path: The file; it is replaced if it exists, and left as it was if anything goes wrong.
        kind: What the file is, to be asked for by :func:`read_file`.
        content: Nested dicts with keys of text, lists and tuples of tensors, numbers, text and None.

    Raises:
        TypeError: If there is anything else in it.
        OSError: If the file cannot be written.
    """
    whole = {"format": FORMAT, "kind": kind, **content}
    whole[DIGEST] = digest_of(whole)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def read_file(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Reads what :func:`write_file` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it cannot be read, is of another kind or format, or was changed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about pickles that PyTorch did not write; they are refused anyway
            content = torch.load(path, weights_only=True, map_location="cpu")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # an unpickler that reads noise may raise anything
        reason = str(error).strip().split("\n")[0][:200]
        raise DamagedFileError(
            f"Expected a {kind} that PyTorch can read without executing anything, got {path}: "
            f"{type(error).__name__}: {reason}"
        ) from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        got = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise DamagedFileError(f"Expected a {kind} of pyro_flowkit, got {got!r} in {path}")
    if content.get("format") != FORMAT:
        raise DamagedFileError(
            f"Expected a {kind} of format {FORMAT}, got format {content.get('format')!r} in {path}"
        )
    digest = content.pop(DIGEST, None)
    try:
        same = digest == digest_of(content)
    except TypeError:
        same = False
    if not same:
        raise DamagedFileError(
            f"Expected a {kind} with the contents it was written with, got others in {path}: it is damaged"
        )
    return content


def check_plain(content: Any) -> None:
    """Raises TypeError unless this could be written."""
    digest_of(content)


def digest_of(content: Any) -> str:
    """A digest over nested dicts and lists of tensors, numbers and text.

    Raises:
        TypeError: If there is anything else in it.
    """
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(content: Any) -> Iterator[bytes | memoryview]:
    """All of it in an order of its own, each part with its type and size."""
    if isinstance(content, torch.Tensor):
        plain = content.detach().cpu().contiguous()
        yield f"tensor {plain.dtype} {tuple(plain.shape)} {content.requires_grad}\n".encode()
        if plain.numel():  # an empty tensor may have strides that no view goes through
            yield plain.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(content, dict):
        yield f"dict {len(content)}\n".encode()
        for key, value in content.items():
            if not isinstance(key, str | int):
                raise TypeError(f"Expected keys of text or integers, got {key!r}")
            yield f"{type(key).__name__} {key!r}\n".encode()
            yield from _pieces(value)
    elif isinstance(content, list | tuple):
        yield f"{type(content).__name__} {len(content)}\n".encode()
        for value in content:
            yield from _pieces(value)
    elif content is None or type(content) in (bool, int, float, str):
        yield f"{type(content).__name__} {content!r}\n".encode()
    else:
        raise TypeError(
            f"Expected tensors, numbers, text, None, dicts and lists, got {type(content).__name__}"
        )


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
