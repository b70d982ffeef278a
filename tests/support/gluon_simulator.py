"""Executes the source of a warp-specialised Gluon kernel on a CPU: its index arithmetic, barriers, phases and buffers.

gluon.jit becomes the identity. Roles become threads of which one runs at a time, drawn at random at every operation.
What a GPU does asynchronously (copies of the copy engine, products of the tensor cores) is done at a random later
moment, at the latest when something waits for it. A buffer is full of NaN from the start of a copy into it until the
copy is done. So a buffer that is read too early, given back too early or overwritten before it was stored, a wrong
coordinate and a wrong phase show as wrong numbers; a lost arrival shows as a deadlock, one too many as an error.

Not covered is what the compiler decides: fences between the proxies, layouts, registers.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support.gluon_schedule import Action, Program, Store


class Value:
    """A tensor in registers."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape = tuple(data.shape)
        self.type = types.SimpleNamespace(layout=None, tensor_type=types.SimpleNamespace(shape=self.shape))

    def reshape(self, shape: Sequence[int]) -> Value:
        return Value(self.data.reshape(tuple(shape)))

    def permute(self, order: Sequence[int]) -> Value:
        return Value(self.data.permute(tuple(order)))

    def split(self) -> tuple[Value, Value]:
        return Value(self.data[..., 0]), Value(self.data[..., 1])

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

    def __mul__(self, other: Value | float) -> Value:
        return Value(self.data * (other.data if isinstance(other, Value) else other))

    def __add__(self, other: Value) -> Value:
        return Value(self.data + other.data)


class Barrier:
    """An mbarrier: a phase ends when so many have arrived and all the bytes that were expected have come."""

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, count: int) -> None:
        self.missing -= count
        self._check()

    def come(self, count: int) -> None:
        self.bytes -= count
        self._check()

    def _check(self) -> None:
        assert self.missing >= 0, "an arrival too many"
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count


class Buffer:
    """Shared memory, or a part of it."""

    def __init__(self, simulator: Simulator, data: Tensor) -> None:
        self.simulator, self.data = simulator, data
        self.type = types.SimpleNamespace(shape=list(data.shape))

    def index(self, place: int) -> Buffer:
        assert 0 <= place < len(self.data), f"buffer {place} of {len(self.data)}"
        return Buffer(self.simulator, self.data[place])

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        return Buffer(self.simulator, self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Buffer:
        return Buffer(self.simulator, self.data.permute(tuple(order)))

    def load(self, layout: object) -> Value:
        self.simulator.program.step()
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.simulator.program.step()
        assert value.shape == tuple(self.data.shape)
        self.data.copy_(value.data)


class Barriers(list):
    """Shared memory with barriers in it."""

    index = list.__getitem__


class Descriptor:
    """A tensor in memory and the block in which the copy engine moves it. What is outside reads as zero."""

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        self.base, self.dtype, self.layout = base, base.dtype, None
        nbytes = torch.Size(block).numel() * base.element_size()
        self.block_type = types.SimpleNamespace(shape=list(block), nbytes=nbytes)

    def inside(self, coordinates: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The block's part inside the tensor, and where in the block it lies."""
        assert all(coordinate >= 0 for coordinate in coordinates)
        sizes = zip(coordinates, self.block_type.shape, self.base.shape, strict=True)
        part = self.base[tuple(slice(min(start, size), min(start + block, size)) for start, block, size in sizes)]
        return part, tuple(slice(0, size) for size in part.shape)


class Simulator:
    """The modules that the source of a kernel imports, and its launch."""

    def __init__(self) -> None:
        self.program = Program(0)
        self.place = (0, 1)  # of the program, and how many there are

    def load(self, source: str) -> types.SimpleNamespace:
        """The names that the source defines, its imports of Gluon answered from here."""
        names: dict[str, Any] = {"__name__": "simulated"}
        with mock.patch.dict(sys.modules, self._modules()):
            exec(compile(source, "<kernel>", "exec"), names)
        return types.SimpleNamespace(**names)

    def launch(self, kernel: Callable[..., None], programs: int, seed: int, *arguments: object) -> int:
        """Run the programs one after another; returns how many operations were put in order."""
        operations = 0
        for place in range(programs):
            self.place, self.program = (place, programs), Program(1000 * seed + place)
            kernel(*arguments)
            operations += self.program.operations
        return operations

    # what the modules hold, under the names that Gluon gives it

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Buffer | Barriers:
        if dtype == torch.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Buffer(self, torch.full(tuple(shape), float("nan"), dtype=dtype))

    def warp_specialize(self, partitions: Sequence, warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(warps) == len(registers) == len(partitions) - 1

        def role(function: Callable[..., None], arguments: Sequence) -> Action:
            def run() -> None:
                function(*arguments)

            run.__name__ = function.__name__
            return run

        self.program.run([role(*partition) for partition in partitions])

    def async_load(
        self, source: Descriptor, coordinates: Sequence[int], barrier: Barrier, buffer: Buffer, pred: bool = True
    ) -> None:
        self.program.step()
        if not pred:
            return
        assert buffer.type.shape == source.block_type.shape
        buffer.data.fill_(float("nan"))

        def copy() -> None:
            part, where = source.inside(coordinates)
            buffer.data.zero_()
            buffer.data[where] = part
            barrier.come(source.block_type.nbytes)

        self.program.later(copy)

    def async_store(self, target: Descriptor, coordinates: Sequence[int], buffer: Buffer) -> None:
        self.program.step()

        def copy() -> None:
            part, where = target.inside(coordinates)
            part.copy_(buffer.data[where])

        store = Store(self.program, self.program.role, copy)
        self.program.role.stores.append(store)
        self.program.later(store)

    def store_wait(self, pendings: int) -> None:
        self.program.step()
        stores = self.program.role.stores
        if len(stores) > pendings:
            stores[-1 - pendings]()

    def warpgroup_mma(self, a: Buffer, b: Buffer, acc: Value, *, use_acc: bool = True, is_async: bool) -> Value:
        self.program.step()
        assert is_async and (a.data.shape[0], b.data.shape[1]) == acc.shape
        product: list[Tensor] = []

        def read() -> None:
            product.append(a.data.float() @ b.data.float())

        def finish() -> None:
            self.program.do(read)
            acc.data = acc.data + product[0] if use_acc else product[0]

        self.program.role.products.append(finish)
        self.program.later(read)
        return acc

    def warpgroup_mma_wait(self, pendings: int, deps: Sequence[Value]) -> Value:
        self.program.step()
        products = self.program.role.products
        while len(products) > pendings:
            products.pop(0)()
        return deps[0]

    def expect(self, barrier: Barrier, bytes: int, pred: bool = True) -> None:
        self.program.step()
        if pred:
            barrier.bytes += bytes
            barrier.arrive(1)

    def arrive(self, barrier: Barrier, *, count: int = 1) -> None:
        self.program.step()
        barrier.arrive(count)

    def wait(self, barrier: Barrier, phase: int) -> None:
        self.program.step(lambda: barrier.phase != phase)

    def _modules(self) -> dict[str, types.ModuleType]:
        def module(name: str, **names: object) -> types.ModuleType:
            made = types.ModuleType(name)
            made.__dict__.update(names)
            return made

        def static_assert(condition: bool) -> None:
            assert condition, "static_assert"

        def jit(function: Callable | None = None, **options: object) -> Callable:
            return function or (lambda decorated: decorated)

        def layout(*arguments: object, **options: object) -> None:
            return None

        language = module(
            "language",
            constexpr=object,
            program_id=lambda axis: self.place[0],
            num_programs=lambda axis: self.place[1],
            cdiv=lambda a, b: -(-a // b),
            minimum=min,
            where=lambda condition, a, b: a if condition else b,
            zeros=lambda shape, dtype, layout: Value(torch.zeros(tuple(shape), dtype=dtype)),
            expand_dims=lambda value, axis: Value(value.data.unsqueeze(axis)),
            num_warps=lambda: 4,
            static_range=range,
            static_assert=static_assert,
            SliceLayout=layout,
            NVMMADistributedLayout=layout,
            int64=torch.int64,
            float32=torch.float32,
            allocate_shared_memory=self.allocate_shared_memory,
            warp_specialize=self.warp_specialize,
        )
        barriers = {"init": lambda barrier, count: barrier.init(count), "MBarrierLayout": layout}
        barriers |= {"expect": self.expect, "arrive": self.arrive, "wait": self.wait}
        name = "dora_kernels.kernels.hopper.language"
        names = module(
            name,
            gl=language,
            gluon=module("gluon", jit=jit),
            mbarrier=types.SimpleNamespace(**barriers),
            tma_load=self.async_load,
            tma_store=self.async_store,
            tma_store_wait=self.store_wait,
            fence_async_shared=lambda: None,
            warpgroup_mma=self.warpgroup_mma,
            warpgroup_mma_init=lambda value: value,
            warpgroup_mma_wait=self.warpgroup_mma_wait,
        )
        return {name: names}
