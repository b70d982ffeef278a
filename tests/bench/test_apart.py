"""Attempts in a process apart: rows come as they are found, and one that raises, dies or hangs costs only itself."""

import os
import signal
import time

import pytest

from bench.lib.apart import Attempt, make


def rows(attempts, seconds=20.0):
    return [(attempt.name, row) for attempt, row in make(attempts, seconds)]


def yields(*found):
    return lambda: iter(found)


def process():
    yield {"process": os.getpid()}


def test_the_rows_of_attempts_that_end_come_from_one_other_process():
    found = rows([Attempt("a", process), Attempt("none", yields()), Attempt("b", process)])
    assert [name for name, _ in found] == ["a", "b"]
    assert found[0][1] == found[1][1] != {"process": os.getpid()}


def raises():
    yield {"n": 1}
    raise ValueError("no such thing")


def dies():
    yield {"n": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    yield {"n": 1}
    time.sleep(60)


@pytest.mark.parametrize(
    "fails, reason",
    [
        (raises, "ValueError: no such thing"),
        (dies, f"its process died, exit status {-signal.SIGKILL}"),
        (hangs, "killed: hangs after 1 s"),
    ],
)
def test_one_that_fails_leaves_its_rows_and_a_reason_and_the_next_one_a_process(fails, reason):
    start = time.monotonic()
    found = rows([Attempt("before", process), Attempt("fails", fails, silence=1), Attempt("after", process)])
    assert [name for name, _ in found] == ["before", "fails", "fails", "after"]
    assert found[1][1] == {"n": 1} and found[2][1] == {"ok": False, "reason": reason}
    assert found[0][1] != found[3][1]
    assert time.monotonic() - start < 15


def slow():
    for n in range(100):
        time.sleep(0.2)
        yield {"n": n}


def test_nothing_goes_on_when_the_time_is_up():
    start = time.monotonic()
    found = rows([Attempt("slow", slow), Attempt("never", process)], seconds=1.5)
    assert time.monotonic() - start < 10
    assert {name for name, _ in found} == {"slow"}
    assert found[0][1] == {"n": 0} and "its time was up" in found[-1][1]["reason"]


def test_without_time_nothing_is_begun():
    assert rows([Attempt("never", process)], seconds=0) == []
    assert rows([Attempt("never", process, needs=30)], seconds=20) == []
    assert len(rows([Attempt("begun", process, needs=10), Attempt("never", process, needs=30)], seconds=20)) == 1


def test_a_caller_that_takes_no_more_rows_leaves_no_process_behind():
    attempts = make([Attempt("process", process), Attempt("hangs", hangs, silence=60)], 60)
    found = next(attempts)[1]["process"]
    assert next(attempts)[1] == {"n": 1}
    attempts.close()
    with pytest.raises(ProcessLookupError):
        os.kill(found, 0)
