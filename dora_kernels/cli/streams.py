"""What is printed: any text on any stream, and one line for what went wrong."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

LONGEST = 1000
"""Characters of the line that says what is wrong: a name in it can be as long as a command line."""


def printable(text: object, keep: str = "") -> str:
    """`text` with what moves a cursor, sets a colour or is no character escaped, but for the characters of `keep`."""
    return "".join(letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in str(text))


def say(line: str) -> None:
    """One line on stderr, whatever is in it."""
    line = printable(line)
    if len(line) > LONGEST:  # what is wrong stands at its beginning, what was expected at its end
        line = f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 3 :]}"
    if sys.stderr is not None:  # print() would take stdout
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def lenient_stdout() -> Iterator[None]:
    """Inside, what stdout's encoding has no bytes for is escaped: surrogates (names that are no UTF-8), é in ASCII."""
    stream = sys.stdout
    errors = stream.errors if isinstance(stream, io.TextIOWrapper) else None
    if errors is not None:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if errors is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def drop_stdout() -> None:
    """Let what is still to be written to stdout, which takes no more, be dropped: Python would complain at the end."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def keep_open() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: the next file to be opened would be taken for it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        if number == 2 and sys.stderr is None:
            sys.stderr = open(2, "w", closefd=False)  # libraries ask it whether it is a terminal
    os.close(number)
