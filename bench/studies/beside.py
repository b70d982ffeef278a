"""Memory-bound work beside a GEMM that leaves it a few multiprocessors: by which mechanism, and what that saves.

The GEMM is dx = dy @ weight, beside which the backward pass has sums over dy and x to form. The work is a kernel that
reads, with a program a multiprocessor: it holds so much shared memory that no program of a GEMM fits in beside it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.lib.apart import Row
from bench.lib.measure import Step, interleave, stopwatch_of
from bench.lib.shapes import LayerCase
from bench.studies.gluon.candidates import SECONDS_EACH, Candidate, GemmInputs, sizes

BLOCK, STAGES = 16384, 6  # 32 KiB a block: 160 KiB of shared memory
# What it reads: dy alone, and dy with x or the saved base, at 8192 x 4096
WORK_MEBIBYTES = (64, 128)
# 1024 tiles of 128 x 256 take 8 waves on 128 multiprocessors as on 132
FEWER_PROGRAMS = 128


@triton.jit
def read_kernel(
    source_ptr,  # (blocks * BLOCK,) bf16, less than 2^31 of them
    sums_ptr,  # (programs,) float32
    blocks,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums = sums of the blocks that a program owns: each num_programs-th."""
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        acc += tl.load(source_ptr + block * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(acc))


def reader(source: Tensor, programs: int) -> Step:
    """A function that reads all of a bf16 tensor with so many programs, one a multiprocessor."""
    sums = torch.empty(programs, device=source.device)
    return lambda: read_kernel[(programs,)](source, sums, source.numel() // BLOCK, BLOCK, STAGES, num_warps=8)


@dataclass(frozen=True)
class Mechanism:
    """A way to leave `free` multiprocessors to the work: the GEMM, and the streams of the two (None: the current one,
    and one of high priority).
    """

    gemm: Step
    free: int = 4
    streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def alone(self) -> None:
        """The GEMM on its stream."""
        _forked([(self.streams[0] if self.streams else torch.cuda.current_stream(), self.gemm)])


def measure(mechanism: Mechanism, cublas: Step, source: Tensor, seconds: float) -> dict[str, Any]:
    """Microseconds of cuBLAS, of the work on all multiprocessors, of the one after the other and of both at once."""
    everywhere = reader(source, torch.cuda.get_device_properties(source.device).multi_processor_count)
    beside = reader(source, mechanism.free)
    main, side = mechanism.streams or (torch.cuda.current_stream(), torch.cuda.Stream(priority=-1))

    def in_turn() -> None:
        cublas()
        everywhere()

    steps = {
        "cublas": cublas,
        "work": everywhere,
        "in_turn": in_turn,
        "gemm": mechanism.alone,
        "beside": lambda: _forked([(side, beside)]),
        "both": lambda: _forked([(side, beside), (main, mechanism.gemm)]),  # the work first: it needs its place
    }
    timings = interleave(steps, stopwatch_of(source.device), seconds)
    us = {name: 1e3 * timing.median for name, timing in timings.items()}
    return {"mebibytes": source.nbytes >> 20, "free": mechanism.free, "us": us} | savings(us)


def savings(us: dict[str, float]) -> dict[str, float]:
    """The time saved by running both at once, over cuBLAS and then the work, and two shares.

    hidden: of the work's time, the part that is gone. overlapped: of the shorter of the two as they run here, the part
    that lies within the other; 1 where neither disturbs the other, which is of no use where both have become slow.
    """
    saved = us["in_turn"] - us["both"]
    overlapped = (us["gemm"] + us["beside"] - us["both"]) / min(us["gemm"], us["beside"])
    return {"saved_us": saved, "hidden": saved / us["work"], "overlapped": overlapped}


def _forked(branches: list[tuple[torch.cuda.Stream, Step]]) -> None:
    """Each step on its stream, begun when the current stream comes here, which goes on when all have ended."""
    current = torch.cuda.current_stream()
    for stream, step in branches:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
    for stream, _ in branches:
        current.wait_stream(stream)


def with_sm_target(gemm: Step, multiprocessors: int) -> Step:
    """The GEMM with cuBLAS told to aim at so many multiprocessors: a hint to its heuristics, set on torch's handle.

    Raises OSError or AttributeError where the library that torch has loaded is not found or has no such function.
    """
    torch.cuda.current_blas_handle()  # loads the library
    function = ctypes.CDLL(_loaded("libcublas.so")).cublasSetSmCountTarget

    def aim(count: int) -> None:
        status = function(ctypes.c_void_p(torch.cuda.current_blas_handle()), ctypes.c_int(count))
        if status:
            raise RuntimeError(f"cublasSetSmCountTarget({count}): status {status}")

    def step() -> None:
        aim(multiprocessors)
        gemm()
        aim(0)

    return step


def _loaded(name: str) -> str:
    """The path of a library in this process."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if pathlib.PurePath(path).name.startswith(name):
            return path
    raise OSError(f"{name} is not loaded")


@contextmanager
def sm_carveout(free: int) -> Iterator[None]:
    """Inside, torch's calls of cuBLASLt leave so many multiprocessors free; torch.mm is one of them. Experimental."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        torch._C._set_sm_carveout_experimental(free)
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
        torch.backends.cuda.preferred_blas_library(before)


def partitions(few: int = 8) -> tuple[torch.cuda.Stream, torch.cuda.Stream, int, int]:
    """(stream on all but `few` multiprocessors, stream on those, the two counts), by green contexts of one split.

    torch.cuda.green_contexts splits anew on every call, and two of its contexts share multiprocessors
    (https://github.com/pytorch/pytorch/issues/195378). Needs cuda-bindings. The contexts live as long as the process.
    """
    from cuda.bindings import driver

    def checked(result: tuple) -> Any:
        if int(result[0]):
            raise RuntimeError(f"green contexts: {result[0]!r}")
        return result[1] if len(result) == 2 else result[1:]

    torch.zeros(1, device="cuda")  # the primary context exists
    device = checked(driver.cuDeviceGet(torch.cuda.current_device()))
    whole = checked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    (small,), _, rest = checked(driver.cuDevSmResourceSplitByCount(1, whole, 0, few))
    least, greatest = checked(driver.cuCtxGetStreamPriorityRange())
    streams = []
    for part, priority in ((rest, least), (small, greatest)):
        descriptor = checked(driver.cuDevResourceGenerateDesc([part], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        green = checked(driver.cuGreenCtxCreate(descriptor, device, flags))
        non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = checked(driver.cuGreenCtxStreamCreate(green, non_blocking, priority))
        streams.append(torch.cuda.ExternalStream(int(stream)))
    return streams[0], streams[1], rest.sm.smCount, small.sm.smCount


def _own_gemm(inputs: GemmInputs, programs: int) -> Step:
    return Candidate("dx", programs).prepare(inputs)[0]


def _with_carveout(gemm: Step, free: int) -> Step:
    torch._C._set_sm_carveout_experimental  # noqa: B018 - missing, it is to be so before anything is timed

    def step() -> None:
        with sm_carveout(free):
            gemm()

    return step


def _in_partitions(gemm: Callable[[int], Step]) -> Mechanism:
    main, side, most, few = partitions()
    return Mechanism(gemm(most), few, (main, side))


# name -> the mechanism, from the inputs of dx and cuBLAS' call on them; own: with the GEMM of gluon/
MECHANISMS: dict[str, Callable[[GemmInputs, Step], Mechanism]] = {
    "cuBLAS, priority stream": lambda inputs, mm: Mechanism(mm),
    "own GEMM, 128 programs": lambda inputs, mm: Mechanism(_own_gemm(inputs, FEWER_PROGRAMS)),
    "cuBLAS, SM target 128": lambda inputs, mm: Mechanism(with_sm_target(mm, FEWER_PROGRAMS)),
    "cuBLASLt, carve-out of 4": lambda inputs, mm: Mechanism(_with_carveout(mm, 4)),
    "cuBLAS, green contexts": lambda inputs, mm: _in_partitions(lambda most: mm),
    "own GEMM, green contexts": lambda inputs, mm: _in_partitions(lambda most: _own_gemm(inputs, most)),
}


def measure_mechanism(name: str, case: LayerCase) -> Iterator[Row]:
    """A row for each amount of work."""
    try:
        mechanism, cublas = _prepared(name, case)
    except (ImportError, AttributeError, OSError) as error:  # a library or a function that is not there
        yield {"mechanism": name, "left_out": f"{type(error).__name__}: {error}"}
        return
    for mebibytes in WORK_MEBIBYTES:
        source = torch.randn(mebibytes << 19, device=case.device).bfloat16()
        yield {"mechanism": name, **sizes(case)} | measure(mechanism, cublas, source, SECONDS_EACH)


def launched_with(name: str, case: LayerCase) -> Iterator[Row]:
    """A row for the kernels that the GEMM is with this mechanism: not before all of them are timed (kernels_of)."""
    mechanism, _ = _prepared(name, case)
    yield {"mechanism": name, **sizes(case), "kernels": kernels_of(mechanism.alone)}


def _prepared(name: str, case: LayerCase) -> tuple[Mechanism, Step]:
    """The mechanism on random inputs of dx, and cuBLAS' call on them."""
    inputs = GemmInputs.random(case, nn=True)
    out = torch.empty(case.M, case.K, device=case.device, dtype=torch.bfloat16)
    cublas = functools.partial(torch.mm, inputs.x, inputs.weight, out=out)
    return MECHANISMS[name](inputs, cublas), cublas


def kernels_of(step: Step) -> list[dict[str, Any]]:
    """Name, grid and block of each kernel that a step launches: on how many multiprocessors a library wants to run.

    From torch.profiler's trace. After all timing, for it slows what comes after.
    """
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return kernels_in(json.loads(path.read_text()))


def kernels_in(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels of a trace, in order."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    events.sort(key=lambda event: event["ts"])
    return [{"name": event["name"], "grid": event["args"]["grid"], "block": event["args"]["block"]} for event in events]
