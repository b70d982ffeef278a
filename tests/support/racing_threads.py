"""Threads that do something at the same time."""

import sys
import threading
from collections.abc import Callable


def in_threads(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, all at once and switching often; raises what the first of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work):
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
