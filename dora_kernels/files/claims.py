"""Claims on files that are written: one run has each at a time, told by a lock on a hidden file beside it.

A signal's exception may come between any two steps of Python, in a `finally` too, but it comes once. So what is to be
cleaned up has a name before it is made, and two of them, one within the other, either of which is enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # no locks on Windows
    fcntl = None  # type: ignore[assignment]

NAME_BYTES = 255
"""The longest name that ext4, XFS, tmpfs and most others take."""

_NO_LINK_NOR_WAIT = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""A pipe of that name, which nobody reads, would never open."""

_held: dict[tuple[str, int, int], BinaryIO] = {}
"""The lock files that are open, by path, process and thread."""


def hidden(target: Path, kind: str) -> Path:
    """`.<name>.<kind>` beside the target; of a name that is too long for this, its digest's."""
    name = os.fsencode(target.name)
    if len(name) > NAME_BYTES - len("..partial"):
        return target.with_name(f".{hashlib.sha256(name).hexdigest()}.{kind}")
    return target.with_name(f".{target.name}.{kind}")


@contextlib.contextmanager
def claim(target: Path, told: str) -> Iterator[bool]:
    """True inside where the lock file beside `target` is held by this thread, False where there are no locks.

    Raises ValueError, which begins with `told`, where somebody else holds it.
    """
    lock = hidden(target, "lock")
    me = str(lock), os.getpid(), threading.get_ident()
    if me in _held and _is_at(lock, _held[me]):
        yield True
        return
    released = False
    try:
        try:
            yield _locked(lock, me, target, told)
        finally:
            _release(lock, me)
            released = True
    finally:
        if not released:
            _release(lock, me)


def _locked(lock: Path, me: tuple[str, int, int], target: Path, told: str) -> bool:
    """Lock the file, which is made where there is none; returns False where there are no locks."""
    while True:
        try:
            _held[me] = open(lock, "ab", opener=lambda path, flags: os.open(path, flags | _NO_LINK_NOR_WAIT, 0o666))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error
        try:
            if not _flock(_held[me]):
                _release(lock, me)
                return False
        except BlockingIOError:
            raise ValueError(f"{told} is being written by another run; expected to be the only one") from None
        # else whoever held it has removed it since it was opened
        if _is_at(lock, _held[me]):
            return True


def _release(lock: Path, me: tuple[str, int, int]) -> None:
    """Remove the lock file and let go of it, but not where another run holds it."""
    with contextlib.suppress(OSError):
        # without it: made in a step that a signal broke into
        file = _held.get(me) or open(lock, "rb+")
        _flock(file)
        if _is_at(lock, file):
            lock.unlink()
    if me in _held:
        _held.pop(me).close()


def _flock(file: BinaryIO) -> bool:
    """Lock a file, or keep it locked; returns False where there are no locks. Raises BlockingIOError if another has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (OSError, AttributeError):
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
