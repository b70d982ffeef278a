"""One layer step, every provider, side by side: a grid of cases into JSON {meta, rows}, and a table of ratios.

    python -m bench.layer                         # the core grid, into bench/results/<gpu>/layer.json
    python -m bench.layer --grid cpu --device cpu # the grid of bench/results/cpu/layer.json
    python -m bench.layer --grid decode           # 1 to 16 tokens, inference, into layer-decode.json; also: full
    python -m bench.layer --grid qdora            # over a 4-bit base, into layer-qdora.json: QLoRA, QDoRA and ours
    python -m bench.layer --shape 14336x4096 --tokens 8192 --rank 384 --provider frozen peft_dora ours
    python -m bench.layer --device cpu --shape 1024x1024 --tokens 64 512 --rank 8 64 --precision fp32 bf16

The file is overwritten, and complete after every case: a run that is cut short leaves what it has measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.machine import ROOT, device_folder, meta
from bench.measure import (
    CudaStopwatch,
    Gate,
    Timing,
    capture,
    cpu_stopwatch,
    failure,
    host_microseconds,
    interleave,
    launches,
    peak_bytes,
    saved_bytes,
)
from bench.providers import COMPILED, PASSES, PROVIDERS, Layer, Problem, Provider, default_providers
from bench.report import memory, problems, table, write
from bench.shapes import GRIDS, PRECISIONS, QUANTIZED, Case, layer_names

# without --grid: what is not named of --shape, --tokens, --rank and --precision (a GPU without any: the core grid)
DEFAULT_GPU = {"shape": [(4096, 4096)], "tokens": [8192, 512], "rank": [64, 16], "precision": ["bf16", "bf16-autocast"]}
DEFAULT_CPU = {"shape": [(1024, 1024)], "tokens": [512, 64], "rank": [64, 8], "precision": ["fp32", "bf16"]}


@dataclass
class Row:
    """One provider in one pass of one case, as it stands in the JSON. A row that is not ok has no time.

    ms: eager, wall time on the CPU and device time on a GPU (see CudaStopwatch); graph_ms: replay of a CUDA graph.
    errors: per tensor of a forward and backward pass, error and yardstick of dora_kernels.testing.
    peak_bytes: at the peak of the step (see measure.peak_bytes); saved_bytes: what forward keeps for backward, but for
    x, the weight and the parameters; host_us: the host's microseconds for a call; launches: what a call starts on the
    device.
    """

    provider: str
    computes: str | None
    step: str
    layers: list[str]
    M: int
    N: int
    K: int
    R: int
    precision: str
    ok: bool = True
    reason: str | None = None
    backend: str | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    ms: Timing | None = None
    graph_ms: Timing | None = None
    graph_reason: str | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    host_us: float | None = None
    launches: float | None = None

    def fail(self, reason: str) -> None:
        """Take back every number."""
        self.ok, self.reason = False, reason
        self.ms = self.graph_ms = self.peak_bytes = self.saved_bytes = self.host_us = self.launches = None


def grid(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    ranks: Iterable[int],
    precisions: Iterable[str],
    device: str,
) -> list[Case]:
    """Every combination, precisions changing slowest and ranks fastest; shapes are (N, K)."""
    shapes, tokens, ranks = list(shapes), list(tokens), list(ranks)
    return [
        Case(M, N, K, R, precision, device)
        for precision in precisions
        for N, K in shapes
        for M in tokens
        for R in ranks
    ]


def measure_case(
    case: Case,
    providers: dict[str, Provider] = PROVIDERS,
    steps: Iterable[str] = tuple(PASSES),
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 100),
) -> list[Row]:
    """One row per step and provider. What fails the gate, or raises, says so in its rows and is not timed.

    seconds: of interleaved timing, for each step (and again for the CUDA graphs).
    """
    device = torch.device(case.device)
    if any(name in COMPILED for name in providers):
        torch.compiler.reset()  # its cache is not for a grid of shapes
    problem = Problem.random(case)
    gate = Gate(problem)
    layers: dict[str, Layer] = {}
    templates: dict[str, dict[str, Any]] = {}
    for name, provider in providers.items():
        templates[name] = record = {"computes": None, "ok": False}
        try:
            layer = provider(problem)
            record["computes"] = layer.computes
            comparisons, record["backend"] = gate.check(layer)
            record["errors"] = {c.name: {"error": c.error, "yardstick": c.yardstick} for c in comparisons}
            record["reason"] = failure(comparisons)
        except Exception as error:  # a provider that cannot do a case is a result of the benchmark, not its end
            record["reason"] = f"{type(error).__name__}: {error}"
        if record["reason"] is None:
            record["ok"] = True
            layers[name] = layer

    rows = []
    for step in steps:
        named = {
            name: Row(
                provider=name,
                step=step,
                layers=layer_names(case.N, case.K),
                M=case.M,
                N=case.N,
                K=case.K,
                R=case.R,
                precision=case.precision,
                **record,
            )
            for name, record in templates.items()
        }
        ready = {}
        for name, layer in layers.items():
            layer.set_mode(step)
            if step == "inference":  # the gate above was one of training
                try:
                    reason = failure(gate.check(layer, step)[0])
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                if reason is not None:
                    named[name].fail(reason)
                    continue
            ready[name] = functools.partial(PASSES[step], layer, problem)
        _measure(ready, layers, named, problem, seconds, rounds)
        if device.type == "cuda":
            _time_graphs(ready, layers, named, gate, step, device, seconds, rounds)
        rows += named.values()
    return rows


Calls = dict[str, Callable[[], dict[str, torch.Tensor]]]


def _measure(
    calls: Calls,
    layers: dict[str, Layer],
    rows: dict[str, Row],
    problem: Problem,
    seconds: float,
    rounds: tuple[int, int],
) -> None:
    """Memory, the host's part and eager times into the rows."""
    device = problem.x.device
    for name in list(calls):
        row, call = rows[name], calls[name]
        try:
            row.peak_bytes = peak_bytes(call, device)
            row.saved_bytes = saved_bytes(call, problem.x, problem.weight, *layers[name].held())
            row.host_us = host_microseconds(call, device)
            row.launches = launches(call, device)
        except torch.OutOfMemoryError as error:
            row.fail(f"OutOfMemoryError: {error}")
            del calls[name]
    stopwatch = CudaStopwatch(device) if device.type == "cuda" else cpu_stopwatch
    for name, timing in interleave(calls, stopwatch, seconds, rounds).items():
        rows[name].ms = timing


def _time_graphs(
    calls: Calls,
    layers: dict[str, Layer],
    rows: dict[str, Row],
    gate: Gate,
    step: str,
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
) -> None:
    """Times of CUDA graph replays into the rows, or the reason that a step could not be captured."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for name, call in calls.items():
        try:
            graph, results = capture(call, pool)
            for result in results.values():
                result.fill_(torch.nan)
            graph.replay()
            rows[name].graph_reason = failure(gate.comparisons(layers[name].computes, results, step))
            del results
        except Exception as error:  # not every provider can be captured
            rows[name].graph_reason = f"{type(error).__name__}: {error}"
            torch.cuda.synchronize(device)
        if rows[name].graph_reason is None:
            graphs[name] = graph.replay
    for name, timing in interleave(graphs, CudaStopwatch(device), seconds, rounds).items():
        rows[name].graph_ms = timing


def run(
    cases: Sequence[Case],
    out: pathlib.Path,
    measure: Callable[[Case], list[Row]],
    seconds: float,
    information: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Measure the cases in order into `out`, written after each; once `seconds` are over the rest is left out."""
    end = clock() + seconds
    rows: list[dict[str, Any]] = []
    for done, case in enumerate(cases, start=1):
        if clock() >= end:
            print(f"out of time, left out: {'; '.join(map(str, cases[done - 1 :]))}", flush=True)
            break
        print(case, flush=True)
        rows += [asdict(row) for row in measure(case)]
        write(out, information | {"left_out": [str(case) for case in cases[done:]]}, rows)
        gc.collect()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a provider failed the gate, 2 where the device is not there."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device != "auto":
        device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.layer: --device cuda but torch sees no GPU; expected a GPU, or --device cpu", file=sys.stderr)
        return 2
    steps = arguments.step or (["inference"] if arguments.grid == "decode" else list(PASSES))

    def measure(case: Case) -> list[Row]:
        names = arguments.provider or default_providers(device.type, case.precision in QUANTIZED)
        providers = {name: PROVIDERS[name] for name in names}
        return measure_case(case, providers, steps, arguments.step_seconds, arguments.rounds)

    file = "layer.json" if arguments.grid in (None, "core", "cpu") else f"layer-{arguments.grid}.json"
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / file
    try:
        cases = cases_of(arguments, device.type)
    except ValueError as error:
        parser.error(str(error))
    rows = run(cases, out, measure, arguments.seconds, meta(device, arguments.commit))
    print("\ntimes over the frozen linear layer")
    print(table(rows))
    print("\npeak memory of a step, MiB")
    print(memory(rows))
    failed = problems(rows)
    if failed:
        print("not measured\n" + "\n".join(failed))
    return 0 if all(row["ok"] for row in rows) else 1


def cases_of(arguments: argparse.Namespace, device: str) -> list[Case]:
    """A named grid, or the product of the axes; ValueError where both are asked for."""
    default = DEFAULT_GPU if device == "cuda" else DEFAULT_CPU
    named = [name for name in default if getattr(arguments, name)]
    if arguments.grid is not None or (device == "cuda" and not named):
        if named:
            raise ValueError(f"--grid {arguments.grid} with --{named[0]}; expected one or the other")
        return GRIDS[arguments.grid or "core"](device)
    axes = {name: getattr(arguments, name) or values for name, values in default.items()}
    return grid(axes["shape"], axes["tokens"], axes["rank"], axes["precision"], device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--grid", choices=GRIDS, help="a named grid, in place of the four axes (default on a GPU: core)"
    )
    parser.add_argument("--shape", nargs="+", type=_shape, metavar="NxK", help="weight shapes")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument("--rank", nargs="+", type=int, metavar="R")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS | QUANTIZED)
    parser.add_argument(
        "--provider", nargs="+", choices=PROVIDERS, help="default: all, without the compiled ones on a CPU"
    )
    parser.add_argument("--step", nargs="+", choices=PASSES, help="default: all; of --grid decode inference")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole run (default: %(default)s)")
    parser.add_argument(
        "--step-seconds", type=float, default=1.0, help="timing per case and step (default: %(default)s)"
    )
    parser.add_argument("--rounds", nargs=2, type=int, default=(5, 100), metavar=("LEAST", "MOST"))
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/layer.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    return parser


def _shape(text: str) -> tuple[int, int]:
    N, _, K = text.partition("x")
    return int(N), int(K)


if __name__ == "__main__":
    sys.exit(main())
