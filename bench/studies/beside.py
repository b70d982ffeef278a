"""The sums of a backward pass beside the GEMM of dx, which leaves them a few multiprocessors: how, and what that saves.

The sums are the package's own steps, launched by a Side (kernels/side.py): P and dA, the sums over the tokens, or all.
Each of their programs has a multiprocessor of its own; the mechanisms differ in how the GEMM is kept off those.
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
from unittest import mock

import torch
from torch import Tensor

from bench.kernels import KernelOperands
from bench.lib.apart import Row
from bench.lib.measure import Step, interleave, stopwatch_of
from bench.lib.problem import SCALING
from bench.lib.shapes import LayerCase
from bench.studies.gluon.candidates import Candidate, GemmInputs, sizes
from dora_kernels.kernels import KERNELS, side
from dora_kernels.kernels.side import Side
from dora_kernels.planning.measured import BESIDE
from dora_kernels.types import Prepared

# of BESIDE, what there is to hide
WORK = tuple(name for name, steps in BESIDE.items() if steps)
SECONDS_EACH = 0.5  # of one interleaved measurement
# 1024 tiles of 128 x 256 take 8 waves on 128 multiprocessors as on 132
FEWER_PROGRAMS = 128

Work = Callable[["Side | None"], dict[str, Tensor]]


def sums(operands: KernelOperands, names: tuple[str, ...], beside: Side | None = None) -> dict[str, Tensor]:
    """The results of the steps named, as a backward pass that has kept z makes them. beside: where they run."""
    o = operands
    counters = KERNELS.counters(o.dy, *o.weight.shape)
    prepared = Prepared(torch.empty_like(o.lora_B), 1.0, counters)
    KERNELS.prepare(prepared, o.lora_B, o.gain)
    of_sums, of_P, of_dA = (None, None, None) if counters is None else counters.unbind()
    results = {}
    if "token_sums" in names:
        dB, dmagnitude = results["dB"], results["dmagnitude"] = torch.empty_like(o.lora_B), torch.empty_like(o.norm)
        written = {"dB": dB, "dmagnitude": dmagnitude}
        KERNELS.token_sums(
            o.dy, o.low, SCALING, gain=o.gain, saved=o.base, norm=o.norm, counters=of_sums, side=beside, **written
        )
    if "project" in names:
        P = KERNELS.project(o.dy, prepared.scaled_B.mT, counters=of_P, as_factor=True, side=beside)
        results["dA"] = KERNELS.outer_product(P, o.x, SCALING, o.lora_A.dtype, counters=of_dA, side=beside)
    return results


@dataclass(frozen=True)
class Mechanism:
    """A way to leave a few multiprocessors to the sums: the GEMM, and the streams of the two (None: the current one,
    and that of the package's Side).
    """

    gemm: Step
    streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside, the current stream is the GEMM's, and a Side has the other one."""
        if self.streams is None:
            yield
            return
        before, (main, few) = torch.cuda.current_stream(), self.streams
        main.wait_stream(before)
        with torch.cuda.stream(main), mock.patch.dict(side._streams, {main: few}):
            yield
        before.wait_stream(main)

    def alone(self) -> None:
        """The GEMM on its stream."""
        with self._in_place():
            self.gemm()

    def both(self, work: Work, device: torch.device, gemm: bool = True) -> dict[str, Tensor]:
        """The sums on a Side and, behind them, the GEMM beside; without the GEMM, the sums there alone."""
        with self._in_place():
            beside = Side(device)
            results = work(beside)  # first: they need their place
            if gemm:
                self.gemm()
            beside.join()
        return results


def measure(mechanism: Mechanism, cublas: Step, work: Work, device: torch.device, seconds: float) -> Row:
    """Microseconds of cuBLAS, of the sums on all multiprocessors, of the one after the other and of both at once.

    Not ok where the sums have other bits beside the GEMM than alone.
    """

    def in_turn() -> None:
        cublas()
        work(None)

    alone = functools.partial(mechanism.both, work, device, gemm=False)
    both = functools.partial(mechanism.both, work, device)
    first, second = alone(), both()
    if not all(torch.equal(first[name], second[name]) for name in first):
        return {"ok": False, "reason": "the sums are not the same beside the GEMM"}
    steps = {
        "cublas": cublas,
        "work": functools.partial(work, None),
        "in_turn": in_turn,
        "gemm": mechanism.alone,
        "beside": alone,
        "both": both,
    }
    us = {name: 1e3 * timing.median for name, timing in interleave(steps, stopwatch_of(device), seconds).items()}
    return {"us": us} | savings(us)


def savings(us: dict[str, float]) -> dict[str, float]:
    """The time saved by running both at once, over cuBLAS and then the work, and two shares.

    hidden: of the work's time, the part that is gone. overlapped: of the shorter of the two as they run here, the part
    that lies within the other; 1 where neither disturbs the other, which is of no use where both have become slow.
    """
    saved = us["in_turn"] - us["both"]
    overlapped = (us["gemm"] + us["beside"] - us["both"]) / min(us["gemm"], us["beside"])
    return {"saved_us": saved, "hidden": saved / us["work"], "overlapped": overlapped}


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
    main, few, most, _ = partitions()
    return Mechanism(gemm(most), (main, few))


# name -> the mechanism, from the inputs of dx and cuBLAS' call on them; own: with the package's GEMM
MECHANISMS: dict[str, Callable[[GemmInputs, Step], Mechanism]] = {
    "cuBLAS, priority stream": lambda inputs, mm: Mechanism(mm),
    "own GEMM, 128 programs": lambda inputs, mm: Mechanism(_own_gemm(inputs, FEWER_PROGRAMS)),
    "cuBLAS, SM target 128": lambda inputs, mm: Mechanism(with_sm_target(mm, FEWER_PROGRAMS)),
    "cuBLASLt, carve-out of 4": lambda inputs, mm: Mechanism(_with_carveout(mm, 4)),
    "cuBLAS, green contexts": lambda inputs, mm: _in_partitions(lambda most: mm),
    "own GEMM, green contexts": lambda inputs, mm: _in_partitions(lambda most: _own_gemm(inputs, most)),
}


def measure_mechanism(name: str, case: LayerCase) -> Iterator[Row]:
    """A row for each of WORK."""
    try:
        mechanism, cublas = _prepared(name, case)
    except (ImportError, AttributeError, OSError) as error:  # a library or a function that is not there
        yield {"mechanism": name, "left_out": f"{type(error).__name__}: {error}"}
        return
    operands = KernelOperands.random(case)
    for what in WORK:
        work = functools.partial(sums, operands, BESIDE[what])
        measured = measure(mechanism, cublas, work, torch.device(case.device), SECONDS_EACH)
        yield {"mechanism": name, **sizes(case), "beside": what} | measured


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
