"""Everything that wants a GPU, in one command and one time budget, most valuable first.

    python tools/gpu_suite.py --seconds 540                  # results into bench/results/<gpu>/
    python tools/gpu_suite.py --seconds 540 --out DIR --commit $(git rev-parse HEAD)
    python tools/gpu_suite.py --stage layer
    python tools/gpu_suite.py --resume                       # not again what ended well for this commit

Needs torch, triton, peft, pytest and a GPU (transformers for the model, pytest-xdist to test side by side), nothing
that has to be built or installed: the package runs from the checkout. Writes into one flat folder: suite.json (what
ran, how it ended, which tests failed) and suite.log after every stage, the JSON of each benchmark, and tuned.json, a
copy of what the tuning left in dora_kernels/tuned/. Exit status 0 where every stage ended well, 1 where one failed or
had no time left, 2 without a GPU.

A further stage is one more function and one more line in STAGES.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench import machine, report  # noqa: E402
from bench.machine import ROOT  # noqa: E402
from dora_kernels import configs, launch  # noqa: E402

# what a command gets to end by itself, interrupted as by Ctrl-C: pytest then still writes its summary
GRACE_SECONDS = 15.0
FAILURES_SHOWN = 15
LOG_LINES_SHOWN = 15
LOG_BYTES = 1_500_000  # of each stage in suite.log: its end


@dataclass(frozen=True)
class Suite:
    """What every stage needs to know."""

    out: Path
    commit: str | None = None
    # of the commands, one file each; suite.log collects them
    logs: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gpu_suite_")))

    def collect_log(self, name: str) -> None:
        """The end of a stage's log to the end of suite.log."""
        log = self.logs / f"{name}.log"
        if log.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "suite.log").open("ab") as collected:
                collected.write(f"\n===== {name}\n".encode() + log.read_bytes()[-LOG_BYTES:])


@dataclass(frozen=True)
class Stage:
    """run(suite, seconds) does the work in at most `seconds` and returns its result, {"ok": bool, ...} for the JSON.

    least: seconds without which it is not worth starting; most: seconds after which the others are worth more.
    file: what it leaves in the folder of results.
    """

    name: str
    least: float
    run: Callable[[Suite, float], dict[str, Any]]
    most: float = float("inf")
    file: str | None = None


def run_stages(
    stages: Sequence[Stage],
    suite: Suite,
    seconds: float,
    information: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
    finished: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Run the stages in order within `seconds`; suite.json is written after each. One result per stage.

    A stage gets the time that is left but for the `least` of those after it, at least its own and at most its `most`;
    it is skipped where less than its `least` is left. A stage that raises has failed, and the next one runs.
    finished: results of an earlier run, by stage, that are taken over.
    """
    end = clock() + seconds
    finished = finished or {}
    results: list[dict[str, Any]] = []
    for place, stage in enumerate(stages):
        start = clock()
        left = end - start
        later = sum(other.least for other in stages[place + 1 :] if other.name not in finished)
        share = min(stage.most, max(stage.least, left - later))
        if stage.name in finished:
            results.append(finished[stage.name])
            print(f"{stage.name}: finished before", flush=True)
            report.write(suite.out / "suite.json", information, results)
            continue
        if left < stage.least:
            outcome = {"ok": False, "skipped": f"{max(left, 0):.0f} s left; expected {stage.least:.0f} or more"}
            print(f"{stage.name}: skipped, {outcome['skipped']}", flush=True)
        else:
            print(f"{stage.name}: up to {share:.0f} s", flush=True)
            try:
                outcome = stage.run(suite, share)
            except Exception as error:  # whatever it was, the other stages still have something to say
                outcome = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        suite.collect_log(stage.name)
        results.append({"stage": stage.name, "seconds": clock() - start} | outcome)
        report.write(suite.out / "suite.json", information, results)
    return results


@dataclass(frozen=True)
class Run:
    """How a command ended: its exit status, or None where its time ran out, and where its output lies."""

    status: int | None
    log: Path

    @property
    def tail(self) -> str:
        """The last lines of the output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


def finished_before(out: Path, stages: Sequence[Stage], commit: object) -> dict[str, dict[str, Any]]:
    """The results in suite.json of stages that ended well for `commit` and whose file is still there."""
    try:
        content = json.loads((out / "suite.json").read_text())
        rows = {row["stage"]: row for row in content["rows"] if row["ok"] and "skipped" not in row}
        same = commit is not None and content["meta"]["commit"] == commit
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    there = [stage for stage in stages if stage.file is None or (out / stage.file).exists()]
    return {stage.name: rows[stage.name] for stage in there if same and stage.name in rows}


def run_command(
    command: Sequence[str],
    seconds: float,
    log: Path,
    grace: float = GRACE_SECONDS,
    variables: dict[str, str] | None = None,
) -> Run:
    """Run `command` from the root of the checkout, its output in `log`; over in `seconds`, by force if it must be.

    The last `grace` seconds are for ending by itself after an interrupt. A process of its own: an illegal memory
    access makes a CUDA context useless for whatever else its process would have done.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment |= {"PYTHONUNBUFFERED": "1"} | (variables or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return Run(process.wait(max(seconds - grace, 0)), log)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Run(None, log)


# Most telling first, in case the time runs out; the files not named here follow
FIRST_TESTS = ("test_kernels.py", "test_functional.py", "test_ops.py", "test_modules.py", "test_peft.py")
# -v: where pytest is killed its log still tells the counts. What a missing package keeps from being collected must not
# hide the rest.
PYTEST = (sys.executable, "-m", "pytest", "-v", "--continue-on-collection-errors", "-p", "no:cacheprovider")


def tests(suite: Suite, seconds: float) -> dict[str, Any]:
    """The whole test suite on the device, not interpreted; side by side where pytest-xdist is installed."""
    xml = suite.logs / "tests.xml"
    names = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    names.sort(key=lambda name: FIRST_TESTS.index(name) if name in FIRST_TESTS else len(FIRST_TESTS))
    parallel = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    command = (*PYTEST, *parallel, f"--junitxml={xml}", *(f"tests/{name}" for name in names))
    done = run_command(command, seconds, suite.logs / "tests.log")
    outcome = pytest_outcome(xml, done.log)
    outcome["ok"] = done.status == 0
    if done.status is None:
        outcome["reason"] = f"stopped to end within {seconds:.0f} s"
    if not outcome["ok"]:
        print(done.tail, flush=True)
    return outcome


def pytest_outcome(xml: Path, log: Path) -> dict[str, Any]:
    """Counts and failures of a pytest run from its junit file, or, where it was killed, counts from its log."""
    if not xml.exists():
        words = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", log.read_text(errors="replace")))
        return {"counts": {word.lower(): count for word, count in words.items()}, "failures": None}
    counts: Counter[str] = Counter()
    failures = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        counts[outcomes[0].tag if outcomes else "passed"] += 1
        if outcomes and outcomes[0].tag != "skipped":
            failures[f"{case.get('classname')}::{case.get('name')}"] = (outcomes[0].get("message") or "")[:300]
    return {"counts": dict(counts), "failures": failures}


def benchmark(
    suite: Suite, seconds: float, name: str, command: Sequence[str], path: Path, budget: float | None = None
) -> dict[str, Any]:
    """Run a benchmark that writes `path`; what stands in that file decides beside the exit status.

    budget: for --seconds, which benchmarks look at between two cases; None where there is no such argument.
    """
    path.unlink(missing_ok=True)
    command = [sys.executable, *command, "--out", str(path)]
    command += ["--seconds", f"{budget:.0f}"] if budget is not None else []
    command += ["--commit", suite.commit] if suite.commit else []
    done = run_command(command, seconds, suite.logs / f"{name}.log")
    outcome: dict[str, Any] = {"ok": done.status == 0}
    if path.exists():
        content = json.loads(path.read_text())
        outcome |= {"rows": len(content["rows"]), "left_out": content["meta"].get("left_out", [])}
        outcome["ok"] = outcome["ok"] and not outcome["left_out"]
        outcome["not_measured"] = not_measured(content["rows"])
    else:
        outcome["ok"] = False
    if done.status is None:
        outcome["reason"] = f"stopped to end within {seconds:.0f} s"
    if done.status not in (0, 1):
        outcome.setdefault("reason", f"exit status {done.status}")
        print(done.tail, flush=True)
    return outcome


def not_measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each row that is not ok, or whose CUDA graph could not be captured."""
    if any("provider" in row for row in rows):
        return report.problems(rows)
    wanted = ("section", "kernel", "by", "variant", "M", "N", "K", "R", "precision", "tiles", "reason")
    return [
        " ".join(f"{row[name]}" for name in wanted if row.get(name) is not None)
        for row in rows
        if not row.get("ok", True)
    ]


def decisive(suite: Suite, seconds: float) -> dict[str, Any]:
    """The measurements that decide how the package is built."""
    path = suite.out / "decisive.json"
    return benchmark(suite, seconds, "decisive", ["-m", "bench.decisive"], path, max(seconds - 25, seconds / 2))


def kernels(suite: Suite, seconds: float) -> dict[str, Any]:
    """Each kernel alone against the roof, with the tuned table where there is one."""
    path = suite.out / "kernels.json"
    return benchmark(suite, seconds, "kernels", ["-m", "bench.kernels"], path, max(seconds - 15, seconds / 2))


def layer(suite: Suite, seconds: float, name: str = "layer") -> dict[str, Any]:
    """The layer benchmark's core grid."""
    command = ["-m", "bench.layer", "--device", "cuda", "--grid", "core"]
    return benchmark(suite, seconds, name, command, suite.out / f"{name}.json", max(seconds - 45, seconds / 2))


def tuned_table() -> Path:
    """The table of this GPU."""
    return configs.tuned_path(launch.device_facts(torch.device("cuda", torch.cuda.current_device())).name)


def tuning(suite: Suite, seconds: float) -> dict[str, Any]:
    """Tile configurations, into the package, where the stages after this one find them, and into tuned.json."""
    command = [sys.executable, "tools/tune.py", "--seconds", f"{max(seconds - 30, seconds / 2):.0f}"]
    command += ["--commit", suite.commit] if suite.commit else []
    done = run_command(command, seconds, suite.logs / "tuning.log")
    outcome: dict[str, Any] = {"ok": done.status == 0}
    if tuned_table().exists():
        suite.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tuned_table(), suite.out / "tuned.json")
        measured = json.loads(tuned_table().read_text())["measured"].get("2", {})
        outcome["over_default"] = {kernel: found["over_default"] for kernel, found in measured.items()}
    if not outcome["ok"]:
        outcome["reason"] = done.tail.splitlines()[-1] if done.status == 1 and done.tail else f"status {done.status}"
        print(done.tail, flush=True)
    return outcome


def layer_tuned(suite: Suite, seconds: float) -> dict[str, Any]:
    """The core grid again; where it is complete it becomes layer.json, and the earlier one layer_untuned.json."""
    if not tuned_table().exists() or not json.loads(tuned_table().read_text())["configs"].get("2"):
        return {"ok": True, "skipped": "no tuned configuration"}
    outcome = layer(suite, seconds, "layer_tuned")
    if "rows" in outcome and not outcome["left_out"] and "reason" not in outcome:
        first = suite.out / "layer.json"
        if first.exists():
            first.replace(suite.out / "layer_untuned.json")
        (suite.out / "layer_tuned.json").replace(first)
    return outcome


def model(suite: Suite, seconds: float) -> dict[str, Any]:
    """The whole model."""
    return benchmark(suite, seconds, "model", ["-m", "bench.model"], suite.out / "model.json")


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


def sanitizer(suite: Suite, seconds: float, tool: str) -> dict[str, Any]:
    """A tool of compute-sanitizer over a few tests of the kernels; "refused" with what it said where it cannot run."""
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        return {"ok": True, "skipped": "compute-sanitizer is not installed"}
    start = time.monotonic()
    command = (binary, "--tool", tool, *(() if tool == "memcheck" else ONLY_OURS))
    # without PyTorch's cache every tensor is an allocation with an end
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = suite.logs / f"{tool}.log"
    probe = run_command((*command, *PROBE), seconds, log, variables=variables)
    if not re.search(SUMMARY[tool], log.read_text(errors="replace")):
        if probe.status is None:  # it hung, or was given too little time: nobody knows
            return {"ok": False, "reason": "stopped in time, before the tests", "tail": probe.tail}
        reason = f"compute-sanitizer is refused: exit status {probe.status}"
        return {"ok": True, "skipped": reason, "refused": probe.tail}
    # memory that the tests have filled with NaN counts as initialised
    command += ("--error-exitcode", "86", *PYTEST, "--no-poison", "-x", "tests/test_kernels.py", "-k", SANITIZED)
    done = run_command(command, seconds - (time.monotonic() - start), log, variables=variables)
    errors = re.findall(SUMMARY[tool], log.read_text(errors="replace"))
    outcome: dict[str, Any] = {"ok": done.status == 0 and errors == ["0"], "errors": errors}
    if not outcome["ok"]:
        outcome["reason"] = "stopped in time" if done.status is None else f"exit status {done.status}"
        outcome["tail"] = done.tail
        print(done.tail, flush=True)
    return outcome


# in order; the least of all of them together stays below 540 s
STAGES = (
    Stage("tests", 90, tests, most=150),
    Stage("decisive", 50, decisive, most=110, file="decisive.json"),
    Stage("layer", 80, layer, most=130, file="layer.json"),
    Stage("tuning", 50, tuning, most=100, file="tuned.json"),
    Stage("kernels", 25, kernels, most=60, file="kernels.json"),
    Stage("layer_tuned", 60, layer_tuned, most=110, file="layer_untuned.json"),
    Stage("model", 60, model, most=150, file="model.json"),
    Stage("memcheck", 30, partial(sanitizer, tool="memcheck"), most=90),
    Stage("racecheck", 30, partial(sanitizer, tool="racecheck"), most=90),
    Stage("initcheck", 30, partial(sanitizer, tool="initcheck")),
)


def summary(results: Sequence[dict[str, Any]], out: Path) -> str:
    """What ended how, then the table of the benchmark, short enough for the end of a log."""
    lines = []
    for result in results:
        state = "skipped" if "skipped" in result else "ok" if result["ok"] else "FAILED"
        notes = [str(result[key]) for key in ("skipped", "reason") if key in result]
        notes += [f"{count} {word}" for word, count in result.get("counts", {}).items()]
        notes += [f"{result['rows']} rows"] if "rows" in result else []
        notes += [f"{kernel} {ratio}" for kernel, ratio in result.get("over_default", {}).items()]
        notes += [f"left out: {'; '.join(result['left_out'])}"] if result.get("left_out") else []
        lines.append(f"{result['stage']:<10}{state:<9}{result['seconds']:>6.0f} s  {', '.join(notes)}")
        failures = result.get("failures") or {}
        lines += [f"    {name}: {message.splitlines()[0][:120]}" for name, message in _first(failures)]
        lines += [f"    {line[:200]}" for line in result.get("not_measured", ())[:FAILURES_SHOWN]]
    path = out / "layer.json"
    if path.exists() and any(result.get("rows") for result in results):
        lines += [
            "",
            "layer step, times over the frozen linear layer",
            report.table(json.loads(path.read_text())["rows"]),
        ]
    return "\n".join(lines)


def _first(failures: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, message or "-") for name, message in failures.items()][:FAILURES_SHOWN]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu>")
    parser.add_argument("--stage", nargs="+", choices=[stage.name for stage in STAGES], help="only these")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--resume", action="store_true", help="skip what ended well for this commit in the folder")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        build = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"
        print(f"gpu_suite: torch {torch.__version__} (a {build} build) sees no GPU; expected one", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    out = (arguments.out or ROOT / "bench" / "results" / machine.device_folder(device)).resolve()
    stages = [stage for stage in STAGES if arguments.stage is None or stage.name in arguments.stage]
    information = machine.meta(device, arguments.commit) | {"budget_seconds": arguments.seconds}
    finished = finished_before(out, stages, information["commit"]) if arguments.resume else {}
    if not finished:
        (out / "suite.log").unlink(missing_ok=True)
    suite = Suite(out, arguments.commit)
    results = run_stages(stages, suite, arguments.seconds, information, finished=finished)
    print("\n" + summary(results, out))
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
