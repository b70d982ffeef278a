"""Checks of the tensors of a quantized weight, format by format: the kernels read as far as N, K and the numbers say.

formats.py defines the parts and the letters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_kernels.quant.layouts import layout_check

PAIR = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}
"""Dtype of a codebook -> the integer dtype that is as wide as two of its entries."""

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOAT32, _UINT8 = (torch.float32,), (torch.uint8,)
_MOST_ELEMENTS = 2**63 - 1
_LARGEST_NUMBER = 2**31 - 1
"""Kernels take the numbers as 32-bit literals, and no library makes a block of more elements."""


class Part(NamedTuple):
    """The requirements of one tensor of a weight."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    contiguous: bool = True
    """True if the kernels assume it; False for a part that they read by its strides."""


def check_parts(
    weight_format: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
) -> None:
    """Raise ValueError unless these are the parts of a weight (N, K) of this format and dtype.

    Fake and meta tensors pass like any others: shape, dtype, strides and device are all that is checked. Layers read
    their weight in every call, so that parts laid out as the last good ones of that format and size are not gone
    through one by one.
    """
    if not isinstance(shape, tuple) or not isinstance(numbers, tuple):
        raise ValueError(
            f"QuantizedWeight: shape is {shape!r} and numbers is {numbers!r}; expected (N, K) and a tuple of ints"
        )
    # torch.compile would trace through the cache. A TypeError: something unhashable, so no format, size or dtype
    cached = not torch.compiler.is_compiling()
    try:
        expected = (_expected_cached if cached else _Expected)(weight_format, dtype, shape, *shape, *numbers)
    except TypeError:
        expected = _Expected(weight_format, dtype, shape, *shape, *numbers)
    parts = expected.parts
    if not isinstance(tensors, tuple) or len(tensors) != len(parts):
        has = f"{len(tensors)} tensors" if isinstance(tensors, tuple) else f"a {type(tensors).__name__}"
        names = ", ".join(part.name for part in parts)
        raise ValueError(f"QuantizedWeight {weight_format}: tensors is {has}; expected a tuple of {names}")
    if expected.has_good_layout is not None and expected.has_good_layout(*tensors):
        return
    device = getattr(tensors[0], "device", None)
    for tensor, (name, dtypes, size, contiguous) in zip(tensors, parts, strict=True):
        if not (
            isinstance(tensor, Tensor)
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.dtype in dtypes
            and tensor.shape == size
            and (not contiguous or tensor.is_contiguous())
            and tensor.device == device
            and not tensor.requires_grad
        ):
            why = _why_not(tensor, dtypes, size, device)
            raise ValueError(f"QuantizedWeight {weight_format}: {name} {why} (shape {shape}, numbers {numbers})")
    if cached and all(type(tensor) is Tensor for tensor in tensors):
        expected.has_good_layout = layout_check(tensors)


def _why_not(tensor: object, dtypes: tuple[torch.dtype, ...], size: tuple[int, ...], device: object) -> str:
    """The reason that `tensor` is refused, and what was expected."""
    if not isinstance(tensor, Tensor):
        return f"is {type(tensor).__name__}; expected a torch.Tensor"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"is {'nested' if tensor.is_nested else tensor.layout}; expected torch.strided"
    if tensor.dtype not in dtypes:
        return f"is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}"
    if tensor.shape != size:
        return f"has shape {tuple(tensor.shape)}; expected {size}"
    if tensor.device != device:
        return f"is on {tensor.device} and the first part on {device}; expected one device"
    if tensor.requires_grad:
        return "requires a gradient; expected it frozen"
    return f"has strides {tensor.stride()}; expected it contiguous"


def _expected_parts(
    weight_format: object, dtype: object, shape: tuple[object, ...], *sizes_and_numbers: object
) -> tuple[Part, ...]:
    """The parts of a weight (N, K). Raises ValueError unless the format is known and these are its sizes."""
    if not isinstance(weight_format, str) or weight_format not in _FORMATS:
        raise ValueError(f"QuantizedWeight: format is {weight_format!r}; expected one of {', '.join(_FORMATS)}")
    names, parts_of = _FORMATS[weight_format]
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise ValueError(f"QuantizedWeight {weight_format}: dtype is {dtype!r}; expected one of {FLOATING}")
    names = ("N", "K", *names)
    if len(shape) != 2 or len(sizes_and_numbers) != len(names):
        raise ValueError(
            f"QuantizedWeight {weight_format}: shape and numbers are {sizes_and_numbers}; expected {', '.join(names)}"
        )
    checked: list[int] = []
    for name, value in zip(names, sizes_and_numbers, strict=True):
        most = _MOST_ELEMENTS if name in ("N", "K") else _LARGEST_NUMBER
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"QuantizedWeight {weight_format}: {name} is {value!r}; expected an int from 0 to {most}")
        checked.append(value)
    N, K, *numbers = checked
    if N * K > _MOST_ELEMENTS:
        raise ValueError(f"QuantizedWeight {weight_format}: shape is {(N, K)}; expected at most 2^63 - 1 elements")
    return parts_of(N, K, dtype, *numbers)


class _Expected:
    """The parts of a weight, and whether tensors are laid out as some that have been found to be these parts."""

    def __init__(self, *format_and_sizes: Any) -> None:
        self.parts = _expected_parts(*format_and_sizes)
        self.has_good_layout: Callable[..., bool] | None = None


_expected_cached = functools.lru_cache(1024, typed=True)(_Expected)


def _codebook4(N: int, K: int, dtype: torch.dtype, blocksize: int, nested_blocksize: int) -> tuple[Part, ...]:
    _check_blocksize("codebook4", "blocksize", blocksize)
    blocks = -(-N * K // blocksize)
    packed, code = Part("packed", _UINT8, (-(-N * K // 2),)), Part("code", _FLOAT32, (16,))
    if not nested_blocksize:
        return packed, Part("absmax", _FLOAT32, (blocks,)), code
    nested = (
        Part("nested_absmax", _FLOAT32, (-(-blocks // nested_blocksize),)),
        Part("nested_code", _FLOAT32, (256,)),  # as many as a uint8 can ask for
        Part("offset", _FLOAT32, ()),
    )
    return packed, Part("absmax", _UINT8, (blocks,)), code, *nested


def _nf4_torchao(N: int, K: int, dtype: torch.dtype, block_size: int, scaler_block_size: int) -> tuple[Part, ...]:
    _check_blocksize("nf4_torchao", "block_size", block_size)
    if not scaler_block_size:
        raise ValueError("QuantizedWeight nf4_torchao: scaler_block_size is 0; expected a positive int")
    if dtype not in PAIR:
        raise ValueError(f"QuantizedWeight nf4_torchao: dtype is {dtype}; expected float32, bfloat16 or float16")
    blocks = -(-N * K // block_size)
    return (
        Part("packed", _UINT8, (-(-N * K // 2),)),
        Part("scalers", (torch.int8,), (blocks,)),
        Part("factor", (dtype,), (-(-blocks // scaler_block_size),)),
        Part("mean", (dtype,), ()),
        Part("lut", (dtype,), (16,)),
    )


def _row8(N: int, K: int, dtype: torch.dtype) -> tuple[Part, ...]:
    q_dtypes = (torch.int8, torch.float8_e4m3fn)
    return Part("q", q_dtypes, (N, K), contiguous=False), Part("scale", _FLOAT32, (N,), contiguous=False)


def _hqq4(N: int, K: int, dtype: torch.dtype, group_size: int, axis: int) -> tuple[Part, ...]:
    # byte i has element i in its high nibble, and in its low one element i of the second half
    if axis not in (0, 1) or not group_size or N * K % group_size or N * K % 2:
        raise ValueError(
            f"QuantizedWeight hqq4: group_size is {group_size}, axis {axis} and the shape {(N, K)}; "
            "expected axis 0 or 1, and an even number of elements in whole groups"
        )
    groups = N * K // group_size
    return (
        Part("packed", _UINT8, (N * K // 2,)),
        Part("scale", FLOATING, (groups,)),
        Part("zero", FLOATING, (groups,)),
    )


def _check_blocksize(weight_format: str, name: str, blocksize: int) -> None:
    """Raise ValueError unless a block consists of whole bytes."""
    if not blocksize or blocksize % 2:
        raise ValueError(f"QuantizedWeight {weight_format}: {name} is {blocksize}; expected an even, positive int")


_FORMATS: dict[str, tuple[tuple[str, ...], Callable[..., tuple[Part, ...]]]] = {
    "codebook4": (("blocksize", "nested_blocksize"), _codebook4),
    "nf4_torchao": (("block_size", "scaler_block_size"), _nf4_torchao),
    "row8": ((), _row8),
    "hqq4": (("group_size", "axis"), _hqq4),
}
"""Format -> the names of its numbers, and the function from N, K, dtype and these numbers to its parts."""
