"""Facts of this machine and its card: versions, properties, roofs, the cost of a launch.

    PYTHONPATH=tools python -m gpu_stages.facts --out facts.json      # and roofline.json beside it

Each fact is a row; one that cannot be had says why, and the next one follows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.cache import triton_key

from bench.lib import machine, outputs, report, roof
from gpu_stages import card

DISTRIBUTIONS = (
    "torch", "triton", "numpy", "peft", "transformers", "accelerate", "bitsandbytes", "pytest", "pytest-xdist",
    "pytest-timeout", "nvidia-cublas", "nvidia-cuda-nvcc",
)  # fmt: skip
SMI = (
    "name", "driver_version", "persistence_mode", "compute_mode", "mig.mode.current", "clocks.max.sm",
    "clocks.max.mem", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "memory.total",
)  # fmt: skip
SMI_SECONDS = 6.0  # for asking field by field; without its persistence mode the driver starts anew for each
LAUNCHES = 100


@triton.jit
def _nothing_kernel(pointer, size, BLOCK: tl.constexpr):
    pass


def versions() -> dict[str, Any]:
    """Of everything that a result depends on; None where it is not installed."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda, "cores": os.cpu_count()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gcc() -> str:
    """The C compiler that Triton's launchers need: its first line."""
    done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def smi() -> dict[str, str]:
    """nvidia-smi: the card, its driver, its clocks and its power."""
    answers = card.query(*SMI)
    if answers:
        return dict(zip(SMI, answers, strict=True))
    end = time.monotonic() + SMI_SECONDS  # a driver that does not know one field refuses all
    return {field: ((card.query(field) if time.monotonic() < end else None) or ["-"])[0] for field in SMI}


def properties() -> dict[str, Any]:
    """All that torch tells of the device."""
    found = torch.cuda.get_device_properties("cuda")
    names = [name for name in dir(found) if not name.startswith("_")]
    return {name: value for name in names if isinstance(value := getattr(found, name), (int, float, str))}


def compiler() -> dict[str, str]:
    """The keys of a Triton cache: one made with another libtriton is never looked at."""
    library = next(Path(triton.__file__).parent.glob("_C/libtriton*.so"))
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    return {"libtriton": digest, "triton_key": hashlib.sha256(triton_key().encode()).hexdigest()}


def roofs() -> dict[str, Any]:
    """Copy bandwidth in bytes/s and the matmul rate of each dtype in FLOP/s, measured."""
    measured = roof.measure_roof(torch.device("cuda"))
    return {"bandwidth": measured.bandwidth, "matmul": measured.matmul}


def launch_cost() -> dict[str, float]:
    """Microseconds of the device for an empty kernel of a graph of LAUNCHES, and of the host for launching one."""
    tensor = torch.ones(16, device="cuda")

    def launch_all() -> None:
        for _ in range(LAUNCHES):
            _nothing_kernel[(1,)](tensor, 16, BLOCK=16)

    def torch_all() -> None:
        for _ in range(LAUNCHES):
            tensor.add_(1)

    found = {"triton_host_us": _host_us(launch_all), "torch_host_us": _host_us(torch_all)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_all()
    found["graph_us"] = _device_us(graph.replay)
    return found


def _host_us(call: Callable[[], None]) -> float:
    call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start) / LAUNCHES)
    return statistics.median(times)


def _device_us(call: Callable[[], None]) -> float:
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


FACTS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (versions, properties, compiler, gcc, roofs, launch_cost, smi)
}


@outputs.command("facts")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a fact could not be had, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("facts: torch sees no GPU; expected one", file=sys.stderr)
        return 2
    outputs.claim("facts", arguments.out, arguments.out.with_name("roofline.json"))
    rows: list[dict[str, Any]] = []
    for name, fact in FACTS.items():
        start = time.monotonic()
        try:
            row = {"fact": name, "ok": True, "value": fact()}
        except Exception as error:
            row = {"fact": name, "ok": False, "reason": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row | {"seconds": time.monotonic() - start})
        information = machine.meta(torch.device("cuda"), arguments.commit)
        report.write(arguments.out, information, rows)
        if name == "roofs" and row["ok"]:
            report.write(arguments.out.with_name("roofline.json"), information, roof.rows_of(roof.Roof(**row["value"])))
        print(f"{name}: {row.get('value', row.get('reason'))}", flush=True)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
