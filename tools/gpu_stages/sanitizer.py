"""The stages that run compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys
import time
from typing import Any

from gpu_stages.device_tests import PYTEST
from gpu_stages.running import Suite

# one ragged shape of every kernel; the ids are shape-option
SANITIZED = "90 and (not token_sums or all)"
# The line with which a tool of compute-sanitizer says how many errors it found. Without one it has not run.
SUMMARY = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
    "initcheck": r"ERROR SUMMARY: (\d+) error",
}
# What torch's own kernels do is not ours to judge, and checking them takes most of the time
ONLY_OURS = ("--kernel-regex", "kns=_(norm|merge|project|epilogue|bank_epilogue|token_sums|finish_[a-z]+)_kernel")
# The smallest program that uses the GPU. A tool that cannot run it is refused by this machine's runtime (some
# containers do not let a tool attach to the driver), and that says nothing about the package.
PROBE = (sys.executable, "-c", "import torch; print(torch.ones(8, device='cuda').sum().item())")
GRACE_SECONDS = 15.0  # an instrumented pytest is slow to end


def sanitizer(suite: Suite, seconds: float, tool: str) -> dict[str, Any]:
    """A tool of compute-sanitizer over a few tests of the kernels; "refused" with what it said where it cannot run."""
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        return {"ok": True, "skipped": "compute-sanitizer is not installed"}
    start = time.monotonic()
    command = (binary, "--tool", tool, *(() if tool == "memcheck" else ONLY_OURS))
    # without PyTorch's cache every tensor is an allocation with an end
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    probe = suite.run(tool, (*command, *PROBE), seconds, GRACE_SECONDS, variables)
    if not re.search(SUMMARY[tool], probe.log.read_text(errors="replace")):
        if probe.status is None:  # it hung, or was given too little time: nobody knows
            return {"ok": False, "reason": "stopped in time, before the tests", "tail": probe.tail}
        reason = f"compute-sanitizer is refused: exit status {probe.status}"
        return {"ok": True, "skipped": reason, "refused": probe.tail}
    # memory that the tests have filled with NaN counts as initialised
    command += ("--error-exitcode", "86", *PYTEST, "--no-poison", "-x", "tests/test_kernels.py", "-k", SANITIZED)
    done = suite.run(tool, command, seconds - (time.monotonic() - start), GRACE_SECONDS, variables)
    errors = re.findall(SUMMARY[tool], done.log.read_text(errors="replace"))
    outcome: dict[str, Any] = {"ok": done.status == 0 and errors == ["0"], "errors": errors}
    if not outcome["ok"]:
        outcome["reason"] = "stopped in time" if done.status is None else f"exit status {done.status}"
        outcome["tail"] = done.tail
        print(done.tail, flush=True)
    return outcome
