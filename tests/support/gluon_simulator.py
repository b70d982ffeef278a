"""Executes the source of a warp-specialised Gluon kernel on a CPU: its index arithmetic, barriers, phases and buffers.

gluon.jit becomes the identity. The functions of the source become generators, which stop before every operation; which
role goes on is drawn at random.
What a GPU does asynchronously (copies of the copy engine, products of the tensor cores) is done at a random later
moment, at the latest when something waits for it. A buffer is full of NaN from the start of a copy into it until the
copy is done. So a wrong coordinate, a wrong phase and a buffer that is read too early show as wrong numbers; a lost
arrival shows as a deadlock. Beside that gluon_order.py finds what only another order would show, and fences that lack.

AssertionError, too, for: shared memory read that nothing has written; an element of an output not written exactly
once; copies and products under way that nothing waits for; more shared memory or registers than there are; a tensor
core asked by less than four warps; what a block's buffer, layout or coordinates may not be; a call that the Gluon at
hand does not take. Not covered is what the compiler decides: where it puts barriers among the warps of one role, how it
swizzles, what it spills, and whether what must be constant for it is. tests/kernels/test_hopper.py compiles.
"""

from __future__ import annotations

import inspect
import math
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dora_kernels.planning.configs import SHARED
from tests.support.gluon_language import load
from tests.support.gluon_order import Barrier, Barriers, Memory, Order
from tests.support.gluon_schedule import Body, Program, Role
from tests.support.gluon_values import Accumulator, Buffer, Descriptor, Layout, Value, registers_of

REGISTERS = 65_536  # of a multiprocessor
WARPS_OF_A_GROUP, THREADS_OF_A_WARP = 4, 32


class Product:
    """A product of the tensor cores that is added to a sum, in whose place it puts the new one."""

    def __init__(self, left: Buffer, right: Buffer, before: Value, use_acc: bool, events: int) -> None:
        self.left, self.right, self.before, self.use_acc, self.events = left, right, before, use_acc, events
        self.under_way = True
        self.read: torch.Tensor | None = None
        pending = [product for product in before.products if product.under_way]
        self.sum = Value(torch.full_like(before._data, float("nan")), before.type.layout, [*pending, self])
        self.do = self.operands  # one object, by which the program knows it

    def operands(self) -> None:
        self.read = self.left.data.float() @ self.right.data.float()

    def end(self) -> None:
        self.sum._data = self.read + self.before._data if self.use_acc else self.read
        self.under_way = False


class Store:
    """A copy from a buffer to memory. Those of one role end in order."""

    def __init__(self, program: Program, copy: Callable[[], None], event: int, before: Store | None) -> None:
        self.program, self.copy, self.event, self.before = program, copy, event, before
        self.done = False

    def __call__(self) -> None:
        """End the older ones, and this one."""
        if self.done:
            return
        if self.before is not None:
            self.program.do(self.before)
        self.before, self.done = None, True
        self.copy()


class Simulator:
    """The module of Gluon's names that the source of a kernel imports, and the launch of a kernel."""

    def __init__(self, num_warps: int = 4, maxnreg: int = 168) -> None:
        self.num_warps, self.maxnreg = num_warps, maxnreg
        # "products alone": started with none in flight; "stores": those under way at each start of one, summed;
        # "loads": the most that who starts them did not know to have come; "turns": the most that one buffer or
        # barrier of an allocation was used more often than another
        self.seen: Counter[str] = Counter()
        self._start(0, 1, 0)

    def load(self, source: str) -> types.SimpleNamespace:
        """The names that the source defines, its imports of Gluon answered from here."""
        return load(source, self)

    def launch(self, kernel: Callable[..., None], programs: int, seed: int, *arguments: object) -> int:
        """Run the programs one after another; returns how many operations were put in order."""
        operations = 0
        for place in range(programs):
            self._start(place, programs, 1000 * seed + place)
            self.program.finish(kernel(*arguments))
            self._check_over()
            operations += self.program.operations
        for name, argument in zip(inspect.signature(kernel).parameters, arguments, strict=True):
            if isinstance(argument, Descriptor):
                argument.check_over(name)
        return operations

    def _start(self, place: int, programs: int, seed: int) -> None:
        self.place, self.program, self.order = (place, programs), Program(seed), Order()
        self.program.main.warps, self.program.main.registers = self.num_warps, self.maxnreg
        self.barriers: list[Barrier] = []
        self.memories: list[Memory] = []
        self.loads: list[int] = []
        self.shared = 0

    def _check_over(self) -> None:
        known = 0
        for role in (self.program.main, *self.program.roles):
            known |= role.known
            assert not role.stores, f"{role.name} ends with stores under way"
            assert not role.products, f"{role.name} ends with products under way"
        assert all(event & known for event in self.loads), "the program ends with loads that nothing has waited for"
        for barrier in self.barriers:
            barrier.check_over()
        for memory in self.memories:
            of_memory = [len(barrier.ended) for barrier in self.barriers if barrier.memory is memory]
            counts = of_memory or memory.writes.values()
            self.seen["turns"] = max(self.seen["turns"], max(counts, default=0) - min(counts, default=0))

    # what the module holds, by the names that the package has for it

    def allocate_shared_memory(self, element_ty: torch.dtype, shape: Sequence[int], layout: Layout) -> Any:
        assert self.program.role is self.program.main and not self.program.roles, "shared memory allocated by a role"
        shape = list(shape)
        self.shared += math.prod(shape) * element_ty.itemsize
        assert self.shared <= SHARED["sm_90"], f"{self.shared} bytes of shared memory"
        memory = Memory(self.order, f"memory {self.shared} {shape}")
        if element_ty == torch.int64:
            assert layout == Layout("MBarrierLayout"), layout
            self.memories.append(memory)
            made = Barriers(memory, shape)
            self.barriers += made.barriers
            return made
        assert isinstance(layout, Layout) and layout.name == "shared", layout
        self.memories.append(memory)
        data, written = torch.full(shape, float("nan"), dtype=element_ty), torch.zeros(shape, dtype=torch.bool)
        box = tuple((0, size) for size in shape)
        return Buffer(self, memory, layout, data, written, box, tuple(range(len(shape))))

    def warp_specialize(
        self, functions_and_args: Sequence, worker_num_warps: Sequence[int], worker_num_regs: Sequence[int]
    ) -> None:
        assert len(worker_num_warps) == len(worker_num_regs) == len(functions_and_args) - 1, "a count for each worker"
        assert not self.program.roles, "roles are started twice"
        for barrier in self.barriers:  # that of `empty`, too, which no copy signals
            assert barrier.born is None or barrier.born.fence, f"{barrier.name}: no fence since it was initialised"
        warps = [self.num_warps, *worker_num_warps]
        assert all(count in (1, 2, 4, 8, 16) for count in warps), warps
        registers = _registers(warps, worker_num_regs, self.maxnreg)
        by_function: dict[str, int] = {}
        roles, bodies = [], []
        for place, (function, given) in enumerate(functions_and_args):
            name = function.__name__
            alike = by_function.setdefault(name, registers[place])
            assert alike == registers[place], f"{name} has {alike} registers in one role and {registers[place]} in one"
            roles.append(Role(f"{name} {place}", warps[place], registers[place], self.program.main.known))
            bodies.append(function(*given))
        self.program.run(roles, bodies)
        for role in roles:
            self.program.main.known |= role.known

    def num_warps_of_role(self) -> int:
        return self.program.role.warps

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, layout: Layout) -> Value:
        assert isinstance(layout, Layout), layout
        value, role = Value(torch.zeros(tuple(shape), dtype=dtype), layout), self.program.role
        assert registers_of(value, role) < role.registers, f"{role.name}: a sum does not fit {role.registers} registers"
        return value

    def expand_dims(self, input: Value, axis: int) -> Value:
        layout = input.type.layout
        assert layout.name == "SliceLayout" and layout.given[0] == axis, f"expand_dims({axis}) of {layout}"
        return Value(input.data.unsqueeze(axis), layout.given[1])

    def mma_layout(self, version: Sequence[int], warps_per_cta: Sequence[int], instr_shape: Sequence[int]) -> Layout:
        given = (tuple(version), tuple(warps_per_cta), tuple(instr_shape))
        return Layout("NVMMADistributedLayout", given)

    def tma_load(
        self, tensor_desc: Descriptor, coord: Sequence[int], barrier: Barrier, result: Buffer, pred: bool = True
    ) -> Body:
        yield
        if not pred:
            return
        tensor_desc.check(coord, result)
        coordinates = tuple(coord)
        part, where = tensor_desc.inside(coordinates)
        assert all(place.start < place.stop for place in where), f"a block at {coordinates} of {tensor_desc.base.shape}"
        barrier.start_copy(self.program.role)
        event = result.access("has a copy write", write=True, by_instruction=False)
        tensor_desc.loaded = True
        self.loads.append(event)
        under_way = sum(not load & self.program.role.known for load in self.loads)
        self.seen["loads"] = max(self.seen["loads"], under_way)
        result.data.fill_(float("nan"))

        def copy() -> None:
            result.data.zero_()
            result.data[where] = tensor_desc.base[part]
            barrier.come(event, tensor_desc.block_type.nbytes)

        self.program.later(copy)

    def tma_store(self, tensor_desc: Descriptor, coord: Sequence[int], src: Buffer) -> Body:
        yield
        tensor_desc.check(coord, src)
        part, where = tensor_desc.inside(coord)
        tensor_desc.stored_at.append(tuple(coord))
        event = src.access("has a copy read", write=False, by_instruction=False)
        if tensor_desc.stored is None:
            tensor_desc.stored = torch.zeros(tensor_desc.base.shape, dtype=torch.int32)

        def copy() -> None:
            tensor_desc.base[part] = src.data[where]
            tensor_desc.stored[part] += 1

        stores = self.program.role.stores
        stores.append(Store(self.program, copy, event, stores[-1] if stores else None))
        self.seen["stores"] += len(stores)
        self.program.later(stores[-1])

    def tma_store_wait(self, pendings: int) -> Body:
        yield
        role = self.program.role
        assert pendings >= 0, pendings
        while len(role.stores) > pendings:
            store = role.stores.pop(0)
            self.program.do(store)
            role.known |= store.event

    def warpgroup_mma(
        self, a: Buffer, b: Buffer, acc: Accumulator, *, use_acc: bool = True, is_async: bool = False
    ) -> Body:
        yield
        role, before = self.program.role, acc.value
        assert is_async, "a product that is waited for at once"
        assert role.warps % WARPS_OF_A_GROUP == 0, f"{role.name} has {role.warps} warps"
        (rows, inner), (of_b, columns) = a.shape, b.shape
        assert (rows, columns) == tuple(before.shape) and inner == of_b, f"{a.shape} @ {b.shape} to {before.shape}"
        assert a.dtype == b.dtype and before._data.dtype == torch.float32, f"{a.dtype} @ {b.dtype}"
        _check_mma_layout(before.type.layout, role.warps, columns, a.dtype)
        events = [side.access("has a product read", write=False, by_instruction=False) for side in (a, b)]
        self.seen["products alone"] += not role.products
        product = Product(a, b, before, use_acc, events[0] | events[1])
        role.products.append(product)
        self.program.later(product.do)
        return Accumulator(product.sum)

    def warpgroup_mma_init(self, value: Value) -> Accumulator:
        assert isinstance(value, Value), f"an accumulator made of {type(value).__name__}"
        return Accumulator(value)

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Sequence[Accumulator] | None = None) -> Body:
        yield
        assert deps is not None and len(deps) == 1 and num_outstanding >= 0, (num_outstanding, deps)
        role = self.program.role
        while len(role.products) > num_outstanding:
            product = role.products.pop(0)
            self.program.do(product.do)
            product.end()
            role.known |= product.events
        (dep,) = deps
        return dep.value if isinstance(dep, Accumulator) else dep

    def expect(self, mbarrier: Barrier, bytes: int, pred: bool = True) -> Body:
        yield
        if pred:
            mbarrier.arrive(self.program.role, 1, bytes)

    def arrive(self, mbarrier: Barrier, *, count: int = 1, pred: bool = True) -> Body:
        yield
        if pred:
            mbarrier.arrive(self.program.role, count)

    def wait(self, mbarrier: Barrier, phase: int, pred: bool = True) -> Body:
        if pred:
            yield from mbarrier.wait(self.program, phase)

    def init(self, mbarrier: Barrier, count: int) -> None:
        mbarrier.init(self.program.role, count)

    def fence_async_shared(self) -> Body:
        yield
        self.order.fence(self.program.role)


def _registers(warps: Sequence[int], asked: Sequence[int], launched: int) -> list[int]:
    """The registers of a thread of each role, as Triton deals them out: the first gets what the others leave.

    https://github.com/triton-lang/triton/blob/main/lib/Conversion/TritonGPUToLLVM/AllocateWarpGroups.cpp
    """
    assert all(registers % 8 == 0 and 24 <= registers <= 256 for registers in (*asked, launched)), (asked, launched)
    groups = [-(-count // WARPS_OF_A_GROUP) * WARPS_OF_A_GROUP for count in warps]
    assert sum(groups) * THREADS_OF_A_WARP * launched <= REGISTERS, f"{sum(groups)} warps with {launched} registers"
    left = sum(groups) * launched - sum(count * registers for count, registers in zip(groups[1:], asked, strict=True))
    first = left // groups[0] // 8 * 8
    assert 24 <= first <= 256, f"{first} registers are left for the first role"
    return [first, *asked]


def _check_mma_layout(layout: Layout, warps: int, columns: int, dtype: torch.dtype) -> None:
    """AssertionError unless a sum of so many columns, of products of this dtype, may lie so in the registers."""
    assert layout.name == "NVMMADistributedLayout", layout
    version, warps_per_cta, instr_shape = layout.given
    assert version == (3, 0) and warps_per_cta == (warps, 1), f"{layout} in a role of {warps} warps"
    rows, width, inner = instr_shape
    assert rows == 16 and width == min(columns, 256), f"{layout} for {columns} columns"
    assert inner * dtype.itemsize == 32, layout
