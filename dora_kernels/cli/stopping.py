"""Ctrl-C, kill and a closed terminal: what was begun is put away, one line is said, and the exit code tells which.

In `python -m dora_kernels` a signal ends the process at once (`at_once`), while modules are imported above all: nothing
is begun that would have to be put away, and an exception out of a foreign import may come out as another one, or not
at all. Around a command's work (`unwinding`) it is an exception, which passes the finally blocks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)
"""The signals that are looked after; Windows has no SIGHUP. One that the process was started to ignore (nohup) is."""

ONE_PRESS = 1.0
"""Seconds. make, npm and timeout hand a Ctrl-C on to who has got it already: the second one may not break into the
finally blocks that the first has begun."""


class Stopped(KeyboardInterrupt):
    """Raised by a signal inside `unwinding`; a KeyboardInterrupt, which no library takes for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


def at_once(code: int | None = None) -> None:
    """From now on a signal ends the process: with one line and its own code, or, of a command that is over, with its.

    For the process that is the command line's alone.
    """

    def stop(number: int, frame: object) -> None:
        if code is None:
            with contextlib.suppress(OSError):
                os.write(2, f"dora_kernels: {Stopped(number)}\n".encode())
        os._exit(128 + number if code is None else code)

    _handle(stop)
    if code is None:
        # run last of all that Python runs: what C++ puts away after that is not broken off, and tells no other code
        atexit.register(_handle, signal.SIG_IGN)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Inside, a signal raises Stopped. In other threads than the main one, which gets all signals: nothing.

    Where foreign code makes another error of that (torch.asarray, a TypeError), it comes out as Stopped. A process
    that is forked inside, a worker, dies of a signal as any other: what was begun is the parent's to put away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    parent = os.getpid()
    raised: float | None = None
    stopped: int | None = None  # not the exception: it holds the frames, which would hold it
    over = False
    again: list[threading.Timer] = []

    def stop(number: int, frame: object) -> None:
        nonlocal raised, stopped
        if os.getpid() != parent:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if over or (raised is not None and time.monotonic() - raised < ONE_PRESS):
            return
        raised, stopped = time.monotonic(), number
        raise Stopped(number)

    def unheard(unraisable: Any) -> None:
        """Raise again, a moment later, a Stopped that was lost where nothing can be raised, as in a destructor."""
        nonlocal raised
        if not isinstance(unraisable.exc_value, Stopped):
            before(unraisable)
            return
        raised = None
        # to the main thread itself: one that waits for a lock does not wake up for a signal that another has got
        again.append(threading.Timer(0.02, _to_main_thread, (unraisable.exc_value.code - 128,)))
        again[-1].start()

    before, sys.unraisablehook = sys.unraisablehook, unheard
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        _handle(stop)
        yield
    except Exception:
        if stopped is None:
            raise
        raise Stopped(stopped) from None
    finally:
        over = True
        for timer in again:
            timer.cancel()
        for number, handler in handlers.items():
            if handler is not None:  # else it is one of C's, which has stayed
                signal.signal(number, handler)
        sys.unraisablehook = before


def _to_main_thread(number: int) -> None:
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)


def _handle(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    for number in NUMBERS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
