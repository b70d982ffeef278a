"""The measurements that decide how the package is built, in order of worth; one short run answers all of them.

    python -m bench.studies.decisive                                  # into bench/results/<gpu>/decisive.json
    python -m bench.studies.decisive --section host_cost cublas_gemms

Each section is a function from a Bench to rows. One that raises leaves a row that says so, and the next one runs; the
file is complete after every section. Every kernel alone, against the roof: bench.kernels.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import dora_kernels
from bench import kernels
from bench.lib import outputs
from bench.lib.machine import ROOT, conditions, device_folder, meta
from bench.lib.measure import capture
from bench.lib.problem import SCALING
from bench.lib.report import write
from bench.lib.roof import Roof, median_ms, roof_for
from bench.lib.shapes import LayerCase
from dora_kernels.planning import costs, devices, measured, plan

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The device with its roof. small: sizes for a check of the code on a CPU."""

    device: torch.device
    roof: Roof
    small: bool = False

    def case(self, M: int, N: int, K: int, R: int, precision: str = "bf16") -> LayerCase:
        """The case on this device; where small, at most 256 tokens and features and rank 32."""
        sizes = (min(M, 256), min(N, 256), min(K, 256), min(R, 32)) if self.small else (M, N, K, R)
        return LayerCase(*sizes, precision, self.device.type)

    def rows(self, case: LayerCase, *names: str, by: Sequence[str] = ("kernel", "library")) -> list[Row]:
        """The kernels and library calls of these names at one case."""
        return kernels.measure_case(case, self.roof, names, by, seconds=0.5)

    def ms(self, step: Callable[[], object]) -> float:
        """Median milliseconds of eager calls."""
        return median_ms(step, self.device, 5 if self.small else 30)

    def graph_ms(self, step: Callable[[], dict[str, Tensor]]) -> float:
        """Median milliseconds of replays of a CUDA graph: no host time."""
        if self.device.type != "cuda":
            return self.ms(step)
        graph, _ = capture(step, torch.cuda.graph_pool_handle())
        return self.ms(graph.replay)


def cublas_gemms(bench: Bench) -> list[Row]:
    """Base, dx and the skinny products of the vendor's library: what a kernel has to beat."""
    rows = []
    for sizes in ((8192, 4096, 4096, 64), (8192, 14336, 4096, 384), (8192, 8192, 8192, 64), (512, 4096, 4096, 64)):
        names = ("base", "dx", "low", "project", "token_sums", "outer_product")
        rows += bench.rows(bench.case(*sizes), *names, by=("library",))
    for R in (8, 16, 128):
        case = bench.case(8192, 4096, 4096, R)
        rows += bench.rows(case, "low", "project", "token_sums", "outer_product", by=("library",))
    return rows


def merge_at_high_rank(bench: Bench) -> list[Row]:
    """At R = 384: addmm, and addmm with a pass for the norm, against our merge and our norm."""
    cases = ((8192, 4096, 4096, 384), (8192, 8192, 8192, 384), (8192, 14336, 4096, 384))
    return [row for sizes in cases for row in bench.rows(bench.case(*sizes), "merge", "norm")]


def norm_of_float32_adapters(bench: Bench) -> list[Row]:
    """float32 adapters over a bf16 weight: bf16x6 ("highest") and bf16x3 ("high"), with the error of each."""
    rows, before = [], torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            facts = devices.device_facts(bench.device)
            precision = devices.dot_precision(facts, torch.float32, torch.bfloat16)
            for R in (64, 384):
                case = bench.case(8192, 8192, 8192, R, "bf16-fp32")
                rows += [row | {"dot_precision": precision} for row in bench.rows(case, "norm", by=("kernel",))]
    finally:
        torch.set_float32_matmul_precision(before)
    return rows


@triton.jit
def _touch_kernel(pointer, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(pointer + offsets, tl.load(pointer + offsets) + 1)


def host_cost(bench: Bench) -> list[Row]:
    """Microseconds of the host per call, while the device keeps up: one launch, one torch op, one layer of ours."""
    tensor = torch.ones(16, device=bench.device)
    o = kernels.KernelOperands.random(bench.case(16, 256, 256, 16))
    steps, backend = kernels.steps_for(bench.case(16, 256, 256, 16))
    magnitude = o.norm.to(o.lora_A.dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (o.x, o.lora_A, o.lora_B, magnitude)]

    def layer() -> Tensor:
        x, lora_A, lora_B, trained = leaves
        return dora_kernels.dora_linear(x, o.weight, lora_A, lora_B, trained, SCALING)

    def inference() -> Tensor:
        with torch.no_grad():
            return layer()

    calls: dict[str, Callable[[], object]] = {
        "one torch op (add_)": lambda: tensor.add_(1),
        "one small GEMM": lambda: torch.mm(o.x, o.weight.T),
        "norm launcher (two launches)": lambda: steps.norm(o.weight, o.lora_A, o.lora_B, SCALING, o.norm),
        "layer, no_grad": inference,
        "layer, forward": layer,
        "layer, forward+backward": lambda: torch.autograd.grad(layer(), leaves, o.dy),
    }
    if backend == "triton":
        calls = {"one Triton launch": lambda: _touch_kernel[(1,)](tensor, BLOCK=16)} | calls
    return [{"call": name, "us": _host_us(call, bench)} for name, call in calls.items()]


def _host_us(call: Callable[[], object], bench: Bench) -> float:
    """The median of five loops of 100 calls (the launch queue holds 1024), each started on an idle device."""
    repeats = 2 if bench.small else 100
    call()
    times = []
    for _ in range(5):
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append(1e6 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)


def merged_against_split(bench: Bench) -> list[Row]:
    """The forward pass without gradients each way, as a CUDA graph, over M; and which way the planner takes there."""
    rows = []
    facts = devices.device_facts(bench.device)
    for N, K, R in ((4096, 4096, 64), (14336, 4096, 384)):
        for M in (1, 16, 128, 512, 2048, 8192) if not bench.small else (16,):
            case = bench.case(M, N, K, R)
            o = kernels.KernelOperands.random(case)
            magnitude = o.norm.to(o.lora_A.dtype)
            ms = {"frozen": bench.graph_ms(lambda o=o: {"y": o.x @ o.weight.T})}
            for way in ("split", "merged"):

                def forward(o: kernels.KernelOperands = o, magnitude: Tensor = magnitude) -> dict[str, Tensor]:
                    y = dora_kernels.dora_linear(o.x, o.weight, o.lora_A, o.lora_B, magnitude, SCALING)
                    return {"y": y}

                with torch.no_grad(), dora_kernels.options(way=way):
                    ms[way] = bench.graph_ms(forward)
            shape = costs.Shape.of(o.x, o.weight, o.lora_A)
            asks = {"needs_base": False, "adapters_are_wider": False}
            table = measured.table_of(facts.name)
            planner = plan.forward_way("auto", False, shape, costs.device_model(facts), table, **asks)
            rows.append({"M": case.M, "N": case.N, "K": case.K, "R": case.R, "ms": ms, "planner": planner})
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    section.__name__: section
    for section in (
        host_cost,
        merged_against_split,
        cublas_gemms,
        merge_at_high_rank,
        norm_of_float32_adapters,
    )
}


def run(
    bench: Bench,
    out: pathlib.Path,
    information: dict[str, Any],
    seconds: float,
    sections: dict[str, Callable[[Bench], list[Row]]] = SECTIONS,
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """The sections in order into `out`, written after each; once `seconds` are over the rest is left out.

    meta has the device's conditions at the end of each section.
    """
    information = information | {"conditions": {}}
    end, rows, names = clock() + seconds, [], list(sections)
    for place, name in enumerate(names):
        if clock() >= end:
            print(f"out of time, left out: {', '.join(names[place:])}", flush=True)
            break
        start = clock()
        try:
            found = sections[name](bench)
        except Exception as error:  # one refusal must not cost the other answers
            found = [{"ok": False, "reason": f"{type(error).__name__}: {error}"[:500]}]
        rows += [{"section": name, "ok": True} | row for row in found]
        print(f"{name}: {len(found)} rows in {clock() - start:.0f} s", flush=True)
        if bench.device.type == "cuda":
            information["conditions"][name] = conditions(bench.device)
        write(out, information | {"left_out": names[place + 1 :]}, rows)
    return rows


@outputs.command("bench.studies.decisive")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a row is not ok, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.decisive", description=__doc__.splitlines()[0])
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=120, help="for the whole run (default: %(default)s)")
    parser.add_argument("--roof", type=pathlib.Path, help="a roofline.json of this card, in place of measuring it")
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/decisive.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU: a check of the code")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.small:
        print("bench.studies.decisive: torch sees no GPU; expected one, or --small", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.small else "cuda")
    roof = roof_for(device, arguments.roof, (1 << 20, 64, 3) if arguments.small else None)
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / "decisive.json"
    outputs.claim("bench.studies.decisive", out)
    information = meta(device, arguments.commit) | {"roof": asdict(roof)}
    sections = {name: SECTIONS[name] for name in SECTIONS if name in arguments.section}
    rows = run(Bench(device, roof, arguments.small), out, information, arguments.seconds, sections)
    print(information["device"])
    print(kernels.table([row for row in rows if "kernel" in row]))
    for row in rows:
        if "kernel" not in row:
            print(*(f"{name}={_short(value)}" for name, value in row.items()))
    return 0 if all(row["ok"] for row in rows) else 1


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(item)}" for name, item in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
