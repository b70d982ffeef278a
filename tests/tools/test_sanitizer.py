"""The stages of the GPU suite that run compute-sanitizer, against a script in its place."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_suite  # noqa: E402
from gpu_stages import running, sanitizer, telling  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck")
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    "initcheck": "========= ERROR SUMMARY: 0 errors",
}
DIRTY = {
    "memcheck": "========= ERROR SUMMARY: 3 errors",
    "racecheck": "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)",
    "initcheck": "========= ERROR SUMMARY: 3 errors",
}
REFUSAL = "========= Error: Failed to attach: the container does not allow it"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(tool, probe, tests) is the stage's row of suite.json; both are what the script does for that program."""

    def run(tool: str, probe: str, tests: str, seconds: float = 60) -> dict:
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / "compute-sanitizer"
        calls = tmp_path / "calls"
        script.write_text(f'#!/bin/sh\necho "$*" >> {calls}\ncase "$*" in\n*pytest*) {tests};;\n*) {probe};;\nesac\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        stages = [replace(gpu_suite.STAGES[tool], least=0)]
        suite = running.Suite(tmp_path / "out", work=tmp_path / "work")
        running.run_stages(stages, suite, seconds, {"commit": "c"})
        (row,) = json.loads((tmp_path / "out" / "suite.json").read_text())["rows"]
        row["calls"] = calls.read_text().splitlines()
        row["line"] = telling.summary([row], suite.work)
        return row

    return run


def say(*lines: str, status: int = 0) -> str:
    return "; ".join([f"echo '{line}'" for line in lines] + [f"exit {status}"])


@pytest.mark.parametrize("tool", TOOLS)
def test_a_clean_run_is_ok(tool, run):
    row = run(tool, say("8.0", CLEAN[tool]), say("5 passed", CLEAN[tool]))
    assert row["ok"] and row["errors"] == ["0"] and "skipped" not in row
    (call,) = row["calls"]  # torch is started once
    assert f"--tool {tool}" in call and "tests/kernels/test_steps.py" in call and "--error-exitcode" in call
    assert "--no-poison" in call


@pytest.mark.parametrize("tool", TOOLS)
def test_what_the_tool_finds_fails_the_stage(tool, run):
    row = run(tool, say(CLEAN[tool]), say("5 passed", DIRTY[tool], status=86))
    assert not row["ok"] and row["errors"] == ["3"] and "exit status 86" in row["reason"] and DIRTY[tool] in row["tail"]


@pytest.mark.parametrize("tool", TOOLS)
def test_errors_are_believed_without_the_exit_status_and_the_status_without_errors(tool, run, tmp_path):
    assert not run(tool, say(CLEAN[tool]), say(DIRTY[tool]))["ok"]
    for path in (tmp_path / "bin" / "compute-sanitizer", tmp_path / "calls"):
        path.unlink()
    (tmp_path / "bin").rmdir()
    assert not run(tool, say(CLEAN[tool]), say("1 failed", CLEAN[tool], status=1))["ok"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_refusal_is_recorded_and_is_no_failure(tool, run):
    row = run(tool, say(REFUSAL, status=255), say(REFUSAL, status=255))
    assert row["ok"] and REFUSAL in row["refused"] and all(f"--tool {tool}" in call for call in row["calls"])
    assert row["skipped"] == "compute-sanitizer is refused: exit status 255"
    assert re.match(rf"{tool} +skipped .*refused", row["line"])


@pytest.mark.parametrize("tool", TOOLS)
def test_tests_that_die_are_a_failure_and_no_refusal(tool, run):
    row = run(tool, say(CLEAN[tool]), say("Segmentation fault", status=139))
    assert not row["ok"] and row["errors"] == [] and "skipped" not in row and row["reason"] == "exit status 139"


@pytest.mark.nightly  # it waits for ten seconds
def test_a_probe_that_does_not_end_is_no_refusal(run):
    """It may have had too little time."""
    row = run("memcheck", "sleep 60", say("Killed", status=137), seconds=sanitizer.GRACE_SECONDS + 1)
    assert not row["ok"] and row["reason"] == "exit status 137" and "refused" not in row


def test_tests_that_hang_are_stopped_in_time(run):
    row = run("memcheck", say(CLEAN["memcheck"]), "sleep 60", seconds=sanitizer.GRACE_SECONDS + 1)
    assert not row["ok"] and row["reason"] == "stopped in time"


def test_without_the_tool_the_stage_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *arguments, **keywords: None)
    suite = running.Suite(tmp_path)
    assert sanitizer.sanitizer(suite, 60, "memcheck") == {"ok": True, "skipped": "compute-sanitizer is not installed"}


def test_the_filter_names_every_kernel_of_the_package_and_only_them():
    option, pattern = sanitizer.ONLY_OURS
    assert option == "--kernel-regex" and pattern.startswith("kns=")
    kernels = []
    for path in (ROOT / "dora_kernels" / "kernels").rglob("*.py"):
        kernels += re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    assert len(kernels) >= 9 and "gemm_kernel" in kernels and all(re.search(pattern[4:], kernel) for kernel in kernels)
    torch_s = ("vectorized_elementwise_kernel", "reduce_kernel", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n")
    torch_s += ("cutlass_gemm_kernel", "gemm_kernel2x1")
    assert not any(re.search(pattern[4:], kernel) for kernel in torch_s)
