"""The stages that run compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys
import time
from typing import Any

from gpu_stages.device_tests import PYTEST
from gpu_stages.running import Suite

# one ragged shape of every step
SANITIZED = (
    "tests/kernels/test_steps.py",
    "tests/kernels/test_grouped_norm.py",
    "-k",
    "90 and not pytorch and not library",
)
# The line with which a tool of compute-sanitizer says how many errors it found. Without one it has not run.
SUMMARY = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
    "initcheck": r"ERROR SUMMARY: (\d+) error",
}
# What torch's own kernels do is not ours to judge, and checking them takes most of the time
KERNELS = "norm|grouped_norm|merge|prepare|parts|project|epilogue|bank_epilogue|token_sums"
ONLY_OURS = ("--kernel-regex", f"kns=_({KERNELS})_kernel|^gemm_kernel$")
# The smallest program that uses the GPU. A tool that cannot run it is refused by this machine's runtime (some
# containers do not let a tool attach to the driver), and that says nothing about the package. It is run where the tests
# have ended without the tool's summary, and not before them: torch is slow to start under a tool.
PROBE = (sys.executable, "-c", "import torch; print(torch.ones(8, device='cuda').sum().item())")
GRACE_SECONDS, PROBE_GRACE_SECONDS = 10.0, 1.0  # an instrumented pytest is slow to end


def sanitizer(suite: Suite, seconds: float, tool: str) -> dict[str, Any]:
    """A tool of compute-sanitizer over a few tests of the kernels; "refused" with what it said where it cannot run."""
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        return {"ok": True, "skipped": "compute-sanitizer is not installed"}
    end = time.monotonic() + seconds
    command = (binary, "--tool", tool, *(() if tool == "memcheck" else ONLY_OURS))
    # without PyTorch's cache every tensor is an allocation with an end
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # memory that the tests have filled with NaN counts as initialised
    tests = ("--error-exitcode", "86", *PYTEST, "--no-poison", "-x", *SANITIZED)
    done = suite.run(tool, command + tests, seconds, GRACE_SECONDS, variables)
    errors = re.findall(SUMMARY[tool], done.log.read_text(errors="replace"))
    outcome: dict[str, Any] = {"ok": done.status == 0 and errors == ["0"], "errors": errors}
    if outcome["ok"]:
        return outcome
    outcome["reason"] = "stopped in time" if done.status is None else f"exit status {done.status}"
    outcome["tail"] = done.tail
    print(done.tail, flush=True)
    if not errors and done.status is not None:  # refused, or is it the tests that have died?
        probe = suite.run(f"{tool}_probe", (*command, *PROBE), end - time.monotonic(), PROBE_GRACE_SECONDS, variables)
        if probe.status is not None and not re.search(SUMMARY[tool], probe.log.read_text(errors="replace")):
            reason = f"compute-sanitizer is refused: exit status {probe.status}"
            return {"ok": True, "skipped": reason, "refused": probe.tail}
    return outcome
