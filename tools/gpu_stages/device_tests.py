"""The stages that run the tests on the device, side by side where pytest-xdist is installed.

As a program it prints their files but for those named (kernels/test_steps.py), for `make test-pretended-gpu`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.lib.machine import ROOT
from dora_kernels.files import writing
from gpu_stages.running import Suite

TESTS = ROOT / "tests"


def _files(*names: str) -> tuple[str, ...]:
    """The test files of these folders and files under tests/, each folder's by name."""
    paths = [path for name in names for path in sorted((TESTS / name).rglob("test_*.py")) or [TESTS / name]]
    return tuple(str(path.relative_to(TESTS)) for path in paths)


# What a GPU has no part in, or what takes it for other processes: ranks of gloo, trainers, the tools' own tests.
OFF_DEVICE = _files(
    "bench", "cli", "distributed", "files", "repo", "tools", "kernels/test_interpreter.py", "reuse/test_constants.py",
    "adapters/test_structure_claims.py", "extras/test_analysis.py", "extras/test_analysis_checkpoints.py",
    "extras/test_analysis_plot.py", "extras/test_convert.py", "extras/test_convert_libraries.py",
    "extras/test_convert_refusals.py", "extras/test_convert_writes.py",
    "extras/test_demo_dvora.py", "extras/test_names.py", "planning/test_configs.py", "planning/test_options.py",
)  # fmt: skip
# Every kernel and operator, and the promises that a GPU can break: graphs, streams, reuse, faults.
CORE = tuple(
    name
    for name in _files(
        "kernels", "test_ops.py", "functional/test_nonfinite.py", "functional/test_promises.py",
        "runtime/test_graphs.py", "test_modules.py", "test_passes.py", "functional/test_rescale.py",
        "adapters/test_peft.py", "runtime/test_faults.py", "reuse/test_reuse.py", "extras/test_serving.py",
        "adapters/test_merging.py", "reuse/test_frozen_adapters.py", "runtime/test_checkpointing.py",
        "runtime/test_autocast.py",
    )
    if name not in OFF_DEVICE
)  # fmt: skip
# of the other files the first; then the rest of them by name
NEXT = _files(
    "functional/test_functional.py", "quant/test_quantized.py", "runtime/test_compile.py",
    "functional/test_properties.py", "functional/test_dropout.py",
)  # fmt: skip
# 40 GB and ten seconds of drawing numbers, the last test of its file: at the end, when the other workers are done
HUGE_FILE = "kernels/test_addresses.py"
HUGE = f"tests/{HUGE_FILE}::test_more_than_2_to_the_31_elements_on_a_gpu"
# -v: where pytest is killed its log still tells the counts. What a missing package keeps from being collected must not
# hide the rest.
PYTEST = (sys.executable, "-m", "pytest", "-v", "--continue-on-collection-errors", "-p", "no:cacheprovider")
PROCESSES = 14  # each has a CUDA context, and the JIT's ptxas runs beside it
# as many threads, and compilers of torch.compile's, as cores in each of them would stand in each other's way
SIDE_BY_SIDE = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
GRACE_SECONDS = 10.0
# before the interrupt; each process counts from its own start, some seconds after the first
SESSION_GRACE_SECONDS = 18.0
TEST_SECONDS = 60


def files() -> list[str]:
    """The test files of the device that are not CORE, those of NEXT first."""
    names = set(_files(".")) - set(CORE) - set(OFF_DEVICE)
    return [*NEXT, *sorted(names - set(NEXT))]


def paths(names: Iterable[str]) -> list[str]:
    """The files of these names, as pytest is given them."""
    return [f"tests/{name}" for name in names]


def command(seconds: float, xml: Path, tests: Sequence[str]) -> list[str]:
    """pytest over `tests`, to end by itself within `seconds` where pytest-timeout is installed."""
    options = ["-p", "gpu_stages.pytest_on_device", f"--junitxml={xml}"]
    parallel = importlib.util.find_spec("xdist") is not None
    if parallel:
        options += ["-n", str(max(1, min(PROCESSES, (os.cpu_count() or 1) - 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        session = max(seconds - GRACE_SECONDS - SESSION_GRACE_SECONDS, seconds / 2)
        options += [f"--session-timeout={session:.0f}", f"--timeout={TEST_SECONDS}"]
        # a kernel that hangs lets no signal's handler run; a thread ends the process, and xdist starts another
        options += ["--timeout-method=thread"] if parallel else []
    return [*PYTEST, *options, *tests]


def tests_core(suite: Suite, seconds: float) -> dict[str, Any]:
    """The files of CORE, but for the tensors of 2^31 elements."""
    return _run(suite, seconds, "tests_core", [*paths(CORE), f"--deselect={HUGE}"])


def tests_failed(suite: Suite, seconds: float) -> dict[str, Any]:
    """Of CORE what has not passed in the run whose suite.json is given, be it that it failed or that it was not run;
    then the other files. Without that file, or where it is broken: all of them.
    """
    passed, again, note = set(), set(CORE), {}
    if suite.failed:
        try:
            passed, again = passed_before(suite.failed)
        except Exception as error:  # no file, or any content: then everything is tested again
            note = {"note": f"{suite.failed}: {type(error).__name__}: {error}"[:200]}
            print(f"    {note['note']}", flush=True)
    path = suite.work / "passed_before.json"
    writing.write_text(path, json.dumps(sorted(passed)))
    names = [name for name in CORE if name in again - {HUGE_FILE}] + files() + [HUGE_FILE]
    return _run(suite, seconds, "tests_failed", [f"--passed={path}", *paths(names)]) | note


def passed_before(path: Path) -> tuple[set[str], set[str]]:
    """(tests that need not run again after the run of this suite.json, files of CORE that have others)."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["stage"] == "tests_core"]
    passed = {test for row in rows for test in row.get("passed") or ()}
    if any(row.get("complete") for row in rows):
        return passed, {_file_of(test) for row in rows for test in row["failures"]} & set(CORE)
    return passed, set(CORE)


def _file_of(test: str) -> str:
    """tests.kernels.test_a.TestB::test_c -> kernels/test_a.py; also of ::tests.test_a, which could not be collected."""
    found = re.match(r"(?:::)?tests\.((?:\w+\.)*?test_\w+)", test)
    return f"{found[1].replace('.', '/')}.py" if found else ""


def _run(suite: Suite, seconds: float, name: str, tests: Sequence[str]) -> dict[str, Any]:
    xml = suite.work / f"{name}.xml"
    xml.unlink(missing_ok=True)
    done = suite.run(name, command(seconds, xml, tests), seconds, GRACE_SECONDS, SIDE_BY_SIDE)
    outcome = pytest_outcome(xml, done.log)
    outcome["ok"] = done.status == 0
    ended = done.status in (0, 1) and "session-timeout" not in done.tail  # 1: all were run, and some failed
    outcome["complete"] = ended and outcome["failures"] is not None
    if done.status is None:
        outcome["reason"] = f"stopped to end within {seconds:.0f} s"
    elif "session-timeout" in done.tail:
        outcome |= {"ok": False, "reason": f"out of time, the rest left out: {done.tail.splitlines()[-1]}"}
    if not outcome["counts"]:
        print(done.tail, flush=True)
    return outcome


def pytest_outcome(xml: Path, log: Path) -> dict[str, Any]:
    """Counts, failures, and what passed or was skipped of a pytest run from its junit file, or, where that is broken,
    counts from its log.
    """
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        words = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", log.read_text(errors="replace")))
        return {"counts": {word.lower(): count for word, count in words.items()}, "failures": None, "passed": None}
    counts: Counter[str] = Counter()
    failures, passed = {}, []
    for case in cases:
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        counts[outcomes[0].tag if outcomes else "passed"] += 1
        test = f"{case.get('classname')}::{case.get('name')}"
        if outcomes and outcomes[0].tag != "skipped":
            failures[test] = (outcomes[0].get("message") or "")[:300]
        else:
            passed.append(test)
    return {"counts": dict(counts), "failures": failures, "passed": [test for test in passed if test not in failures]}


if __name__ == "__main__":
    print(*paths(name for name in (*CORE, *files()) if name not in sys.argv[1:]))
