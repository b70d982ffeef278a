"""Each kernel alone, and the GEMM-library call that does the same work: time, rate, and percent of the measured roof.

    python -m bench.kernels                           # the default cases, into bench/results/<gpu>/kernels.json
    python -m bench.kernels --case 8192x14336x4096x384 8192x4096x4096x64:fp32 --precision bf16 bf16-fp32
    python -m bench.kernels --device cpu              # the reference, or Triton's interpreter: a check of the tool only

The roof is the larger of the bytes over the copy bandwidth and the FLOPs over the matmul rate, both measured first, in
the same process (or read from --roof). L2 is flushed before every run. project and the sums over the tokens are timed
with one more launch, which fills the counters that a backward pass has from its first kernel. A kernel is held to
float64 and then timed; one whose results are wrong has a row, and no time. A case with a precision of its own is not
repeated for --precision.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.lib import outputs
from bench.lib.machine import ROOT, conditions, device_folder, meta
from bench.lib.measure import Timing, interleave, stopwatch_of
from bench.lib.problem import SCALING
from bench.lib.report import write
from bench.lib.roof import DTYPES, Roof, floor_seconds, roof_for, work
from bench.lib.shapes import LayerCase, layer_names, sizes_of
from dora_kernels import gemm
from dora_kernels.planning import devices, plan
from dora_kernels.pytorch import PYTORCH
from dora_kernels.reference import accumulate_dtype
from dora_kernels.testing import WORST_RATIO, Comparison, compare
from dora_kernels.types import Steps

# M, N, K, R; what says most comes first
GPU_CASES = (
    (8192, 4096, 4096, 64),
    (8192, 14336, 4096, 384),
    (8192, 8192, 8192, 64),
    (8192, 8192, 8192, 384),
    (8192, 4096, 14336, 64),
    (2048, 4096, 4096, 16),
    (8192, 1024, 4096, 16),
)
CPU_CASES = ((64, 96, 128, 8),)
# Sums of thousands of float32 terms in another order than the reference's differ by about this; a bf16 result must
# come within WORST_RATIO of the reference's own rounding.
SUMMATION = 4e-6


@dataclass
class KernelOperands:
    """Random tensors of one case, for the kernels and for their checks."""

    x: Tensor  # (M, K)
    weight: Tensor  # (N, K)
    lora_A: Tensor  # (R, K)
    lora_B: Tensor  # (N, R)
    dy: Tensor  # (M, N)
    base: Tensor  # (M, N)
    low: Tensor  # (M, R)
    projected: Tensor  # (M, R)
    gain: Tensor  # (N,)
    norm: Tensor  # (N,)
    bias: Tensor  # (N,)
    scaled_B: Tensor  # (N, R), gain * lora_B

    @classmethod
    def random(cls, case: LayerCase, seed: int = 0) -> KernelOperands:
        """The update scaling * B @ A is about a tenth of the weight; gain and norm are spread over 0.5 to 1.5."""
        dtype, operand = DTYPES[case.precision]
        M, N, K, R = case.M, case.N, case.K, case.R
        generator = None if case.device == "meta" else torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=case.device, generator=generator).mul_(size).to(dtype)

        def spread() -> Tensor:
            return 0.5 + torch.rand(N, device=case.device, generator=generator, dtype=accumulate_dtype(dtype))

        lora_B, gain = normal(N, R, size=0.1 * R**-0.5, dtype=operand), spread()
        return cls(
            x=normal(M, K),
            weight=normal(N, K, size=K**-0.5),
            lora_A=normal(R, K, size=K**-0.5, dtype=operand),
            lora_B=lora_B,
            dy=normal(M, N),
            base=normal(M, N),
            low=normal(M, R, dtype=operand),
            projected=normal(M, R, dtype=operand),
            gain=gain,
            norm=spread(),
            bias=normal(N),
            scaled_B=(gain[:, None] * lora_B).to(operand),
        )

    def double(self) -> KernelOperands:
        """The same numbers in float64."""
        return KernelOperands(**{name: tensor.double() for name, tensor in vars(self).items()})


def _token_sums(o: KernelOperands, steps: Steps) -> dict[str, Tensor]:
    dB, dmagnitude, dbias = torch.empty_like(o.lora_B), torch.empty_like(o.norm), torch.empty_like(o.bias)
    given = {"gain": o.gain, "saved": o.base, "norm": o.norm, "lora_B": o.lora_B}
    steps.token_sums(o.dy, o.low, SCALING, dB=dB, dmagnitude=dmagnitude, dbias=dbias, **given)
    return {"dB": dB, "dmagnitude": dmagnitude, "dbias": dbias}


def _column_sums(o: KernelOperands, steps: Steps) -> dict[str, Tensor]:
    """The sums beside dB: all that the kernel forms where dB is a product of the library (plan.outer_by_kernel)."""
    dmagnitude, dbias = torch.empty_like(o.norm), torch.empty_like(o.bias)
    steps.token_sums(o.dy, None, SCALING, gain=o.gain, saved=o.base, norm=o.norm, dmagnitude=dmagnitude, dbias=dbias)
    return {"dmagnitude": dmagnitude, "dbias": dbias}


def _project(o: KernelOperands, steps: Steps) -> dict[str, Tensor]:
    """P as a backward pass makes it: with counters, in parts where these fill the device."""
    counters = torch.zeros(len(o.dy), dtype=torch.int32, device=o.dy.device)
    return {"P": steps.project(o.dy, o.scaled_B.T, counters=counters)}


def _norm(o: KernelOperands, steps: Steps) -> dict[str, Tensor]:
    """norm and gain of one call alone; and the norm as a layer begins it, whose next step takes the root."""
    norm, gain = steps.norm(o.weight, o.lora_A, o.lora_B, SCALING, o.norm)
    begun, _, unfinished = steps.start_norm(o.weight, o.lora_A, o.lora_B, SCALING, o.norm)
    return {"norm": norm, "gain": gain, "begun": begun if unfinished is None else unfinished.squares.sum(0).sqrt()}


CALLS: dict[str, Callable[[KernelOperands, Steps], dict[str, Tensor]]] = {
    "norm": _norm,
    "merge": lambda o, steps: {"merged": steps.merge(o.weight, o.lora_A, o.lora_B, o.gain, SCALING)},
    "low": lambda o, steps: {"low": steps.project(o.x, o.lora_A)},
    "project": _project,
    "epilogue": lambda o, steps: {"y": steps.epilogue(o.base, o.low, o.lora_B, o.gain, o.bias, SCALING, o.base.dtype)},
    "token_sums": _token_sums,
    "column_sums": _column_sums,
    "outer_product": lambda o, steps: {"dA": steps.outer_product(o.projected, o.x, SCALING, o.lora_A.dtype)},
}
# What is timed, where that is less than what is checked: what a layer launches.
TIMED: dict[str, Callable[[KernelOperands, Steps], object]] = CALLS | {
    "norm": lambda o, steps: steps.start_norm(o.weight, o.lora_A, o.lora_B, SCALING, o.norm)
}
# The nearest calls of PyTorch. Without gain or bias, and over several passes, they do less or other work than the
# kernels: a yardstick of speed, checked for nothing. The base GEMM and dx are what the frozen layer takes.
LIBRARY: dict[str, Callable[[KernelOperands], Tensor]] = {
    "norm": lambda o: torch.linalg.vector_norm(_added(o), dim=1, dtype=o.norm.dtype),
    "merge": lambda o: _added(o),
    "low": lambda o: o.x.to(o.lora_A.dtype) @ o.lora_A.T,
    "project": lambda o: gemm.project(o.dy, o.scaled_B.T),
    "epilogue": lambda o: torch.addmm(o.base, o.low.to(o.base.dtype), o.lora_B.T.to(o.base.dtype), alpha=SCALING),
    "token_sums": lambda o: o.dy.T.to(o.low.dtype) @ o.low,
    "column_sums": lambda o: torch.sum(o.dy * o.base, dim=0, dtype=o.norm.dtype),
    "outer_product": lambda o: o.projected.T @ o.x.to(o.projected.dtype),
    "base": lambda o: o.x @ o.weight.T,
    "dx": lambda o: o.dy @ o.weight,
}

# What these calls do is less than the kernel of that name does: of bench.lib.roof.work
LIBRARY_WORK = {"token_sums": "dB"}


def _added(o: KernelOperands) -> Tensor:
    dtype = o.weight.dtype
    return torch.addmm(o.weight, o.lora_B.to(dtype), o.lora_A.to(dtype), alpha=SCALING)


@contextlib.contextmanager
def every_call_by_kernel() -> Iterator[None]:
    """Inside, the launchers never hand a product to the GEMM library."""
    with (
        mock.patch.object(plan, "project_by_kernel", lambda *args, **kwargs: True),
        mock.patch.object(plan, "outer_by_kernel", lambda *args, **kwargs: True),
    ):
        yield


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, torch.empty is full of NaN: what a kernel leaves unwritten does not look like an earlier result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Checker:
    """Holds kernels to the reference: float64 is exact, the reference in the case's own dtypes is the yardstick."""

    def __init__(self, operands: KernelOperands) -> None:
        self.operands = operands
        self._double: KernelOperands | None = None
        self._known: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def comparisons(self, kernel: str, steps: Steps) -> list[Comparison]:
        """Each tensor that the kernel writes."""
        if kernel not in self._known:
            self._double = self._double or self.operands.double()
            self._known[kernel] = CALLS[kernel](self.operands, PYTORCH), CALLS[kernel](self._double, PYTORCH)
        yardstick, exact = self._known[kernel]
        with _poisoned():
            results = CALLS[kernel](self.operands, steps)
        return [compare(name, result, yardstick[name], exact[name]) for name, result in results.items()]


def failure(comparisons: Iterable[Comparison]) -> str | None:
    """The errors above the bound, as one line, or None. NaN is never within the bound."""
    bad = [c for c in comparisons if not c.error <= WORST_RATIO * c.yardstick + SUMMATION]
    return "; ".join(f"{c.name}: error {c.error:.2e}, yardstick {c.yardstick:.2e}" for c in bad) or None


def steps_for(case: LayerCase) -> tuple[Steps, str]:
    """(KERNELS, "triton") where the kernels can take the case on its device, else (PYTORCH, "reference")."""
    if devices.why_not_triton(torch.device(case.device), DTYPES[case.precision]):
        return PYTORCH, "reference"
    from dora_kernels.kernels import KERNELS

    return KERNELS, "triton"


def measure_case(
    case: LayerCase,
    roof: Roof,
    names: Sequence[str] = tuple(LIBRARY),
    by: Sequence[str] = ("kernel", "library"),
    seconds: float = 1.0,
    rounds: tuple[int, int] = (10, 50),
) -> list[dict[str, Any]]:
    """A row per kernel and per library call of that work. What raises or is wrong says so and is not timed."""
    device = torch.device(case.device)
    operands = KernelOperands.random(case)
    checker = Checker(operands)
    steps, backend = steps_for(case)
    base, operand = DTYPES[case.precision]
    rows, calls = {}, {}
    with every_call_by_kernel():
        for who, kernel in ((who, name) for name in names for who in by):
            if kernel not in (CALLS if who == "kernel" else LIBRARY):
                continue
            key = f"{who} {kernel}"
            rows[key] = row = _row(kernel, who, backend if who == "kernel" else "torch", case)
            try:
                if who == "kernel":
                    comparisons = checker.comparisons(kernel, steps)
                    row["errors"] = {c.name: {"error": c.error, "yardstick": c.yardstick} for c in comparisons}
                    row["reason"] = failure(comparisons)
                    call = functools.partial(TIMED[kernel], operands, steps)
                else:
                    call = functools.partial(LIBRARY[kernel], operands)
                    call()
            except Exception as error:  # a kernel that cannot do a case is a result, not the end
                row["reason"] = f"{type(error).__name__}: {error}"[:500]
            row["ok"] = row["reason"] is None
            if row["ok"]:
                calls[key] = call
        checker = None  # the float64 copies: gigabytes
        for key, timing in interleave(calls, stopwatch_of(device), seconds, rounds).items():
            precision = devices.dot_precision(devices.device_facts(device), operand, base)
            row = rows[key]
            done = LIBRARY_WORK.get(row["kernel"]) if row["by"] == "library" else None
            row |= figures(done or row["kernel"], case, timing, roof, precision)
    return list(rows.values())


def figures(kernel: str, case: LayerCase, timing: Timing, roof: Roof, precision: str = "ieee") -> dict[str, Any]:
    """The numbers of a row: time, bytes and FLOPs, both rates, and the percent of the roof reached."""
    seconds, done = 1e-3 * timing.median, work(kernel, case)
    floor, bound = floor_seconds(kernel, case, roof, precision)
    return {
        "ms": asdict(timing),
        "bytes": done.bytes,
        "flops": done.flops,
        "bound": bound,
        "gigabytes_per_second": 1e-9 * done.bytes / seconds,
        "teraflops": 1e-12 * done.flops / seconds,
        "percent_of_roof": 100 * floor / seconds,
    }


def _row(kernel: str, by: str, backend: str, case: LayerCase) -> dict[str, Any]:
    shape = {"M": case.M, "N": case.N, "K": case.K, "R": case.R, "precision": case.precision}
    row = {"kernel": kernel, "by": by, "backend": backend, "layers": layer_names(case.N, case.K)} | shape
    return row | {"ok": False, "reason": None, "errors": {}, "ms": None}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A line per row: microseconds, both rates, percent of the roof."""
    lines = [("kernel", "by", "M", "N", "K", "R", "precision", "us", "GB/s", "TFLOP/s", "bound", "% roof")]
    for row in rows:
        shape = [str(row[name]) for name in ("kernel", "by", "M", "N", "K", "R", "precision")]
        if row["ms"] is None:
            lines.append((*shape, "-", "-", "-", "-", (row["reason"] or "-")[:80]))
            continue
        rates = [f"{row['gigabytes_per_second']:.0f}", f"{row['teraflops']:.1f}", row["bound"]]
        lines.append((*shape, f"{1e3 * row['ms']['median']:.1f}", *rates, f"{row['percent_of_roof']:.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@outputs.command("bench.kernels")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a kernel was wrong or raised, 2 where the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--case", nargs="+", type=_case, metavar="MxNxKxR[:PRECISION]")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--kernel", nargs="+", choices=LIBRARY, default=list(LIBRARY))
    parser.add_argument("--seconds", type=float, default=120, help="for the whole run (default: %(default)s)")
    parser.add_argument("--case-seconds", type=float, default=1.0, help="timing per case (default: %(default)s)")
    parser.add_argument("--roof", type=pathlib.Path, help="a roofline.json of this card, in place of measuring it")
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/kernels.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    there = torch.cuda.is_available()
    device = torch.device("cuda" if there and arguments.device != "cpu" else "cpu")
    if arguments.device == "cuda" and not there:
        print("bench.kernels: --device cuda but torch sees no GPU; expected a GPU, or --device cpu", file=sys.stderr)
        return 2
    gpu = device.type == "cuda"
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / "kernels.json"
    outputs.claim("bench.kernels", out)
    end = time.monotonic() + arguments.seconds
    roof = roof_for(device, arguments.roof, None if gpu else (64 << 20, 512, 5))
    cases = cases_of(arguments.case or [(sizes, None) for sizes in GPU_CASES if gpu], arguments.precision, device.type)
    information, rows = meta(device, arguments.commit) | {"roof": asdict(roof), "conditions": {}}, []
    for done, case in enumerate(cases, start=1):
        if time.monotonic() >= end:
            print(f"out of time, left out: {'; '.join(map(str, cases[done - 1 :]))}", flush=True)
            break
        print(case, flush=True)
        rows += measure_case(case, roof, arguments.kernel, seconds=arguments.case_seconds)
        if gpu:
            information["conditions"][str(case)] = conditions(device)
        write(out, information | {"left_out": [str(left) for left in cases[done:]]}, rows)
    print(information["device"])
    print(table(rows))
    return 0 if all(row["ok"] for row in rows) else 1


Sizes = tuple[tuple[int, int, int, int], "str | None"]


def cases_of(asked: Sequence[Sizes], precisions: Sequence[str], device: str) -> list[LayerCase]:
    """Those without a precision once for each of `precisions`, precisions changing slowest; then those with their own.

    The CPU's where none is asked for.
    """
    asked = asked or [(sizes, None) for sizes in CPU_CASES]
    cases = [LayerCase(*sizes, name, device) for name in precisions for sizes, own in asked if own is None]
    return cases + [LayerCase(*sizes, own, device) for sizes, own in asked if own is not None]


def _case(text: str) -> Sizes:
    sizes, precision = sizes_of(text)
    if precision not in (None, *DTYPES):
        raise ValueError
    return sizes, precision


if __name__ == "__main__":
    sys.exit(main())
