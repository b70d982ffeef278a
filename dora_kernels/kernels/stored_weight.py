"""How the kernels read a weight: one decode function per storage format (see dora_kernels/quant/formats.py).

A weight reaches a kernel as a tuple of pointers, a tuple of run-time numbers and a few constexprs (`arguments`). It is
decoded in registers to what its library decodes it to, rounding included.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.tile import TL_DTYPE, Launch, load_tile, low_rank_tile
from dora_kernels.planning import configs
from dora_kernels.quant import DENSE, Weight, parts


@triton.jit
def weight_tile(
    pointers,
    numbers,
    offs_n,
    mask_n,
    k,
    K,
    FORMAT: tl.constexpr,
    SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight[offs_n, k : k + BLOCK_K] in WEIGHT_DTYPE, 0 outside; k is a multiple of BLOCK_K."""
    offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
    if FORMAT == "dense":
        tile = load_tile(pointers[0], offs_n, offs_k, mask_n, offs_k < K, numbers[0], numbers[1])
    elif FORMAT == "int8" or FORMAT == "float8":
        tile = load_tile(pointers[0], offs_n, offs_k, mask_n, offs_k < K, numbers[0], numbers[1])
        scale = tl.load(pointers[1] + offs_n * numbers[2], mask=mask_n, other=0.0).to(tl.float32)
        if FORMAT == "float8":
            tile = _float8(tile)
        tile = scale[:, None] * tile.to(tl.float32)
    elif FORMAT == "codebook4":
        codes = _nibbles(pointers[0], numbers[0], offs_n, mask_n, k, K, GROUP, BLOCK_K)
        scale = _codebook4_scale(pointers, offs_n, mask_n, k, K, SIZES, GROUP, BLOCK_K)
        tile = _scaled(tl.load(pointers[2] + codes), scale, GROUP, BLOCK_N, BLOCK_K)
    elif FORMAT == "nf4_torchao":
        codes = _nibbles(pointers[0], numbers[0], offs_n, mask_n, k, K, GROUP, BLOCK_K)
        scale = _nf4_torchao_scale(pointers, offs_n, mask_n, k, K, SIZES, GROUP, WEIGHT_DTYPE, BLOCK_K)
        tile = _scaled(tl.load(pointers[4] + codes).to(tl.float32), scale, GROUP, BLOCK_N, BLOCK_K)
    else:
        tl.static_assert(FORMAT == "hqq4")
        tile = _hqq4(pointers, numbers, offs_n, mask_n, k, K, SIZES, GROUP, WEIGHT_DTYPE, BLOCK_N, BLOCK_K)
    return tile.to(WEIGHT_DTYPE)


@triton.jit
def _float8(bits):
    """float32 of the bits of float8_e4m3fn, which not every target converts: a float16 less 8 in its exponent."""
    magnitude = (bits & 0x7F).to(tl.uint16)
    half = ((bits & 0x80).to(tl.uint16) << 8) | (magnitude << 7)
    value = 256.0 * half.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def _nibbles(packed_ptr, row_bytes, offs_n, mask_n, k, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """The 4-bit codes of weight[offs_n, k : k + BLOCK_K], the high nibble first, 0 outside."""
    if GROUP % 2 == 0:
        # K is even, so that the codes of a byte are neighbours in a row and each byte is loaded once: 2 instructions of
        # 16 bytes for the 64 codes that a thread has of a tile of 64 x 128. A byte for each code would take 64
        offs_byte = tl.multiple_of(k // 2, BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2).to(tl.int64)
        packed = load_tile(packed_ptr, offs_n, offs_byte, mask_n, offs_byte < row_bytes, row_bytes, 1)
        codes = tl.interleave(packed >> 4, packed & 15)
    else:
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        element = offs_n[:, None] * K + offs_k[None, :]
        packed = tl.load(packed_ptr + element // 2, mask=mask_n[:, None] & (offs_k < K)[None, :], other=0)
        codes = tl.where(element % 2 == 0, packed >> 4, packed & 15)
    return codes.to(tl.int32)


@triton.jit
def _groups(offs_n, mask_n, k, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first element, in the flat weight, of each run of GROUP columns, and which runs there are."""
    offs_k = k + tl.arange(0, BLOCK_K // GROUP).to(tl.int64) * GROUP
    return offs_n[:, None] * K + offs_k[None, :], mask_n[:, None] & (offs_k < K)[None, :]


@triton.jit
def _scaled(values, scale, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """values [BLOCK_N, BLOCK_K] times scale [BLOCK_N, BLOCK_K // GROUP], one for each run of GROUP columns."""
    if GROUP > 1:
        values = tl.reshape(values, [BLOCK_N, BLOCK_K // GROUP, GROUP]) * scale[:, :, None]
        values = tl.reshape(values, [BLOCK_N, BLOCK_K])
    else:
        values *= scale
    return values


@triton.jit
def _codebook4_scale(pointers, offs_n, mask_n, k, K, SIZES: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """absmax, [BLOCK_N, BLOCK_K // GROUP] in float32, 0 outside."""
    element, mask = _groups(offs_n, mask_n, k, K, GROUP, BLOCK_K)
    block = element // SIZES[0]
    scale = tl.load(pointers[1] + block, mask=mask, other=0)
    if SIZES[1] > 0:
        code = tl.load(pointers[4] + scale.to(tl.int32))
        nested_absmax = tl.load(pointers[3] + block // SIZES[1], mask=mask, other=0.0)
        scale = tl.where(mask, code * nested_absmax + tl.load(pointers[5]), 0.0)
    return scale


@triton.jit
def _nf4_torchao_scale(
    pointers,
    offs_n,
    mask_n,
    k,
    K,
    SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scaler / factor + mean, each rounded to DTYPE, [BLOCK_N, BLOCK_K // GROUP] in float32, 0 outside."""
    element, mask = _groups(offs_n, mask_n, k, K, GROUP, BLOCK_K)
    block = element // SIZES[0]
    scaler = tl.load(pointers[1] + block, mask=mask, other=0).to(tl.float32)
    factor = tl.load(pointers[2] + block // SIZES[1], mask=mask, other=1.0).to(tl.float32)
    quotient = tl.div_rn(scaler, factor).to(DTYPE).to(tl.float32)
    scale = (quotient + tl.load(pointers[3]).to(tl.float32)).to(DTYPE).to(tl.float32)
    return tl.where(mask, scale, 0.0)


@triton.jit
def _wrapped(offs_n, k, K, period, WHOLE_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(n * K + k) % period; WHOLE_ROWS: period is a multiple of K, and one remainder a row will do."""
    offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
    if WHOLE_ROWS:
        result = (offs_n * K % period)[:, None] + offs_k[None, :]
    else:
        result = (offs_n[:, None] * K + offs_k[None, :]) % period
    return result


@triton.jit
def _hqq4(
    pointers,
    numbers,
    offs_n,
    mask_n,
    k,
    K,
    SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(code - zero) * scale, each rounded to DTYPE, [BLOCK_N, BLOCK_K] in float32, 0 outside."""
    # a byte serves two distant rows, which two programs load: one byte a weight, half of them from the L2 cache
    element, mask = _groups(offs_n, mask_n, k, K, 1, BLOCK_K)
    packed = tl.load(pointers[0] + _wrapped(offs_n, k, K, numbers[0], SIZES[2], BLOCK_K), mask=mask, other=0)
    codes = tl.where(element < numbers[0], packed >> 4, packed & 15).to(tl.float32)
    if SIZES[1] == 1:
        element, mask = _groups(offs_n, mask_n, k, K, GROUP, BLOCK_K)
        group = element // SIZES[0]
    else:
        group = _wrapped(offs_n, k, K, numbers[1], SIZES[3], BLOCK_K)
    scale = tl.load(pointers[1] + group, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
    zero = tl.load(pointers[2] + group, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
    if GROUP > 1:
        codes = tl.reshape(codes, [BLOCK_N, BLOCK_K // GROUP, GROUP])
        scale, zero = scale[:, :, None], zero[:, :, None]
    tile = (codes - zero).to(DTYPE).to(tl.float32) * scale
    return tl.reshape(tile, [BLOCK_N, BLOCK_K])


@triton.jit
def direction_tile(
    weight_ptrs,  # (N, K), in the storage of its format
    weight_numbers,
    lora_A_ptr,  # (R, K)
    lora_B_ptr,  # (N, R)
    offs_n,
    mask_n,
    k,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scaling,
    FORMAT: tl.constexpr,
    SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """weight and weight + scaling * lora_B @ lora_A at offs_n and the BLOCK_K columns from k, a multiple of BLOCK_K."""
    w = weight_tile(
        weight_ptrs, weight_numbers, offs_n, mask_n, k, K, FORMAT, SIZES, GROUP, WEIGHT_DTYPE, BLOCK_N, BLOCK_K
    ).to(ACC_DTYPE)
    direction = w
    if HAS_ADAPTER:
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        direction += scaling * low_rank_tile(
            lora_B_ptr,
            lora_A_ptr,
            offs_n,
            offs_k,
            mask_n,
            offs_k < K,
            R,
            stride_bn,
            stride_br,
            stride_ak,
            stride_ar,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
            ONE_CHUNK,
            OPERAND_DTYPE,
            ACC_DTYPE,
            DOT_PRECISION,
        )
    return w, direction


def weight_config(how: Launch, kernel: str, weight: Weight, R: int) -> configs.Config:
    """The configuration of the norm or merge kernel: fewer rows where decoding would spill registers."""
    config = how.config(kernel, R)
    if isinstance(weight, torch.Tensor):
        return config
    share = 1
    if weight.format != "row8" and weight.shape[1] % 2:
        share = 4  # each code of 4 bits has an address of its own: 1256 bytes a thread on sm_120 otherwise
    elif weight.format in ("codebook4", "nf4_torchao") and how.operand.itemsize == 4:
        share = 2  # 400 bytes a thread on sm_120 otherwise
    elif weight.format == "codebook4" and weight.shape[1] % 64:
        share = 2  # a scale for every 16 codes and not for 64: 136 bytes a thread on sm_100 otherwise
    elif weight.format == "codebook4" and R > configs.HIGH_RANK and how.facts.target == "sm_80":
        share = 2  # 88 bytes a thread otherwise
    return dataclasses.replace(config, BLOCK_N=max(16, config.BLOCK_N // share))


def weight_stages(weight: Weight, config: configs.Config) -> int | None:
    """For how many steps of a loop over K all its loads are on their way; None: those that feed no dot are waited for.

    None where that would cost more than it hides: the 64 codes that a thread looks up in the codebook, or HQQ's scale
    for every weight, would pass through shared memory too (135 KB, and one program a multiprocessor instead of two),
    HQQ's scale for every group would spill (128 bytes a thread on sm_120), and what is not loaded in whole vectors is
    loaded as before, but copied once more.
    """
    rows, weight_format, _, _ = parts(weight)
    if weight_format in ("codebook4", "hqq4"):
        return None
    if weight_format in (DENSE, "row8") and (rows[0].stride(1) != 1 or rows[0].stride(0) % 16):
        return None
    return config.num_stages


def arguments(weight: Weight, BLOCK_K: int) -> tuple[tuple, tuple, dict[str, object]]:
    """(pointers, numbers, constexprs): a weight's arguments of a kernel whose tiles have BLOCK_K columns."""
    N, K = weight.shape
    pointers, weight_format, sizes, _ = parts(weight)
    numbers: tuple[int, ...] = ()
    # columns from one multiple of GROUP to the next share a scale in every row: 64 where K is a multiple of 64
    group = 1
    if weight_format == DENSE:
        numbers = pointers[0].stride()
    elif weight_format == "row8":
        q, scale = pointers
        weight_format = "int8" if q.dtype == torch.int8 else "float8"
        pointers = q.view(torch.int8 if weight_format == "int8" else torch.uint8), scale
        numbers = (*q.stride(), *scale.stride())
    elif weight_format == "hqq4":
        group_size, axis = sizes
        half, groups = N * K // 2, N * K // group_size
        numbers = half, groups
        sizes = group_size, axis, K > 0 and half % K == 0, K > 0 and groups % K == 0
        group = math.gcd(K, group_size, BLOCK_K) if axis == 1 else 1
    else:
        numbers = (K // 2,)
        group = math.gcd(K, sizes[0], BLOCK_K)
    constexprs = {"FORMAT": weight_format, "SIZES": tuple(sizes), "GROUP": group}
    return tuple(pointers), numbers, constexprs | {"WEIGHT_DTYPE": TL_DTYPE[weight.dtype]}
