"""The roofs of a machine, measured, and the time that a kernel would take at them.

The roof of a kernel is the larger of its bytes over the copy bandwidth and its FLOPs over the matmul rate.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.measure import FLUSH_BYTES, CudaStopwatch, cpu_stopwatch
from bench.shapes import Case
from dora_kernels import plan

# name -> dtype of x and weight, dtype of the low-rank operands
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
COPY_BYTES = 2 << 30
ROOF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Roof:
    """What the device did in this run: bytes/s of a copy (read and written), FLOP/s of a square matmul by dtype."""

    bandwidth: float
    matmul: dict[str, float]


def stopwatch_of(device: torch.device) -> Callable[[Callable[[], object]], Callable[[], float]]:
    """bench.measure's stopwatch for the device; on a GPU with a second flush ahead of it.

    The fills take the device about 150 us, in which the host gets a kernel of two launches (40 us) on the queue, so
    that the time between the events is the kernel's.
    """
    if device.type != "cuda":
        return cpu_stopwatch
    stopwatch, ahead = CudaStopwatch(device), torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def start(step: Callable[[], object]) -> Callable[[], float]:
        ahead.zero_()
        return stopwatch(step)

    return start


def median_ms(step: Callable[[], object], device: torch.device, runs: int) -> float:
    """The median of `runs` timed runs after three warm-ups, in milliseconds."""
    stopwatch = stopwatch_of(device)
    for _ in range(3):
        step()
    readings = [stopwatch(step) for _ in range(runs)]
    return statistics.median(reading() for reading in readings)


def measure_roof(
    device: torch.device,
    copy_bytes: int = COPY_BYTES,
    size: int = 8192,
    runs: int = 20,
    dtypes: dict[str, torch.dtype] = ROOF_DTYPES,
) -> Roof:
    """The copy bandwidth and the matmul rates (size^3), on random data: a product of zeros is 13% faster on an H200."""
    source = torch.empty(copy_bytes // 2, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    copy = median_ms(functools.partial(target.copy_, source), device, runs)
    del source, target
    matmul = {}
    for name, dtype in dtypes.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        ms = median_ms(functools.partial(torch.mm, left, right, out=out), device, runs)
        matmul[name] = 2 * size**3 / (1e-3 * ms)
    return Roof(2 * copy_bytes / (1e-3 * copy), matmul)


@dataclass(frozen=True)
class Work:
    """The fewest bytes that a kernel must move (inputs read once, outputs written once), and its FLOPs."""

    bytes: float
    flops: float


def shape_of(case: Case) -> plan.Shape:
    """The case as plan.py sees it."""
    return plan.Shape(case.M, case.N, case.K, case.R, DTYPES[case.precision][0].itemsize)


def plan_step(kernel: str, case: Case) -> plan.Step:
    """What plan.py counts for a kernel of bench.kernels: the elements of the main tensors, FLOPs and launches."""
    shape = shape_of(case)
    steps = plan.forward_steps(shape, "split") | plan.backward_steps(shape, "merged")
    return steps[{"project": "P", "outer_product": "dA"}.get(kernel, kernel)]


def work(kernel: str, case: Case) -> Work:
    """The main tensors and the FLOPs as plan.py counts them, and the low-rank operands beside them."""
    operand = DTYPES[case.precision][1]
    M, N, K = case.M, case.N, case.K
    rows = {
        "norm": N + K,
        "merge": N + K,
        "low": M + K,
        "project": M + N,
        "epilogue": M + N,
        "token_sums": M + N,
        "outer_product": M + K,
        "base": 0,
        "dx": 0,
    }[kernel]
    step = plan_step(kernel, case)
    return Work(step.bytes(shape_of(case)) + case.R * rows * operand.itemsize, step.flops)


def floor_seconds(kernel: str, case: Case, roof: Roof, precision: str = "ieee") -> tuple[float, str]:
    """(seconds at the roof, "bytes" or "flops"). precision: of the dots (launch.dot_precision)."""
    base, operand = DTYPES[case.precision]
    done = work(kernel, case)
    names = {dtype: name for name, dtype in ROOF_DTYPES.items()}
    if kernel in ("base", "dx") or operand != torch.float32 or precision == "ieee":
        rate = roof.matmul[names[base if kernel in ("base", "dx") else operand]]
    else:  # so many half-precision products for one float32 product; TF32 runs at half the rate of bf16
        rate = roof.matmul["bf16"] / {"bf16x3": 3, "bf16x6": 6, "tf32x3": 6}[precision]
    by_bytes, by_flops = done.bytes / roof.bandwidth, done.flops / rate
    return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "flops"
