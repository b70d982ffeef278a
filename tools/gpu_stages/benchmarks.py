"""The stages that measure: what each of them asks of bench/ and tools/tune.py."""

from __future__ import annotations

import json
import lzma
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lib import report, tuned
from gpu_stages import saving
from gpu_stages.running import GRACE_SECONDS, Suite

# bench.kernels: R = 64, the norm at R = 384, a larger weight, few tokens; then float32 adapters and the other dtypes
KERNEL_CASES = (
    "8192x4096x4096x64", "8192x14336x4096x384", "8192x8192x8192x64", "2048x4096x4096x16",
    "8192x4096x4096x64:bf16-fp32", "8192x14336x4096x384:bf16-fp32", "8192x4096x4096x64:fp32", "8192x4096x4096x64:fp16",
)  # fmt: skip
# a GPU that is pretended interprets kernels; these are compiled for it
COMPILING = {"TRITON_INTERPRET": "0"}
WINNERS_SECONDS = 10.0  # of the tuning: for starting, recording and compiling what the layer and the model launch
COMPILED = ("peft_dora_compiled", "factored_compose_compiled")  # of bench/lib/providers.py
COMPILED_SECONDS = 25.0  # an estimate: 6 of starting, 10 of compiling two graphs, the gate and the timing
ROOFLINE = "roofline.json"
LINE = 240  # characters of a line that are shown


def benchmark(
    suite: Suite,
    seconds: float,
    name: str,
    command: Sequence[str],
    spare: float | None = 15,
    roof: bool = False,
    show: int = 0,
    variables: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a benchmark that writes NAME.json; what stands in that file decides beside the exit status.

    spare: seconds for starting and for the last case, kept from what it is told to stop after; None: it cannot be told.
    roof: whether it takes the roofs that the facts have measured; show: so many last lines of its output are printed.
    """
    path = suite.work / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, *command, "--out", str(path)]
    if spare is not None:
        command += ["--seconds", f"{max(seconds - GRACE_SECONDS - spare, seconds / 3):.0f}"]
    if roof and (suite.work / ROOFLINE).exists():
        command += ["--roof", str(suite.work / ROOFLINE)]
    command += ["--commit", suite.commit] if suite.commit else []
    done = suite.run(name, command, seconds, variables=variables)
    if show:
        print(*(f"    {line[:LINE]}" for line in done.lines[-show:]), sep="\n", flush=True)
    outcome: dict[str, Any] = {"ok": done.status == 0}
    if path.exists():
        content = json.loads(path.read_text())
        outcome |= {"rows": len(content.get("rows", ())), "left_out": content["meta"].get("left_out", [])}
        outcome["ok"] = outcome["ok"] and not outcome["left_out"]
        outcome["not_measured"] = not_measured(content.get("rows", ()))
    else:
        outcome["ok"] = False
    if done.status is None:
        outcome["reason"] = f"stopped to end within {seconds:.0f} s"
    if done.status not in (0, 1) or not path.exists():
        outcome.setdefault("reason", f"exit status {done.status}")
        print(done.tail, flush=True)
    return outcome


def not_measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each row that is not ok, or whose CUDA graph could not be captured."""
    if any("provider" in row for row in rows):
        return [line.partition("\n")[0] for line in report.problems(rows)]
    wanted = "section attempt fact kernel by variant M N K R pass way precision tiles reason error".split()
    bad = [row for row in rows if not row.get("ok", True)]
    lines = (" ".join(str(row[name]) for name in wanted if row.get(name) not in (None, "")) for row in bad)
    return list(dict.fromkeys(line.partition("\n")[0] for line in lines))


def warm(suite: Suite, seconds: float, more: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the benchmarks launch, compiled; what an earlier run has brought back need not be."""
    start = time.monotonic()
    carried: dict[str, Any] = {}
    if suite.cache is not None:
        try:
            carried["note"] = f"{saving.unpack_cache(suite.cache, suite.triton_cache)} files carried"
        except (OSError, tarfile.TarError, EOFError, lzma.LZMAError) as error:  # then it is compiled again
            carried["note"] = f"{suite.cache}: {type(error).__name__}: {error}"
    left = seconds - (time.monotonic() - start)
    command = ["-m", "gpu_stages.warm", *more]
    return benchmark(suite, left, "ptxas", command, spare=8, show=10, variables=COMPILING) | carried


def tuning(suite: Suite, seconds: float) -> dict[str, Any]:
    """Tile configurations, with the times of every candidate, into tuned.json and into the package, where the stages
    after this one find them; what they launch with the winners is compiled here, in all cores.
    """
    path, end = suite.work / "tuned.json", time.monotonic() + seconds
    outcome = benchmark(suite, seconds - WINNERS_SECONDS, "tuned", ["tools/tune.py"], spare=12)
    outcome = {name: outcome[name] for name in ("ok", "reason") if name in outcome}
    if path.exists():
        tuned.enter(path)
        table = tuned.read(path)
        measured = table["measured"].get("2", {})
        # without it: the default itself was wrong or refused
        outcome["over_default"] = {kernel: found.get("over_default", "-") for kernel, found in measured.items()}
        if any(table["configs"].values()):
            command = ["-m", "gpu_stages.warm", "--part", "layer", "model"]
            left = max(end - time.monotonic(), WINNERS_SECONDS)
            winners = benchmark(suite, left, "ptxas_tuned", command, spare=1, variables=COMPILING)
            outcome["note"] = f"{winners.get('rows', 0)} kernels compiled with the tuned tiles"
    return outcome


def ways(suite: Suite, seconds: float) -> dict[str, Any]:
    """The ways of a layer, into ways.json, and the planner's table of what won where into tuned_ways.json and into the
    package, where the stages after this one find it.
    """
    table = suite.work / "tuned_ways.json"
    table.unlink(missing_ok=True)
    outcome = benchmark(suite, seconds, "ways", ["-m", "bench.studies.ways", "--table", str(table)], spare=6, show=8)
    outcome["told"] = read(suite.work / "ways.json")["meta"].get("told", [])
    if table.exists():
        try:
            outcome["note"] = f"entered into {tuned.enter(table).name}"
        except OSError as error:  # a checkout that cannot be written to: what was measured comes back all the same
            outcome |= {"ok": False, "reason": f"the table is not entered: {error}"}
    return outcome


def compiled(suite: Suite, seconds: float, providers: Sequence[str] = COMPILED) -> dict[str, Any]:
    """A training step of the square layer under torch.compile, beside ours: a run of bench.layer for each provider,
    into a file of its name, so that one that compiles for too long costs itself alone.
    """
    end = time.monotonic() + seconds
    outcome: dict[str, Any] = {"ok": True, "rows": 0, "left_out": [], "not_measured": []}
    for waiting, provider in zip(range(len(providers), 0, -1), providers, strict=True):
        left = end - time.monotonic()
        command = ["-m", "bench.layer", "--device", "cuda", "--grid", "core", "--case", "1", "--no-launches"]
        command += ["--step", "forward+backward", "--step-seconds", "0.25", "--provider", "frozen", "ours", provider]
        # one that is sure to be measured is worth more than two that are cut short
        share = max(left / waiting, min(left, COMPILED_SECONDS))
        found = benchmark(suite, share, provider, command, spare=5)
        outcome["ok"] &= found["ok"]
        outcome["rows"] += found.get("rows", 0)
        outcome["not_measured"] += found.get("not_measured", [])
        if not found.get("rows"):
            outcome["left_out"].append(f"{provider}: {found.get('reason', 'no rows')}")
    return outcome


def read(path: Path) -> dict[str, Any]:
    """The benchmark's {meta, rows}; empty ones where the file is missing or broken."""
    try:
        content = json.loads(path.read_text())
        return {"meta": content["meta"], "rows": content.get("rows", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"meta": {}, "rows": []}
