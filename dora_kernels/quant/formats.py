"""The container of a quantized weight, and the decoder of each storage format in plain PyTorch.

`QuantizedWeight.dequantize` is the specification of the formats, and the CPU path. parts.py checks the tensors of a
weight: the kernels trust them.

Letters: N out features, K in features; e = n * K + k is the index of an element in the flat row-major weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dora_kernels.quant.parts import FLOATING, PAIR, check_parts

# Weights are decoded in blocks of rows: on a CPU small enough for the cache, on a GPU large enough to be worth their
# launches. The temporaries of a block are some four times as large as its result in bfloat16.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "gpu": 1 << 24}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight (N, K) as its library stores it. The tensors are the library's own, not copies.

    format: a key of FORMATS; it defines `tensors`, `numbers` and how they are decoded.
    dtype: the library rounds a decoded value to it; nn.Linear would see it.

    Raises ValueError, naming the part, unless all of these fit each other: a file may say anything, and a kernel would
    read past the end of a part that is too short. They are checked when the weight is made, and never again.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_parts(self.format, self.shape, self.dtype, self.tensors, self.numbers)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Check again after pickle and deepcopy, which bypass __init__."""
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def device(self) -> torch.device:
        """The device of the packed weight."""
        return self.tensors[0].device

    @property
    def requires_grad(self) -> bool:
        """False: a quantized weight is frozen."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales and all."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dim(self) -> int:
        """2, like Tensor.dim() of a weight."""
        return len(self.shape)

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of garbage on the weight's device, like Tensor.new_empty."""
        return self.tensors[0].new_empty(*shape, dtype=dtype or self.dtype)

    def rounded_to(self, dtype: torch.dtype) -> QuantizedWeight:
        """This weight with decoded values rounded to `dtype`. Not for "nf4_torchao", which stores its dtype."""
        if dtype is self.dtype:
            return self
        if self.format == "nf4_torchao" or dtype not in FLOATING:
            expected = "that" if self.format == "nf4_torchao" else "a floating-point dtype"
            raise ValueError(f"rounded_to: dtype is {dtype!r} but the weight is {self.dtype}; expected {expected}")
        return _unchecked(self.format, self.shape, dtype, self.tensors, self.numbers)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.dequantize(rows)

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """weight[rows] (n, K), bit for bit what the library decodes, in `dtype` if given. rows: of step 1."""
        N, K = self.shape
        if rows is not None and not isinstance(rows, slice):
            raise ValueError(f"dequantize: rows is {type(rows).__name__}; expected a slice")
        start, stop, step = (rows or slice(None)).indices(N)
        if step != 1:
            raise ValueError(f"dequantize: rows has step {step}; expected 1")
        decode, dtype = FORMATS[self.format], self.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dequantize: dtype is {dtype!r}; expected a floating-point one")
        step = max(1, _BLOCK_ELEMENTS["cpu" if self.device.type == "cpu" else "gpu"] // max(K, 1))
        if stop - start <= step:
            stop = max(start, stop)
            return decode(self, start * K, stop * K).view(stop - start, K).to(dtype)
        dense = self.new_empty(stop - start, K, dtype=dtype)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            dense[first - start : last - start] = decode(self, first * K, last * K).view(last - first, K)
        return dense


Weight = Tensor | QuantizedWeight
DENSE = "dense"
"""The format of a Tensor."""


def flatten_weight(weight: Weight) -> tuple[list[Tensor], str, list[int], torch.dtype]:
    """(tensors, format, numbers, dtype): a weight as an operator of ops.py takes it."""
    if isinstance(weight, Tensor):
        return [weight], DENSE, [], weight.dtype
    return list(weight.tensors), weight.format, list(weight.numbers), weight.dtype


def unflatten_weight(
    tensors: list[Tensor], weight_format: str, numbers: list[int], dtype: torch.dtype, shape: tuple[int, int]
) -> Weight:
    """The weight (N, K) that `flatten_weight` was given: its tensors have been checked."""
    if weight_format == DENSE:
        return tensors[0]
    return _unchecked(weight_format, shape, dtype, tuple(tensors), tuple(numbers))


def _unchecked(*values: object) -> QuantizedWeight:
    """A QuantizedWeight of another's parts, not checked again: every call of an operator makes one."""
    weight = object.__new__(QuantizedWeight)
    if not torch.compiler.is_compiling():
        weight.__dict__.update(zip(_FIELDS, values, strict=True))
        return weight
    for name, value in zip(_FIELDS, values, strict=True):
        object.__setattr__(weight, name, value)  # which torch.compile traces; it does not trace __dict__.update
    return weight


_FIELDS = tuple(field.name for field in fields(QuantizedWeight))


# One function per format: the elements [first, last) of the flat weight, rounded to weight.dtype.


def _codebook4(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """bitsandbytes' NF4 and FP4: code[nibble e] * absmax[e // blocksize].

    tensors: packed uint8 (two elements a byte, the even one in the high nibble), absmax float32 (blocks,), code
    float32 (16,). Nested: absmax is uint8, and behind code come nested_absmax float32, nested_code float32 (256,) and
    offset float32 (): absmax[b] is then nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + offset.
    numbers: blocksize, nested_blocksize or 0. A block may reach over the end of a row.
    """
    packed, absmax, code, *nested = weight.tensors
    blocksize, nested_blocksize = weight.numbers
    block, last_block = first // blocksize, -(-last // blocksize)
    scale = absmax[block:last_block]
    if nested_blocksize:
        nested_absmax, nested_code, offset = nested
        outer = torch.arange(block, last_block, device=packed.device) // nested_blocksize
        scale = nested_code[scale.int()] * nested_absmax[outer] + offset
    return _decode_blocks(packed, code, scale, blocksize, first, last).to(weight.dtype)


def _nf4_torchao(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """torchao's NF4Tensor: lut[nibble e] * (scalers[b] / factor[b // scaler_block_size] + mean), b = e // block_size.

    tensors: packed uint8 (as codebook4), scalers int8 (blocks,), factor (blocks / scaler_block_size,), mean (), lut
    (16,). numbers: block_size, scaler_block_size. Every step is rounded to the tensors' dtype.
    """
    packed, scalers, factor, mean, lut = weight.tensors
    block_size, scaler_block_size = weight.numbers
    block, last_block = first // block_size, -(-last // block_size)
    outer = torch.arange(block, last_block, device=packed.device) // scaler_block_size
    scale = (scalers[block:last_block] / factor[outer]).to(weight.dtype) + mean
    return _decode_blocks(packed, lut, scale, block_size, first, last)


def _row8(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """int8 or float8 with one scale a row: q[n, k] * scale[n], in float32. tensors: q (N, K), scale float32 (N,)."""
    q, scale = weight.tensors
    K = weight.shape[1]
    rows = slice(first // K, last // K) if K else slice(0, 0)
    return (q[rows].float() * scale[rows, None]).to(weight.dtype).flatten()


def _hqq4(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """HQQ's 4 bits: (nibble - zero[g]) * scale[g], each step rounded to weight.dtype.

    tensors: packed uint8 (the first half of the elements in the high nibbles, the second half in the low ones), scale,
    zero (groups,). numbers: group_size, axis. The group of e is e // group_size along axis 1, and e modulo the number
    of groups along axis 0.
    """
    packed, scale, zero = weight.tensors
    group_size, axis = weight.numbers
    half = packed.numel()
    high, low = packed[first : min(last, half)] >> 4, packed[max(first - half, 0) : max(last - half, 0)] & 15
    e = torch.arange(first, last, device=packed.device)
    group = e // group_size if axis == 1 else e % scale.numel()
    values = torch.cat((high, low)).to(weight.dtype)
    return (values - zero[group].to(weight.dtype)) * scale[group].to(weight.dtype)


FORMATS: dict[str, Callable[[QuantizedWeight, int, int], Tensor]] = {
    "codebook4": _codebook4,
    "nf4_torchao": _nf4_torchao,
    "row8": _row8,
    "hqq4": _hqq4,
}
"""The decoder of each format."""


def _decode_blocks(packed: Tensor, code: Tensor, scale: Tensor, blocksize: int, first: int, last: int) -> Tensor:
    """code[nibble e] * scale[block of e] for e in [first, last); `scale` starts at the block of `first`.

    A block has an even number of elements, so that it starts with a byte.
    """
    start, stop = first // blocksize * blocksize, -(-last // blocksize) * blocksize
    nibbles = torch.arange(256, device=packed.device)
    # the two values of each byte as one number: looking up single numbers is ten times as fast as pairs
    pairs = torch.stack((code[nibbles >> 4], code[nibbles & 15]), 1).view(PAIR[code.dtype]).view(-1)
    values = pairs.index_select(0, packed[start // 2 : stop // 2].int()).view(code.dtype)
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(scale[:whole, None])
    values[whole * blocksize :] *= scale[whole:]  # the last block of the weight may be shorter: it has one scale
    return values[first - start : last - start]
