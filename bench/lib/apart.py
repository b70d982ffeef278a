"""Attempts that may hang or kill their process, made in a process apart, so that each costs only itself."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

Row = dict[str, Any]
# what a killed process gets to be gone: the driver first has to stop what runs on the device
KILL_SECONDS = 10


@dataclass(frozen=True)
class Attempt:
    """run() yields rows; where it takes more than `silence` seconds to the next one, or to its end, it hangs.

    needs: the seconds without which it is not begun.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    silence: float = 15
    needs: float = 0


def make(
    attempts: Sequence[Attempt], seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Attempt, Row]]:
    """Yields (attempt, row) as the rows come, attempts in order; stops before one that has not the time it needs.

    They share a process, forked from this one, until one raises, dies or hangs: that one's last row says so, and the
    next attempt gets a new process. This one must not have used CUDA, or a fork cannot.
    """
    end = clock() + seconds
    context = multiprocessing.get_context("fork")
    left = list(attempts)
    while left and clock() + left[0].needs < end:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(there, left), daemon=True)
        process.start()
        there.close()
        try:
            while left and clock() + left[0].needs < end:
                attempt = left.pop(0)
                failed = yield from _follow(attempt, here, process, clock, end)
                if failed:
                    yield attempt, {"ok": False, "reason": failed}
                    break
        finally:
            process.kill()
            process.join(KILL_SECONDS)
            here.close()
        if process.is_alive():
            raise RuntimeError(f"process {process.pid} cannot be killed; the device is not to be used any more")


def _follow(
    attempt: Attempt, here: Connection, process: BaseProcess, clock: Callable[[], float], end: float
) -> Generator[tuple[Attempt, Row], None, str | None]:
    """Yield the attempt's rows; returns what ended it before its end, or None."""
    start = clock()
    while True:
        wait = min(attempt.silence, end - clock())
        if not here.poll(max(wait, 0)):
            what = "hangs" if wait == attempt.silence else "its time was up"
            return f"killed: {what} after {clock() - start:.0f} s"
        try:
            row, failed = here.recv()
        except EOFError:
            process.join(KILL_SECONDS)
            return f"its process died, exit status {process.exitcode}"
        if row is None:
            return failed
        yield attempt, row


def _serve(connection: Connection, attempts: Sequence[Attempt]) -> None:
    """Send (row, None) for each row, then (None, None), or (None, what was raised) and make no further attempt."""
    for attempt in attempts:
        try:
            for row in attempt.run():
                connection.send((row, None))
        except Exception as error:  # whatever it was; a CUDA error also makes the process useless
            connection.send((None, f"{type(error).__name__}: {error}"[:500]))
            return
        connection.send((None, None))
