"""What a simulated Gluon kernel handles: tensors in registers, accumulators, shared memory, descriptors of tensors.

They have the names and the checks that Triton's have. A layout is known by how it was made: equal layouts were made the
same way.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.support.gluon_order import Box, Memory
from tests.support.gluon_schedule import Body, Role

if TYPE_CHECKING:
    from tests.support.gluon_simulator import Simulator

ALIGNED = 16  # bytes: what the copy engine asks of addresses, of the distance of rows, and of a block's rows


@dataclass(frozen=True)
class Layout:
    """A layout: its name in Gluon and what it was made with."""

    name: str
    given: tuple = ()


class Value:
    """A tensor in registers. Not to be read while products that are added to it are under way."""

    def __init__(self, data: Tensor, layout: Layout, products: Sequence = ()) -> None:
        self._data, self.products = data, list(products)
        self.shape = list(data.shape)
        self.type = types.SimpleNamespace(shape=self.shape, layout=layout)

    @property
    def data(self) -> Tensor:
        assert not any(product.under_way for product in self.products), "a sum is read before its last product is done"
        return self._data

    def _laid_out(self, data: Tensor, name: str, *given: object) -> Value:
        return Value(data, Layout(name, (*given, self.type.layout)))

    def reshape(self, shape: Sequence[int]) -> Value:
        return self._laid_out(self.data.reshape(tuple(shape)), "reshape", tuple(shape))

    def permute(self, order: Sequence[int]) -> Value:
        return self._laid_out(self.data.permute(tuple(order)), "permute", tuple(order))

    def split(self) -> tuple[Value, Value]:
        assert self.shape[-1] == 2, f"split of {self.shape}"
        return self._laid_out(self.data[..., 0], "split"), self._laid_out(self.data[..., 1], "split")

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype), self.type.layout)

    def __mul__(self, other: Value | float) -> Value:
        return self._with(torch.mul, other)

    def __add__(self, other: Value | float) -> Value:
        return self._with(torch.add, other)

    def __sub__(self, other: Value | float) -> Value:
        return self._with(torch.sub, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with(torch.div, other)

    def _with(self, operator: Any, other: Value | float) -> Value:
        if not isinstance(other, Value):
            return Value(operator(self.data, other), self.type.layout)
        assert self.type.layout == other.type.layout, f"{self.type.layout} beside {other.type.layout}"
        return Value(operator(self.data, other.data), self.type.layout)


class Accumulator:
    """A sum of products in registers: a Value once it was waited for."""

    def __init__(self, value: Value) -> None:
        self.value = value
        self.type = types.SimpleNamespace(tensor_type=value.type)


class Buffer:
    """Shared memory, or a part of it."""

    def __init__(
        self, simulator: Simulator, memory: Memory, layout: object, data: Tensor, written: Tensor, box: Box, dims: tuple
    ) -> None:
        self.simulator, self.memory, self.layout = simulator, memory, layout
        self.data, self.written = data, written  # views of the part, and of what was written of it
        self.box, self.dims = box, dims  # where the part is, and which dimension of the whole each of its own is
        self.dtype = data.dtype
        self.shape = list(data.shape)
        self.type = types.SimpleNamespace(shape=self.shape, layout=layout)

    def _part(self, data: Tensor, written: Tensor, box: Box, dims: tuple) -> Buffer:
        return Buffer(self.simulator, self.memory, self.layout, data, written, box, dims)

    def _cut(self, dim: int, start: int, stop: int) -> Box:
        assert 0 <= start < stop <= self.shape[dim], f"{start}:{stop} of {self.memory.what} {self.shape}"
        first = self.box[self.dims[dim]][0]
        cut = list(self.box)
        cut[self.dims[dim]] = (first + start, first + stop)
        return tuple(cut)

    def index(self, index: int) -> Buffer:
        return self._part(self.data[index], self.written[index], self._cut(0, index, index + 1), self.dims[1:])

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        cut = self._cut(dim, start, start + length)
        data, written = (view.narrow(dim, start, length) for view in (self.data, self.written))
        return self._part(data, written, cut, self.dims)

    def permute(self, order: Sequence[int]) -> Buffer:
        order = tuple(order)
        dims = tuple(self.dims[place] for place in order)
        return self._part(self.data.permute(order), self.written.permute(order), self.box, dims)

    def access(self, how: str, *, write: bool, by_instruction: bool) -> int:
        """The event of an access by the role that runs."""
        role = self.simulator.program.role
        event = self.memory.access(role, how, self.box, write=write, by_instruction=by_instruction)
        if write:
            self.written.fill_(True)
        assert self.written.all(), f"{role.name} {how} {self.memory.what}{list(self.box)}, which nothing has written"
        return event

    def load(self, layout: Layout) -> Body:
        yield
        assert isinstance(layout, Layout), f"load in the layout {layout}"
        self.access("reads", write=False, by_instruction=True)
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> Body:
        yield
        assert (value.shape, value.data.dtype) == (self.shape, self.dtype), f"{value.shape} stored to {self.shape}"
        self.access("writes", write=True, by_instruction=True)
        self.data.copy_(value.data)


class Descriptor:
    """A tensor in memory and the block in which the copy engine moves it. What is outside reads as zero."""

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        block = list(block)
        self.base, self.dtype = base.detach(), base.dtype
        self.layout = Layout("shared", (tuple(block), base.dtype))
        nbytes = math.prod(block) * base.element_size()
        self.block_type = types.SimpleNamespace(shape=block, nbytes=nbytes)
        self.loaded = False
        self.stored: Tensor | None = None  # how often each element has been
        self.stored_at: list[tuple[int, ...]] = []  # where each store of a block begins, in the order of their start
        assert len(block) == base.dim() and max(block) <= 256, (block, base.shape)
        assert block[-1] * base.element_size() % ALIGNED == 0 == base.data_ptr() % ALIGNED, block
        assert base.stride()[-1] == 1, base.stride()
        assert all(stride * base.element_size() % ALIGNED == 0 for stride in base.stride()[:-1]), base.stride()

    def check(self, coordinates: Sequence[int], buffer: Buffer) -> None:
        """AssertionError unless the copy engine can move a block between here and the buffer."""
        block, coordinates = self.block_type.shape, list(coordinates)
        assert (buffer.shape, buffer.dtype) == (block, self.dtype), f"a block {block} and a buffer {buffer.shape}"
        assert buffer.layout == self.layout, f"{buffer.layout} holds a block in {self.layout}"
        assert len(coordinates) == len(block) and min(coordinates) >= 0, coordinates
        assert coordinates[-1] * self.base.element_size() % ALIGNED == 0, f"a block at column {coordinates[-1]}"

    def inside(self, coordinates: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where in the tensor the block's part is that lies inside, and where in the block."""
        sizes = list(zip(coordinates, self.block_type.shape, self.base.shape, strict=True))
        part = tuple(slice(min(start, size), min(start + block, size)) for start, block, size in sizes)
        return part, tuple(slice(0, place.stop - place.start) for place in part)

    def check_over(self, name: str) -> None:
        """AssertionError unless the launch has read the tensor, or written each of its elements once."""
        assert self.loaded != (self.stored is not None) or not self.base.numel(), (
            f"{name} is both read and written, or neither"
        )
        if self.stored is not None:
            wrong = (self.stored != 1).nonzero().tolist()
            assert not wrong, f"{name}: {len(wrong)} elements not written once, first {wrong[0]}"


def registers_of(value: Value, role: Role) -> float:
    """How many registers of each thread of the role hold the value."""
    return value.data.numel() * value.data.element_size() / 4 / (32 * role.warps)
