"""The files of a command: its own while it runs. Where one cannot be written the command ends with one line."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from dora_kernels.cli import stopping
from dora_kernels.files import writing

_claims = contextlib.ExitStack()
"""Of the command that runs."""


class Unwritable(Exception):
    """A file that this run may not write, and why."""


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A decorator of main functions, which then return 2, with one line on stderr, where the system refuses a file, and
    128 and its number after a signal. `claim` is for them alone.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*arguments: Any, **keywords: Any) -> int:
            try:
                with stopping.unwinding(), _claims:
                    return main(*arguments, **keywords)
            except (OSError, Unwritable) as error:
                line, code = str(error), 2
            except stopping.Stopped as stopped:
                line, code = str(stopped), stopped.code
            print(line if line.startswith(f"{name}: ") else f"{name}: {line}", file=sys.stderr)
            return code

        return run

    return decorate


def claim(name: str, *paths: pathlib.Path | None) -> None:
    """Before the work: make the files' folders, and let no other run write them until this command ends.

    Raises Unwritable where one of them cannot be written, as far as that shows, or another run is at it.
    """
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                writing.check_target(name, "the output", path)
                _claims.enter_context(writing.claimed(name, path))
            except ValueError as error:
                raise Unwritable(str(error)) from error
