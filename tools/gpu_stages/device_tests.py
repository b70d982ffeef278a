"""The stages that run the tests on the device, side by side where pytest-xdist is installed.

As a program it prints their files but for those named, for `make test-pretended-gpu`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from gpu_stages.running import Suite

# Every kernel and operator, and the promises that a GPU can break: graphs, streams, reuse, faults.
CORE = tuple(
    f"test_{name}.py"
    for name in (
        "kernels", "ops", "bounds", "nonfinite", "promises", "graphs", "modules", "passes", "rescale", "peft", "faults",
        "reuse", "serving", "merging", "accumulation", "frozen_adapters", "checkpointing", "autocast", "addresses",
    )
)  # fmt: skip
# What a GPU has no part in, or what takes it for other processes: ranks of gloo, trainers, the tools' own tests.
OFF_DEVICE = tuple(
    f"test_{name}.py"
    for name in (
        "analysis", "analysis_checkpoints", "apart", "architecture", "bench", "bench_analysis", "bench_dropout",
        "bench_host", "bench_model", "bench_shared", "cli", "compile_kernels", "convert", "convert_libraries",
        "convert_refusals", "deepspeed", "demo_dvora", "distributed", "docs", "examples", "figures", "fit", "gluon",
        "gpu_suite", "interpreter", "kernel_bench", "machine_code", "mutate", "parallel", "pretended_gpu", "probe",
        "sanitizer", "scaling", "sharded_checkpoint", "structure_claims", "tune",
    )
)  # fmt: skip
# of the other files the first; then the rest of them by name
NEXT = ("test_functional.py", "test_quantized.py", "test_compile.py", "test_properties.py", "test_dropout.py")
# 40 GB and ten seconds of drawing numbers: at the end, when the other workers are done
HUGE = "tests/test_addresses.py::test_more_than_2_to_the_31_elements_on_a_gpu"
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
    names = {path.name for path in (ROOT / "tests").glob("test_*.py")} - set(CORE) - set(OFF_DEVICE)
    return [*NEXT, *sorted(names - set(NEXT))]


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
    return _run(suite, seconds, "tests_core", [*(f"tests/{name}" for name in CORE), f"--deselect={HUGE}"])


def tests_failed(suite: Suite, seconds: float) -> dict[str, Any]:
    """What failed in the run whose suite.json is given, then the files that were not in it."""
    failed = failed_before(suite.failed) if suite.failed else set()
    again = {_file_of(test) for test in failed}
    earlier = {"files": CORE, "tests": [*failed, "tests." + HUGE.removeprefix("tests/").replace(".py", "")]}
    path = suite.work / "failed_before.json"
    path.write_text(json.dumps(earlier))
    names = [name for name in CORE if name in again] + files()
    return _run(suite, seconds, "tests_failed", [f"--only-failed={path}", *(f"tests/{name}" for name in names), HUGE])


def failed_before(path: Path) -> set[str]:
    """The tests of CORE that failed in the run of this suite.json, as a junit file names them."""
    rows = json.loads(path.read_text())["rows"]
    return {test for row in rows for test in row.get("failures") or () if _file_of(test) in CORE}


def _file_of(test: str) -> str:
    """tests.test_a.TestB::test_c -> test_a.py"""
    return next((f"{part}.py" for part in test.partition("::")[0].split(".") if part.startswith("test_")), "")


def _run(suite: Suite, seconds: float, name: str, tests: Sequence[str]) -> dict[str, Any]:
    xml = suite.work / f"{name}.xml"
    xml.unlink(missing_ok=True)
    done = suite.run(name, command(seconds, xml, tests), seconds, GRACE_SECONDS, SIDE_BY_SIDE)
    outcome = pytest_outcome(xml, done.log)
    outcome["ok"] = done.status == 0
    if done.status is None:
        outcome["reason"] = f"stopped to end within {seconds:.0f} s"
    elif "session-timeout" in done.tail:
        outcome |= {"ok": False, "reason": f"out of time, the rest left out: {done.tail.splitlines()[-1]}"}
    if not outcome["counts"]:
        print(done.tail, flush=True)
    return outcome


def pytest_outcome(xml: Path, log: Path) -> dict[str, Any]:
    """Counts and failures of a pytest run from its junit file, or, where it was killed, counts from its log."""
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        words = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", log.read_text(errors="replace")))
        return {"counts": {word.lower(): count for word, count in words.items()}, "failures": None}
    counts: Counter[str] = Counter()
    failures = {}
    for case in cases:
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        counts[outcomes[0].tag if outcomes else "passed"] += 1
        if outcomes and outcomes[0].tag != "skipped":
            failures[f"{case.get('classname')}::{case.get('name')}"] = (outcomes[0].get("message") or "")[:300]
    return {"counts": dict(counts), "failures": failures}


if __name__ == "__main__":
    print(*(f"tests/{name}" for name in (*CORE, *files()) if name not in sys.argv[1:]))
