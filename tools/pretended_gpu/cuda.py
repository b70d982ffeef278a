"""The answers of torch.cuda on the pretended GPU: one H100 that has done everything as soon as it is asked.

Streams, events and graphs are objects with the right methods. Host clocks stand in for the device's; the body of a
capture runs once, and a replay does nothing.
"""

import contextlib
import ctypes
import itertools
import os
import threading
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

from tools.pretended_gpu import library

TOTAL_MEMORY = 80 << 30  # as backend.cpp
# Facts of an H100 SXM, from NVIDIA's data sheet and cudaGetDeviceProperties. The name is of no real card: results and
# tuned tables are filed under it.
PROPERTIES = SimpleNamespace(
    name="Pretended NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=TOTAL_MEMORY,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=False,
    is_multi_gpu_board=False,
)


class Event:
    """An event of the host's clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **others: Any) -> None:
        self._timed = enable_timing
        self._at: float | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        if not (self._timed and end._timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self._at is None or end._at is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return 1e3 * (end._at - self._at)

    def query(self) -> bool:
        return True

    def wait(self, stream: "Stream | None" = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Stream:
    """A stream with a number of its own; what is put on it is done at once."""

    _numbers = itertools.count(0x1000)

    def __init__(self, device: Any = None, priority: int = 0, **others: Any) -> None:
        self.cuda_stream = self.stream_id = next(self._numbers)
        self.device_index, self.priority = 0, priority

    def synchronize(self) -> None:
        synchronize()

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.cuda_stream == other.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)


DEFAULT_STREAM = Stream()
DEFAULT_STREAM.cuda_stream = DEFAULT_STREAM.stream_id = 0
_here = threading.local()
_capturing = False


def current_stream(device: Any = None) -> Stream:
    return getattr(_here, "stream", DEFAULT_STREAM)


def set_stream(stream: Stream) -> None:
    _here.stream = stream


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    before = current_stream()
    set_stream(chosen or before)
    try:
        yield
    finally:
        set_stream(before)


def synchronize(device: Any = None) -> None:
    if _capturing:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing (synchronize)")


class CUDAGraph:
    """A graph of nothing."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._captured = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        _capture(True)

    def capture_end(self) -> None:
        _capture(False)
        self._captured = True

    def replay(self) -> None:
        if not self._captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")

    def reset(self) -> None:
        self._captured = False

    def pool(self) -> tuple[int, int]:
        return graph_pool_handle()


class graph:
    """Its body runs, and what waits for the device meanwhile is refused."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph, self._stream = cuda_graph, stream or Stream()

    def __enter__(self) -> None:
        synchronize()
        self._before = current_stream()
        set_stream(self._stream)
        self._graph.capture_begin()

    def __exit__(self, *error: object) -> None:
        self._graph.capture_end()
        set_stream(self._before)


def graph_pool_handle() -> tuple[int, int]:
    return 0, 1


def make_graphed_callables(*arguments: Any, **keywords: Any) -> Any:
    raise NotImplementedError("pretended_gpu: a graph's replay computes nothing, so no graphed callable is made")


def _capture(begins: bool) -> None:
    global _capturing
    _capturing = begins
    library.loaded.pretended_capture(begins)


class device(contextlib.nullcontext):
    """The one device; there is no other to change to."""

    def __init__(self, device: Any = None) -> None:
        super().__init__()
        self.idx = 0


def answer(torch: ModuleType) -> None:
    """Put the answers in the place of torch.cuda's functions and classes."""
    loaded = library.loaded
    nothing = ("_lazy_init", "init", "set_device", "empty_cache", "ipc_collect", "_sleep", "manual_seed")
    constant = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": PROPERTIES.name,
        "get_arch_list": ["sm_90"],
        "default_stream": DEFAULT_STREAM,
        "graph_pool_handle": graph_pool_handle(),
        "utilization": 0,
        "clock_rate": 0,
        "power_draw": 0,
        "temperature": 0,
    }
    memory = {
        "memory_allocated": loaded.pretended_allocated,
        "memory_reserved": loaded.pretended_allocated,
        "max_memory_allocated": loaded.pretended_peak,
        "max_memory_reserved": loaded.pretended_peak,
        "reset_peak_memory_stats": loaded.pretended_reset_peak,
        "mem_get_info": lambda: (_free_memory(loaded), TOTAL_MEMORY),
    }
    # operators draw from the CPU's generator
    states = {
        "initial_seed": lambda: torch.initial_seed(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }
    objects = {
        thing.__name__: thing
        for thing in (
            *(Event, Stream, CUDAGraph, device, stream, graph, current_stream, set_stream),
            *(synchronize, make_graphed_callables),
        )
    }
    answers = states | objects
    # each a function of its own: Dynamo keeps rules by the function
    answers |= {name: _constantly(None) for name in (*nothing, "manual_seed_all")}
    answers |= {name: _constantly(value) for name, value in constant.items()}
    answers |= {name: _of_the_device(function) for name, function in memory.items()}
    for module in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.graphs, torch.cuda.streams):
        for name, thing in answers.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, thing)
    # Dynamo knows torch's own function, which asks this one
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: _capturing
    torch._C._cuda_getCurrentRawStream = lambda device=None: current_stream().cuda_stream
    _add_products(torch)
    _leave_the_profiler_to_the_host(torch)
    _make_storages(torch)


def _free_memory(loaded: ctypes.CDLL) -> int:
    """The bytes that the card has left, or the host, which has to hold them."""
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(TOTAL_MEMORY - loaded.pretended_allocated(), host)


def _constantly(value: Any) -> Any:
    return lambda device=None, *others, **keywords: value


def _of_the_device(function: Any) -> Any:
    return lambda device=None: function()


def _make_storages(torch: ModuleType) -> None:
    """Storages by their size, which copy.deepcopy asks for: a build without CUDA knows no such device."""
    make = torch.UntypedStorage.__new__

    def make_on_either(kind: type, *size: Any, **settings: Any) -> Any:
        if torch.device(settings.get("device") or "cpu").type != "cuda":
            return make(kind, *size, **settings)
        return torch.empty(*size, dtype=torch.uint8, device="cuda").untyped_storage()

    torch.UntypedStorage.__new__ = make_on_either


def _leave_the_profiler_to_the_host(torch: ModuleType) -> None:
    """A profile of the device is empty: asked for it, a build without CUDA prints a trace for every operator."""
    from torch import profiler

    start = profiler.profile.__init__

    def start_on_the_host(self: Any, *, activities: Any = (), **settings: Any) -> None:
        host = [activity for activity in activities or () if activity != profiler.ProfilerActivity.CUDA]
        start(self, activities=host or [profiler.ProfilerActivity.CPU], **settings)

    profiler.profile.__init__ = start_on_the_host


def _add_products(torch: ModuleType) -> None:
    """Operators that PyTorch has for CUDA alone, or chooses by what a CUDA build brings: done on the host."""

    def away(tensor: Any) -> Any:
        return None if tensor is None else tensor.to("meta" if library.is_idle() else "cpu")

    def back(result: Any) -> Any:
        if result is None or not result.is_meta:
            return None if result is None else result.to("cuda")
        return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="cuda")

    def float32_of(left: Any, right: Any, out_dtype: Any) -> Any:
        _on_one_device(left, right)
        if left.dtype not in (torch.bfloat16, torch.float16) or (right.dtype, out_dtype) != (left.dtype, torch.float32):
            raise RuntimeError(f"mm: {left.dtype} @ {right.dtype} as {out_dtype}; expected half precision and float32")
        return away(left).float() @ away(right).float()

    @library.inside()
    def mm(left: Any, right: Any, out_dtype: Any) -> Any:
        return back(float32_of(left, right, out_dtype))

    @library.inside()
    def addmm(bias: Any, left: Any, right: Any, out_dtype: Any, beta: float = 1, alpha: float = 1) -> Any:
        return back(beta * away(bias).float() + alpha * float32_of(left, right, out_dtype))

    @library.inside()
    def convolution(x: Any, weight: Any, bias: Any, *settings: Any) -> Any:
        _on_one_device(x, weight, bias)
        return back(torch.ops.aten.convolution(away(x), away(weight), away(bias), *settings))

    @library.inside()
    def convolution_backward(dy: Any, x: Any, weight: Any, *settings: Any) -> Any:
        _on_one_device(dy, x, weight)
        results = torch.ops.aten.convolution_backward(away(dy), away(x), away(weight), *settings)
        return tuple(map(back, results))

    operators = torch.library.Library("aten", "IMPL")
    for name, function in (
        ("mm.dtype", mm),
        ("addmm.dtype", addmm),
        ("convolution", convolution),
        ("convolution_backward", convolution_backward),
    ):
        operators.impl(name, function, "CUDA", allow_override=True)
    torch.cuda._pretended_products = operators  # a registration lives as long as its library


def _on_one_device(*tensors: Any) -> None:
    if len({tensor.device for tensor in tensors if tensor is not None}) > 1:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
