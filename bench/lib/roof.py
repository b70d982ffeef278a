"""The roofs of a machine, measured, and the time that a kernel would take at them.

The roof of a kernel is the larger of its bytes over the copy bandwidth and its FLOPs over the matmul rate.
"""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.lib.measure import stopwatch_of
from bench.lib.shapes import LayerCase
from dora_kernels.planning import costs

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
    """The rates measured in this run: bytes/s of a copy (read and written), FLOP/s of a square matmul by dtype."""

    bandwidth: float
    matmul: dict[str, float]


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


def rows_of(measured: Roof) -> list[dict[str, Any]]:
    """The rows of roofline.json: what, dtype, value, unit."""
    copy = {"what": "copy", "dtype": None, "value": measured.bandwidth, "unit": "bytes/s"}
    return [copy] + [
        {"what": "matmul", "dtype": dtype, "value": rate, "unit": "FLOP/s"} for dtype, rate in measured.matmul.items()
    ]


def read_roof(path: pathlib.Path) -> Roof:
    """The roof in a roofline.json (tools/roofline.py); ValueError where the file is no such thing."""
    try:
        rows = json.loads(path.read_text())["rows"]
        values = {(row["what"], row["dtype"]): float(row["value"]) for row in rows}
        return Roof(values["copy", None], {name: values["matmul", name] for name in ROOF_DTYPES})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"read_roof: {path}: {error!r}; expected what tools/roofline.py writes") from error


def roof_for(device: torch.device, path: pathlib.Path | None, small: tuple[int, int, int] | None = None) -> Roof:
    """The roof in `path`, measured before on this very device; measured now where there is no good file.

    small: copy_bytes, size and runs of measure_roof where it need not be right.
    """
    if path is not None:
        try:
            return read_roof(path)
        except ValueError as error:  # the measurements must not end here
            print(f"{error}; measured again", flush=True)
    return measure_roof(device, *small) if small else measure_roof(device)


# these have counters from the backward pass in a layer, and by themselves fill some (bench.kernels)
COUNTING = ("project", "token_sums", "column_sums", "outer_product")


@dataclass(frozen=True)
class Work:
    """The fewest bytes that a kernel must move (inputs read once, outputs written once), and its FLOPs."""

    bytes: float
    flops: float


def shape_of(case: LayerCase) -> costs.Shape:
    """The case as costs.py sees it."""
    return costs.Shape(case.M, case.N, case.K, case.R, DTYPES[case.precision][0].itemsize)


def planned_cost(
    kernel: str, case: LayerCase, device: costs.Device = costs.DEVICES["NVIDIA H200"], by: str = "kernel"
) -> costs.Cost:
    """The cost that costs.py counts for a kernel of bench.kernels.

    token_sums: with dB among them, at any rank; column_sums: without. by: whose low and outer_product, "library" or
    "kernel"; base, dx and "dB" alone are the library's. device: whose tiles; the elements of the main tensors and the
    FLOPs are the same on all. Our kernels that count their programs are launched with a fill of the counters.
    """
    shape = shape_of(case)
    M, N, K = shape[:3]
    cost_of: dict[str, Callable[[], costs.Cost]] = {
        "norm": lambda: costs.norm_cost(shape, device),
        "merge": lambda: costs.merge_cost(shape, device),
        "low": lambda: costs.project_costs(shape, "low", device)[by]["low"],
        "project": lambda: costs.project_costs(shape, "P", device)["kernel"]["P"],
        "epilogue": lambda: costs.epilogue_cost(shape, device),
        "token_sums": lambda: costs.outer_costs(shape, "dB", device)["kernel"]["token_sums"],
        "column_sums": lambda: costs.outer_costs(shape, "dB", device)["library"]["token_sums"],
        "dB": lambda: costs.outer_costs(shape, "dB", device)["library"]["dB"],
        "outer_product": lambda: costs.outer_costs(shape, "dA", device)[by]["dA"],
        "base": lambda: costs.gemm(M, N, K, device),
        "dx": lambda: costs.gemm(M, K, N, device),
    }
    cost = cost_of[kernel]()
    return cost._replace(launches=cost.launches + (by == "kernel" and kernel in COUNTING))


def work(kernel: str, case: LayerCase) -> Work:
    """The main tensors and the FLOPs as costs.py counts them, and the low-rank operands beside them."""
    operand = DTYPES[case.precision][1]
    M, N, K = case.M, case.N, case.K
    rows = {
        "norm": N + K,
        "merge": N + K,
        "low": M + K,
        "project": M + N,
        "epilogue": M + N,
        "token_sums": M + N,
        "column_sums": 0,
        "dB": M + N,
        "outer_product": M + K,
        "base": 0,
        "dx": 0,
    }[kernel]
    cost = planned_cost(kernel, case)._replace(again=0)
    return Work(cost.bytes(shape_of(case)) + case.R * rows * operand.itemsize, cost.flops)


def floor_seconds(kernel: str, case: LayerCase, roof: Roof, precision: str = "ieee") -> tuple[float, str]:
    """(seconds at the roof, "bytes" or "flops"). precision: of the dots (devices.dot_precision)."""
    base, operand = DTYPES[case.precision]
    done = work(kernel, case)
    names = {dtype: name for name, dtype in ROOF_DTYPES.items()}
    if kernel in ("base", "dx") or operand != torch.float32 or precision == "ieee":
        rate = roof.matmul[names[base if kernel in ("base", "dx") else operand]]
    else:  # so many half-precision products for one float32 product; TF32 runs at half the rate of bf16
        rate = roof.matmul["bf16"] / {"bf16x3": 3, "bf16x6": 6, "tf32x3": 6}[precision]
    by_bytes, by_flops = done.bytes / roof.bandwidth, done.flops / rate
    return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "flops"
