"""Stages within a budget of seconds, each in a process of its own, interrupted politely and killed if it must be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.lib import report
from bench.lib.machine import ROOT
from gpu_stages import card

# what a command gets to end by itself, interrupted as by Ctrl-C: benchmarks are complete after every case
GRACE_SECONDS = 5.0
# the same where the whole suite is asked to end: whoever asks will not wait long
STOPPED_GRACE_SECONDS = 2.0
KILL_SECONDS = 5.0  # a process that waits for a broken driver does not even die
SAMPLE_SECONDS = 5.0  # between two readings of the card's clocks
LOG_LINES_SHOWN = 15
# The same folder in every run: a cache that is carried to another one holds absolute paths.
TRITON_CACHE = Path(os.environ.get("TRITON_CACHE_DIR", "/tmp/dora_kernels_triton_cache"))
# A shell starts what it puts into the background with SIGINT ignored, which every child inherits: pytest would not
# notice that it is interrupted. A start of Python (15 ms) and not preexec_fn, which is not safe beside threads.
INTERRUPTIBLE = (
    sys.executable,
    "-ISc",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
)


@dataclass(frozen=True)
class Suite:
    """The settings that every stage gets.

    out: what comes back, a few files; work: every result and log, which `saving` packs into one of them. cache: an
    archive with the Triton cache of an earlier run; failed: its suite.json. stop: set where everything should end.
    """

    out: Path
    commit: str | None = None
    plan: str = "all"
    work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gpu_suite_")))
    cache: Path | None = None
    failed: Path | None = None
    triton_cache: Path = TRITON_CACHE
    stop: threading.Event = field(default_factory=threading.Event)
    # readings of the card while the present stage runs
    samples: list[card.Sample] = field(default_factory=list)

    def run(
        self,
        name: str,
        command: Sequence[str],
        seconds: float,
        grace: float = GRACE_SECONDS,
        variables: dict[str, str] | None = None,
    ) -> CommandRun:
        """run_command, its log in the folder of results, with Triton's cache and readings of the card."""
        variables = {"TRITON_CACHE_DIR": str(self.triton_cache)} | (variables or {})
        log = self.work / "logs" / f"{name}.log"
        return run_command(command, seconds, log, grace, variables, self.stop, self.sample)

    def sample(self) -> None:
        """Note the card's clocks, power and temperature, where nvidia-smi tells them."""
        reading = card.sample()
        if reading:
            self.samples.append(reading)


@dataclass(frozen=True)
class Stage:
    """run(suite, seconds) does the work in at most `seconds` and returns its result, {"ok": bool, ...} for the JSON.

    least: seconds without which it is not worth starting; expected: an estimate for 16 cores and a cold disk; most:
    seconds after which the others are worth more. file: what it leaves in the folder of results. always: it runs
    whatever happened to the others, and in whatever time is left.
    """

    name: str
    least: float
    expected: float
    most: float
    run: Callable[[Suite, float], dict[str, Any]]
    file: str | None = None
    always: bool = False


def run_stages(
    stages: Sequence[Stage],
    suite: Suite,
    seconds: float,
    information: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
    finished: dict[str, dict[str, Any]] | None = None,
    after: Callable[[Suite], object] = lambda suite: None,
) -> list[dict[str, Any]]:
    """Run the stages in order within `seconds`; after each suite.json is written. One result per stage.

    A stage gets the time that is left but for the `least` of those after it (of one that always runs its `most`), at
    least its own and at most its `most`; it is skipped where less than its `least` is left, or where the suite was
    told to stop. A stage that raises has failed, and the next one runs; also where its result cannot be written.
    finished: results of an earlier run, by stage, that are taken over. after: called when a stage's result is written.
    """
    end = clock() + seconds
    finished = finished or {}
    results: list[dict[str, Any]] = []
    for place, stage in enumerate(stages):
        start = clock()
        left = end - start
        waiting = [other for other in stages[place + 1 :] if other.name not in finished]
        later = sum(other.most if other.always else other.least for other in waiting)
        share = min(stage.most, max(stage.least, left - later))
        suite.samples.clear()
        if stage.name in finished:
            outcome = finished[stage.name]
            print(f"{stage.name}: finished before", flush=True)
        elif not stage.always and suite.stop.is_set():
            outcome = {"ok": False, "skipped": "told to stop"}
        elif not stage.always and left < stage.least:
            outcome = {"ok": False, "skipped": f"{max(left, 0):.0f} s left; expected {stage.least:.0f} or more"}
            print(f"{stage.name}: skipped, {outcome['skipped']}", flush=True)
        else:
            print(f"{stage.name}: up to {share:.0f} s", flush=True)
            try:
                outcome = stage.run(suite, share)
            except Exception as error:  # whatever it was, the other stages still have something to say
                outcome = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        took = {"stage": stage.name, "seconds": clock() - start}
        results.append(took | outcome | ({"card": list(suite.samples)} if suite.samples else {}))
        for keep in (lambda: report.write(suite.out / "suite.json", information, results), lambda: after(suite)):
            try:
                keep()
            except Exception as error:  # a full disk, say: the stages after this one, save too, are still to run
                results[-1]["not_kept"] = f"{type(error).__name__}: {error}"
                print(f"{stage.name}: not kept: {results[-1]['not_kept']}", flush=True)
    return results


@dataclass(frozen=True)
class CommandRun:
    """The end of a command: its exit status, or None if its time ran out, and the file with its output."""

    status: int | None
    log: Path

    @property
    def lines(self) -> list[str]:
        """The output."""
        return self.log.read_text(errors="replace").splitlines()

    @property
    def tail(self) -> str:
        """The last lines of the output."""
        return "\n".join(self.lines[-LOG_LINES_SHOWN:])


def finished_before(out: Path, work: Path, stages: Sequence[Stage], commit: object) -> dict[str, dict[str, Any]]:
    """The results in suite.json of stages that ended well for `commit` and whose file is still there."""
    try:
        content = json.loads((out / "suite.json").read_text())
        rows = {row["stage"]: row for row in content["rows"] if row["ok"] and "skipped" not in row}
        same = commit is not None and content["meta"]["commit"] == commit
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    there = [stage for stage in stages if not stage.always and (stage.file is None or (work / stage.file).exists())]
    return {stage.name: rows[stage.name] for stage in there if same and stage.name in rows}


def run_command(
    command: Sequence[str],
    seconds: float,
    log: Path,
    grace: float = GRACE_SECONDS,
    variables: dict[str, str] | None = None,
    stop: threading.Event | None = None,
    sample: Callable[[], None] | None = None,
) -> CommandRun:
    """Run `command` from the root of the checkout, its output in `log`; over in `seconds`, by force if it must be.

    The last `grace` seconds are for ending by itself after an interrupt. A process of its own: an illegal memory
    access makes a CUDA context useless for whatever else its process would have done. stop: where it is set the
    command ends early; sample is called before, now and then, and after.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONUNBUFFERED": "1"} | (variables or {})
    paths = (str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    log.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    stop, sample = stop or threading.Event(), sample or (lambda: None)
    sample()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*INTERRUPTIBLE, *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, end - grace, stop, sample)
            status = process.poll()
            if status is None:
                os.killpg(process.pid, signal.SIGINT)
                left = end - time.monotonic()
                process.wait(max(0, min(left, STOPPED_GRACE_SECONDS) if stop.is_set() else left))
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
    sample()
    return CommandRun(status, log)


def _wait(process: subprocess.Popen, end: float, stop: threading.Event, sample: Callable[[], None]) -> None:
    """Until the process has ended, it is `end`, or `stop` is set."""
    sampled = time.monotonic()
    while process.poll() is None and not stop.is_set() and time.monotonic() < end:
        try:
            process.wait(max(0, min(0.25, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() - sampled > SAMPLE_SECONDS:
                sample()
                sampled = time.monotonic()


def _kill(process: subprocess.Popen) -> None:
    """Kill what is left of the command and of the processes it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(KILL_SECONDS)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass
