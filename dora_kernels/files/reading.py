"""Files that others made: nothing waits for one, and none is larger than what it is read for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SHOWN = 200
"""The letters of a name that a message shows."""


def printable(text: object, keep: str = "") -> str:
    """`text` with what moves a cursor, sets a colour or is no character escaped, but for the characters of `keep`."""
    text = str(text)
    if text.isprintable():  # as nearly all are, of which a file of 10^4 tensors has many
        return text
    return "".join(letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text)


def shown(name: object) -> str:
    """A path, a key or a name, as a message has it in its line: a stranger's may be a megabyte, or have lines."""
    text = printable(str(name)[: SHOWN + 1])
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def check_regular(function: str, path: str | Path) -> int:
    """The bytes of a regular file. Raises ValueError for a folder, for a pipe or a device, of which a reader would wait
    or never see the end, and for what is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise unreadable(function, path, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise ValueError(f"{function}: {shown(path)} is {kind}; expected a file")
    return found.st_size


def read_bytes(function: str, path: str | Path, at_most: int) -> bytes:
    """The bytes of a regular file of at most so many. Raises ValueError for another, or where it cannot be read."""
    check_regular(function, path)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            content = file.read(at_most + 1)
    except OSError as error:
        raise unreadable(function, path, error) from error
    if content is None:  # a file of the system that has nothing to say yet
        raise ValueError(f"{function}: {shown(path)} is empty; expected a file")
    if len(content) > at_most:
        raise ValueError(f"{function}: {shown(path)} has more than {at_most} bytes; expected at most so many")
    return content


def unreadable(function: str, path: str | Path, error: Exception, expected: str = "a file") -> ValueError:
    """The ValueError for a file that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ValueError(f"{function}: {shown(path)} cannot be read: {shown(reason)}; expected {expected}")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
