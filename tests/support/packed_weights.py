"""Quantized weights made of random numbers, in every format; what libraries make is compared elsewhere."""

import torch
from torch import Tensor

from dora_kernels.quant import QuantizedWeight
from tests.support.problem import DEVICE

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantized(kind: str, N: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedWeight:
    """A weight (N, K) of a kind in KINDS, its rows of about norm 1."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype).to(DEVICE)

    def positive(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (0.5 + torch.rand(shape, generator=generator)).to(dtype).to(DEVICE)

    return KINDS[kind](N, K, dtype, max(K, 1) ** -0.5, integers, positive)


def _codebook4(blocksize: int, nested_blocksize: int):
    def make(N, K, dtype, size, integers, positive):
        blocks = -(-N * K // blocksize)
        code = torch.tensor(NF4, device=DEVICE)
        tensors = (integers(0, 256, -(-N * K // 2)), size * positive(blocks), code)
        if nested_blocksize:
            outer = size * positive(-(-blocks // nested_blocksize))
            tensors = (tensors[0], integers(0, 256, blocks), code, outer, positive(256), outer.mean())
        return QuantizedWeight("codebook4", (N, K), dtype, tensors, (blocksize, nested_blocksize))

    return make


def _row8(q_dtype: torch.dtype):
    def make(N, K, dtype, size, integers, positive):
        q = integers(-127, 128, N, K, dtype=torch.int8)
        return QuantizedWeight("row8", (N, K), dtype, (q.to(q_dtype), size / 64 * positive(N)))

    return make


def _nf4_torchao(block_size: int, scaler_block_size: int):
    def make(N, K, dtype, size, integers, positive):
        blocks = -(-N * K // block_size)
        lut = torch.tensor(NF4, device=DEVICE).to(dtype)
        scalers, factor = integers(-127, 128, blocks, dtype=torch.int8), positive(-(-blocks // scaler_block_size))
        mean = torch.tensor(size, device=DEVICE)
        tensors = (integers(0, 256, -(-N * K // 2)), scalers, 200 / size * factor, mean, lut)
        tensors = (*tensors[:2], *(tensor.to(dtype) for tensor in tensors[2:]))
        return QuantizedWeight("nf4_torchao", (N, K), dtype, tensors, (block_size, scaler_block_size))

    return make


def _hqq4(group_size: int, axis: int):
    def make(N, K, dtype, size, integers, positive):
        groups = N * K // group_size
        zero = 7 * positive(groups, dtype=dtype)
        tensors = (integers(0, 256, N * K // 2), (size * 0.2 * positive(groups)).to(dtype), zero)
        return QuantizedWeight("hqq4", (N, K), dtype, tensors, (group_size, axis))

    return make


KINDS = {
    "codebook4": _codebook4(64, 0),
    "codebook4 of 32": _codebook4(32, 0),
    "codebook4 nested": _codebook4(64, 4),
    "int8": _row8(torch.int8),
    "float8": _row8(torch.float8_e4m3fn),
    "nf4_torchao": _nf4_torchao(64, 4),
    "hqq4 axis 0": _hqq4(8, 0),
    "hqq4 axis 1": _hqq4(8, 1),
}
# N * K is a multiple of twice HQQ's group; the others take any shape
HQQ_KINDS = ("hqq4 axis 0", "hqq4 axis 1")
