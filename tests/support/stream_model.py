"""A GPU's streams and its allocator on the CPU: what is launched is done later, in any order that the events allow.

Inside `StreamModel.entered()` every operator and every kernel of Triton's interpreter is put on the current stream,
and done at some later moment, which a seed decides; torch.cpu's streams are those of this model. Memory is handed out
by the host at once, what was freed last first, and is NaN from the moment of its stream at which it was freed.

A seed shows one order; `races` says of all of them what shares memory that one of it writes, and stands in no order.
`unjoined` has the streams with work that a stream does not wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from triton.runtime.interpreter import InterpretedFunction

ALLOCATED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
GRANULE = 512  # bytes, as of torch's allocator


class CaptureError(Exception):
    """What CUDA says of a wait that leads into a capture or out of it, or of a branch that does not come back."""


class Bytes(NamedTuple):
    """Memory from an address to another."""

    start: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> Bytes:
        return cls(tensor.data_ptr(), tensor.data_ptr() + _elements(tensor) * tensor.itemsize)

    def values(self) -> numpy.ndarray:
        return numpy.ctypeslib.as_array((ctypes.c_uint8 * (self.end - self.start)).from_address(self.start))

    def meets(self, others: set[Bytes]) -> bool:
        return any(self.start < other.end and other.start < self.end for other in others)


class Work(NamedTuple):
    """Something that was put on a stream: its number there, and how much of each stream is over before it."""

    name: str
    stream: ModelStream
    number: int
    known: dict[ModelStream, int]
    grid: tuple[int, ...] | None
    used: set[Bytes]
    written: set[Bytes]  # of these, when this is done

    def is_before(self, other: Work) -> bool:
        return self.number <= other.known.get(self.stream, 0)


class ModelEvent:
    """A place in a stream."""

    def __init__(self) -> None:
        self.known: dict[ModelStream, int] = {}
        self.capture: ModelStream | None = None

    def record(self, stream: ModelStream) -> None:
        self.known, self.capture = dict(stream.known), stream.capture

    def is_over(self) -> bool:
        return all(stream.done >= number for stream, number in self.known.items())


class ModelStream:
    """Work in order; `known` has how much of each stream is over before what comes next in this one."""

    def __init__(self, model: StreamModel, name: str) -> None:
        self.model, self.name = model, name
        self.waiting: deque[Callable[[], None] | ModelEvent] = deque()
        self.put = self.done = 0
        self.known: dict[ModelStream, int] = {}
        self.capture: ModelStream | None = None  # that which the capture has begun on
        self.free: dict[int, list[numpy.ndarray]] = {}

    def __repr__(self) -> str:
        return self.name

    def record_event(self) -> ModelEvent:
        with self.model.lock:
            event = ModelEvent()
            event.record(self)
            return event

    def wait_event(self, event: ModelEvent) -> None:
        with self.model.lock:
            if event.capture is not self.capture:
                if event.capture is None or self.capture is not None:
                    raise CaptureError(f"{self} in the capture of {self.capture} waits for one of {event.capture}")
                self.capture = event.capture
            for stream, number in event.known.items():
                self.known[stream] = max(number, self.known.get(stream, 0))
            self.waiting.append(event)

    def wait_stream(self, stream: ModelStream) -> None:
        self.wait_event(stream.record_event())

    def add(self, action: Callable[[], None]) -> None:
        """Put an action at the end."""
        self.put += 1
        self.known[self] = self.put
        self.waiting.append(action)

    def can_go_on(self) -> bool:
        return bool(self.waiting) and (not isinstance(self.waiting[0], ModelEvent) or self.waiting[0].is_over())

    def go_on(self) -> None:
        """Do what comes next."""
        if not isinstance(self.waiting[0], ModelEvent):
            with _disable_current_modes():
                self.waiting[0]()
            self.done += 1
        self.waiting.popleft()

    def synchronize(self) -> None:
        """The host waits: of other streams, no more is done than this one waits for."""
        with self.model.lock:
            if self.capture is not None:
                raise CaptureError("the host waits for a capture")
            while self.waiting:
                self._make_way()

    def _make_way(self) -> None:
        """Do what comes next, and before it what it waits for."""
        if isinstance(self.waiting[0], ModelEvent):
            for stream, number in self.waiting[0].known.items():
                while stream.done < number:
                    stream._make_way()
        self.go_on()


class StreamModel(TorchDispatchMode):
    """Streams, of which `pool` are given out in turn; fills: whether it fills fresh memory, as torch's deterministic
    mode does.
    """

    def __init__(self, seed: int, pool: int = 32, fills: bool | None = None) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.fills = self.random.random() < 0.5 if fills is None else fills
        # how much is done at once; at 0 only what the host waits for
        self.haste = self.random.choice((0.0, 0.3, 2.0))
        self.lock, self.here = threading.RLock(), threading.local()
        self.default = ModelStream(self, "default")
        self.pool = [ModelStream(self, f"pool {number}") for number in range(pool)]
        self.streams = [self.default, *self.pool]
        self.eagerness = {stream: self.random.choice((0.05, 1.0, 10.0)) for stream in self.streams}
        self.given_out = 0
        self.launched: list[Work] = []
        self.memories: dict[int, numpy.ndarray] = {}  # by their address

    # what torch.cpu is asked for

    def current_stream(self, device: Any = None) -> ModelStream:
        return getattr(self.here, "stream", self.default)

    def new_stream(self, priority: int = 0) -> ModelStream:
        self.given_out += 1
        return self.pool[(self.given_out - 1) % len(self.pool)]

    @contextlib.contextmanager
    def on(self, stream: ModelStream) -> Iterator[None]:
        """Inside, `stream` is the current one."""
        before, self.here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.here.stream = before

    @contextlib.contextmanager
    def capturing(self, stream: ModelStream) -> Iterator[None]:
        """Inside, the stream is captured; what it holds is done as if its graph were replayed once."""
        stream.capture = stream
        try:
            yield
        finally:
            lost = [other for other in self.unjoined(stream) if other.capture is stream]
            for other in self.streams:
                other.capture = None if other.capture is stream else other.capture
        if lost:
            raise CaptureError(f"unjoined: {lost}")

    @contextlib.contextmanager
    def entered(self) -> Iterator[StreamModel]:
        """Inside, the model is this one, in every thread that has entered the mode. On leaving, all is done."""
        run = InterpretedFunction.run

        def launch(kernel: InterpretedFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
            seen = self._seen(arguments)
            self.put(
                kernel.fn.__name__,
                lambda: run(kernel, *seen, grid=grid, warmup=warmup, **constants),
                arguments,
                tuple(grid),
            )

        with (
            mock.patch.object(torch.cpu, "current_stream", self.current_stream),
            mock.patch.object(torch.cpu, "Stream", self.new_stream),
            mock.patch.object(torch.cpu, "stream", self.on),
            mock.patch.object(InterpretedFunction, "run", launch),
            self,
        ):
            yield self
        gc.collect()
        for stream in self.streams:
            stream.synchronize()

    # what is launched

    def put(self, name: str, action: Callable[[], None], used: Any, grid: tuple[int, ...] | None = None) -> None:
        """Have the action done on the current stream; used: the tensors that it reads or writes."""
        with self.lock:
            self._put(self.current_stream(), name, action, {Bytes.of(tensor) for tensor in _tensors(used)}, grid)
            while self.random.random() < self.haste / (1 + self.haste):
                able = [stream for stream in self.streams if stream.can_go_on()]
                if not able:
                    break
                self.random.choices(able, [self.eagerness[stream] for stream in able])[0].go_on()

    def _put(
        self, stream: ModelStream, name: str, action: Callable[[], None], used: set[Bytes], grid: Any = None
    ) -> None:
        written: set[Bytes] = set()

        def do() -> None:
            before = {part: part.values().copy() for part in used}
            action()
            written.update(part for part in used if (part.values() != before[part]).any())

        stream.add(do)
        self.launched.append(Work(name, stream, stream.put, dict(stream.known), grid, used, written))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        returned = [one.alias_info for one in function._schema.returns]
        if any(one is not None and not one.is_write for one in returned):  # a view
            return function(*args, **kwargs)
        seen_args, seen = self._seen(args), self._seen(kwargs)
        if function._schema.is_mutable:
            result = function(*_on_meta(args), **_on_meta(kwargs))
            self.put(name, lambda: function(*seen_args, **seen), (args, kwargs))
            if not isinstance(result, Tensor):
                return result
            return next(
                kwargs.get(a.name, args[i] if i < len(args) else None)
                for i, a in enumerate(function._schema.arguments)
                if a.alias_info and a.alias_info.is_write
            )
        made = function(*_on_meta(args), **_on_meta(kwargs | ({"device": "meta"} if "device" in kwargs else {})))
        results = tree_map_only(Tensor, self._allocate, made)
        if name in ALLOCATED:
            if self.fills:
                self.put("fill", self._poison(results), results)
            return results
        into = self._seen(results)

        def compute() -> None:
            for target, source in zip(_tensors(into), _tensors(function(*seen_args, **seen)), strict=True):
                target.copy_(source)

        self.put(name, compute, (args, kwargs, results))
        return results

    # memory

    def _allocate(self, like: Tensor) -> Tensor:
        """A tensor in memory that the current stream has freed, or in new memory."""
        with self.lock:
            stream = self.current_stream()
            size = -(-max(_elements(like) * like.itemsize, 1) // GRANULE) * GRANULE
            free = stream.free.setdefault(size, [])
            if free:
                memory = free.pop()
            else:
                memory = numpy.full(size + 64, 255, numpy.uint8)
                start = -memory.ctypes.data % 64
                memory = memory[start : start + size]
            lease = memory[:]  # lives as long as the storage
            self.memories[memory.ctypes.data] = memory
            weakref.finalize(lease, self._freed, memory, stream).atexit = False
            return torch.from_numpy(lease).view(like.dtype).as_strided(like.shape, like.stride())

    def _freed(self, memory: numpy.ndarray, stream: ModelStream) -> None:
        """Its stream may overwrite it from now on."""
        with self.lock:
            whole = Bytes(memory.ctypes.data, memory.ctypes.data + memory.size)
            self._put(stream, "freed", lambda: memory.fill(255), {whole})
            self.launched[-1].written.add(whole)
            stream.free[memory.size].append(memory)

    def _poison(self, tensor: Tensor) -> Callable[[], None]:
        memory = self.memories[tensor.untyped_storage().data_ptr()]
        return lambda: memory.fill(255)

    def _seen(self, values: Any) -> Any:
        """The values with tensors that hold no memory of this model: it is freed when the program lets go of it."""

        def seen(tensor: Tensor) -> Tensor:
            memory = self.memories.get(tensor.untyped_storage().data_ptr())
            if memory is None:
                return tensor.detach()
            whole = torch.from_numpy(memory).view(tensor.dtype)
            return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        with self.lock, _disable_current_modes():
            return tree_map_only(Tensor, seen, values)

    # what a test asks

    def unjoined(self, stream: ModelStream) -> list[ModelStream]:
        """The streams that have work which is not known to be over in `stream`."""
        return [other for other in self.streams if other is not stream and other.put > stream.known.get(other, 0)]

    def races(self) -> list[tuple[str, str]]:
        """What uses the same memory, one of the two to write it, in no order. To be asked when all is done."""
        pairs = itertools.combinations(self.launched, 2)
        return [
            (f"{one.name} on {one.stream}", f"{other.name} on {other.stream}")
            for one, other in pairs
            if one.stream is not other.stream
            and any(part.meets(theirs.used) for mine, theirs in ((one, other), (other, one)) for part in mine.written)
            and not one.is_before(other)
            and not other.is_before(one)
        ]


def _elements(tensor: Tensor) -> int:
    """From its first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * apart for size, apart in zip(tensor.shape, tensor.stride(), strict=True))


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, values)
    return found


def _on_meta(values: Any) -> Any:
    return tree_map_only(
        Tensor, lambda one: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta"), values
    )
