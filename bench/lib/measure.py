"""The instrument: the correctness gate, interleaved timing, memory, and the host's part."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.lib.problem import PASSES, LayerProblem, TimedLayer, forward_backward, reference
from dora_kernels import ops
from dora_kernels.testing import WORST_RATIO, Comparison, compare

WARMUP_STEPS = 3
# L2 is 60 MB on an H200 and 126 MB on a B200: what passes this many bytes leaves nothing of the last step in it
FLUSH_BYTES = 256 << 20

Step = Callable[[], object]


class GateError(Exception):
    """A provider's results are not good enough, or not its own, to be worth timing."""


class Gate:
    """Holds every provider of one problem to the function it says it computes.

    The error is rms_error against dora_linear_ref in float64, the yardstick dora_linear_ref in the problem's own
    dtypes. The bound is WORST_RATIO alone: the 2 ulp that Comparison.ok adds are for tensors of a few elements,
    and would let a gain that is off by 1% pass in bf16.
    """

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        self._references: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def comparisons(
        self, computes: str, results: dict[str, Tensor], step: str = "forward+backward"
    ) -> list[Comparison]:
        """Each tensor of `results` against exact and yardstick of the function `computes`.

        Raises GateError where a tensor that `step` has to give is missing, or where one has not the yardstick's shape
        and dtype.
        """
        exact, yardstick = self._reference(computes)
        if step != "forward+backward":
            yardstick = {"y": yardstick["y"]}
        if results.keys() != yardstick.keys():
            raise GateError(f"results are {', '.join(results)}; expected {', '.join(yardstick)}")
        for name, result in results.items():
            if (result.shape, result.dtype) != (yardstick[name].shape, yardstick[name].dtype):
                raise GateError(
                    f"{name} is {result.dtype} {tuple(result.shape)}; "
                    f"expected {yardstick[name].dtype} {tuple(yardstick[name].shape)}"
                )
        return [compare(name, results[name], yardstick[name], exact[name]) for name in results]

    def check(self, layer: TimedLayer, step: str = "forward+backward") -> tuple[list[Comparison], str | None]:
        """The comparisons of one step, passed or not, and the backend that ran if the layer is ours.

        Raises GateError as `comparisons`, and where a layer of ours did not run in our operators.
        """
        layer.set_mode(step)
        before = ops.calls.copy()
        self.problem.seed()
        results = PASSES[step](layer, self.problem)
        ran = ops.calls - before
        backends = {backend for _, backend in ran}
        name = "rescale" if layer.computes == "dora_lora_dropout" else ""
        expected = {name or "forward"} | ({f"{name}_backward".lstrip("_")} if step == "forward+backward" else set())
        if layer.ours and (len(backends) != 1 or not {operator for operator, _ in ran} >= expected):
            raise GateError(f"operators called: {dict(ran)}; expected {' and '.join(sorted(expected))} on one backend")
        return self.comparisons(layer.computes, results, step), backends.pop() if layer.ours else None

    def _reference(self, computes: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if computes not in self._references:
            exact, yardstick = (
                {name: tensor.detach() for name, tensor in forward_backward(reference(p, computes), p).items()}
                for p in (self.problem.double(), self.problem)
            )
            self._references[computes] = exact, yardstick
        return self._references[computes]


def within(comparison: Comparison) -> bool:
    """True if one tensor is within the gate's bound (NaN and inf are not)."""
    return comparison.ratio <= WORST_RATIO


def failure(comparisons: Iterable[Comparison]) -> str | None:
    """The errors above the gate's bound, as one line, or None."""
    bad = [c for c in comparisons if not within(c)]
    return "; ".join(f"{c.name}: error {c.error:.2e}, yardstick {c.yardstick:.2e}" for c in bad) or None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step over `runs` runs."""

    median: float
    p20: float
    p80: float
    minimum: float
    runs: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """The statistics of a list of at least one time."""
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], ordered[0], len(ordered)
        )


def interleave(
    steps: dict[str, Step],
    stopwatch: Callable[[Step], Callable[[], float]],
    seconds: float,
    rounds: tuple[int, int] = (5, 100),
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Timing]:
    """Time the steps in rounds, each round every step once in a new order, so that all see the same machine.

    stopwatch(step) runs the step and returns a function that gives its milliseconds, called when all is done.
    Stops after the last of `rounds`, or once `seconds` are over and the first of `rounds` are done. Waits in each round
    for the one before it: a host that runs ahead of the device by all rounds sees the seconds pass too late.
    """
    for step in steps.values():
        for _ in range(WARMUP_STEPS):
            step()
    order = random.Random(0)
    names = list(steps)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    readings: dict[str, Callable[[], float]] = {}
    end = clock() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and clock() >= end:
            break
        order.shuffle(names)
        last, readings = readings, {name: stopwatch(steps[name]) for name in names}
        for name, reading in last.items():
            milliseconds[name].append(reading())
    for name, reading in readings.items():
        milliseconds[name].append(reading())
    return {name: Timing.of(milliseconds[name]) for name in steps}


def cpu_stopwatch(step: Step) -> Callable[[], float]:
    """Wall time of a step on the CPU."""
    start = time.perf_counter()
    step()
    elapsed = 1e3 * (time.perf_counter() - start)
    return lambda: elapsed


class Flush:
    """Empties a GPU's L2 cache, so that the next kernel finds none of its operands there.

    Writes one buffer, then reads another. A write alone leaves an L2 full of lines that are not in memory yet (50 MB on
    an H100), and the kernel after it pays for their way there: 17 us at 3 TB/s, as much as many a kernel takes itself.
    Both passes take about 180 us at that rate, in which the host gets a kernel of two launches (40 us) on the queue.
    """

    def __init__(self, device: torch.device, size: int = FLUSH_BYTES) -> None:
        self._written = torch.empty(size, dtype=torch.int8, device=device)
        self._read = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)


class CudaStopwatch:
    """Device time between two events around a step, after L2 was flushed.

    The host runs ahead while the device flushes and while it works; where the host is slower than the device, as for
    small eager steps, the time between the events is the host's. A CUDA graph's replay has no such part.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = Flush(device)

    def __call__(self, step: Step) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush()
        start.record()
        step()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return milliseconds


def stopwatch_of(device: torch.device) -> Callable[[Step], Callable[[], float]]:
    """The stopwatch for steps on the device."""
    return CudaStopwatch(device) if device.type == "cuda" else cpu_stopwatch


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures: a pool's blocks serve the stream they were allocated on, and cuBLAS has a workspace (32 MiB
    on Hopper) for each.
    """
    return torch.cuda.Stream()


def capture(step: Callable[[], dict[str, Tensor]], pool: Any) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A CUDA graph of one step, and the tensors that its replay writes, valid until the next graph of `pool` runs.

    pool: torch.cuda.graph_pool_handle(), one for all graphs that are never replayed at once; a pool in which a capture
    has failed is not to be used again.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    # not torch.cuda.graph: where the end of a capture raises it leaves the thread on the capture's stream
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            results = {name: tensor.detach() for name, tensor in step().items()}
        except Exception:
            with contextlib.suppress(RuntimeError):  # what went wrong first is the reason
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, results


def peak_bytes(step: Step, device: torch.device) -> int:
    """Memory at the peak of one step, over what was held before it: outputs, saved tensors, temporaries.

    On the CPU what torch's allocator gives and takes back, as the profiler records it: not what a GEMM library
    allocates for itself.
    """
    step()  # cuBLAS workspaces and the like are made once
    gc.collect()
    if device.type == "cpu":
        return _peak_on_cpu(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(step: Step) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = []
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)


def saved_bytes(step: Step, *held: Tensor) -> int:
    """Bytes that the forward pass in `step` saves for its backward pass, each storage once.

    held: tensors that are there anyway, the parameters and x; what shares a storage with them is not counted.
    """
    storages: dict[int, int] = {}
    anyway = {tensor.untyped_storage().data_ptr() for tensor in held}
    alive = []  # or the storage of one saved tensor could be that of a later one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(size for pointer, size in storages.items() if pointer not in anyway)


def host_microseconds(step: Step, device: torch.device, calls: int = 10, bursts: int = 5) -> float | None:
    """The host's time for a call that it does not wait for: the median over `bursts` of `calls` each.

    A burst starts with the device idle and stays far below the thousand launches that may be pending before the host
    has to wait. None on the CPU, which has nobody to do the work in the meantime.
    """
    if device.type != "cuda":
        return None
    times = []
    for _ in range(bursts):
        torch.cuda.synchronize(device)
        for _ in range(calls):
            start = time.perf_counter()
            step()
            times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize(device)
    return statistics.median(times)


def launches(step: Step, device: torch.device, calls: int = 3) -> float | None:
    """Kernels, copies and fills that a call starts on the device, counted by torch.profiler; None on the CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            step()
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    started = [
        event
        for event in profile.events()
        if event.device_type == on_device and not getattr(event, "is_user_annotation", False)
    ]
    return len(started) / calls
