"""Printing: any text on any stream, and one line for what went wrong."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from dora_kernels.files.reading import printable

LONGEST_WORD, LONGEST_LINE = 200, 1000
"""Characters of the line that says what is wrong: a name in it can be as long as a command line."""


def say(line: str) -> None:
    """One line on stderr, whatever is in it."""
    line = " ".join(_shortened(word, LONGEST_WORD) for word in printable(line).split(" "))
    line = _shortened(line, LONGEST_LINE)
    if sys.stderr is not None:  # print() would take stdout
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            drop(sys.stderr)


def _shortened(text: str, most: int) -> str:
    """Beginning and end of a text: what is wrong stands at the one, and what was expected at the other."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[3 - most // 3 :]}"


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


def drop(stream: TextIO) -> None:
    """Let what a stream still holds and cannot write go nowhere: Python would complain at the end, and exit by 120."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def keep_open() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: the next file to be opened would be taken for it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        if number == 2 and sys.stderr is None:
            sys.stderr = open(2, "w", closefd=False)  # libraries ask it whether it is a terminal
    os.close(number)
