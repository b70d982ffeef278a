"""The decoders of weights stored in 4 bits (see dora_kernels/quant/formats.py), for kernels: stored_weight.py.

Their codes are loaded in whole vectors, their scales in 4 bytes at least, and no address is read from memory: in a loop
Triton loads all of that steps ahead. What it depends on, the number of a code and that of a nested scale, is looked up
in tables that were loaded before (`stored_weight.with_tables`).
"""

import triton
import triton.language as tl

from dora_kernels.kernels.tile import Matrix, known_multiple, load


@triton.jit
def codebook4(weight, offs_n, mask_n, k, K, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """code[nibble] * absmax, [BLOCK_N, BLOCK_K] in float32, 0 outside; a nested absmax is decoded first."""
    element, mask = _groups(offs_n, mask_n, k, K, FORMAT.group, BLOCK_K)
    block = element // FORMAT.sizes[0]
    absmax = _load_numbers(weight.pointers[1], block, mask, FORMAT)  # [BLOCK_N, BLOCK_K // FORMAT.group]
    if FORMAT.sizes[1] > 0:
        nested_absmax = tl.load(weight.pointers[3] + block // FORMAT.sizes[1], mask=mask, other=0.0)
        # of one dimension, this is a gather from shared memory: 256 numbers are too many for the lanes of a warp
        index = tl.reshape(absmax.to(tl.int32), [absmax.numel])
        code = tl.reshape(tl.gather(weight.pointers[4], index, 0), absmax.shape)
        absmax = tl.where(mask, code * nested_absmax + weight.pointers[5], 0.0)
    codes = _nibbles(weight, offs_n, mask_n, k, K, FORMAT, BLOCK_K)
    return _scaled(looked_up(weight.pointers[2], codes, BLOCK_N, BLOCK_K), absmax, FORMAT.group, BLOCK_N, BLOCK_K)


@triton.jit
def nf4_torchao(weight, offs_n, mask_n, k, K, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """lut[nibble] * scale, [BLOCK_N, BLOCK_K] in float32, 0 outside; scale: scaler / factor + mean, rounded twice."""
    element, mask = _groups(offs_n, mask_n, k, K, FORMAT.group, BLOCK_K)
    block = element // FORMAT.sizes[0]
    scaler = _load_numbers(weight.pointers[1], block, mask, FORMAT).to(tl.float32)
    factor = _load_numbers(weight.pointers[2], block // FORMAT.sizes[1], mask, FORMAT).to(tl.float32)
    quotient = tl.div_rn(scaler, tl.where(mask, factor, 1.0)).to(FORMAT.dtype).to(tl.float32)
    scale = (quotient + weight.pointers[3]).to(FORMAT.dtype).to(tl.float32)
    codes = _nibbles(weight, offs_n, mask_n, k, K, FORMAT, BLOCK_K)
    values = looked_up(weight.pointers[4], codes, BLOCK_N, BLOCK_K)
    return _scaled(values, tl.where(mask, scale, 0.0), FORMAT.group, BLOCK_N, BLOCK_K)


@triton.jit
def hqq4(weight, offs_n, mask_n, k, K, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(code - zero) * scale, each rounded to FORMAT.dtype, [BLOCK_N, BLOCK_K] in float32, 0 outside."""
    # a byte serves two distant rows, which two programs load: one byte a weight, half of them from the L2 cache
    half, groups = weight.numbers[0], weight.numbers[1]
    element, mask = _groups(offs_n, mask_n, k, K, 1, BLOCK_K)
    packed = tl.load(weight.pointers[0] + _wrapped(offs_n, k, K, half, FORMAT.sizes[2], BLOCK_K), mask=mask, other=0)
    codes = tl.where(element < half, packed >> 4, packed & 15).to(tl.float32)
    if FORMAT.sizes[1] == 1:
        element, mask = _groups(offs_n, mask_n, k, K, FORMAT.group, BLOCK_K)
        group = element // FORMAT.sizes[0]
    else:
        group = _wrapped(offs_n, k, K, groups, FORMAT.sizes[3], BLOCK_K)
    scale = _load_numbers(weight.pointers[1], group, mask, FORMAT).to(FORMAT.dtype).to(tl.float32)
    zero = _load_numbers(weight.pointers[2], group, mask, FORMAT).to(FORMAT.dtype).to(tl.float32)
    if FORMAT.group > 1:
        codes = tl.reshape(codes, [BLOCK_N, BLOCK_K // FORMAT.group, FORMAT.group])
        scale, zero = scale[:, :, None], zero[:, :, None]
    tile = (codes - zero).to(FORMAT.dtype).to(tl.float32) * scale
    return tl.reshape(tile, [BLOCK_N, BLOCK_K])


@triton.jit
def codebook(pointer):
    """The 16 numbers at pointer, twice, in float32: one for each lane of a warp, see `looked_up`."""
    return tl.load(pointer + tl.arange(0, 32) % 16).to(tl.float32)


@triton.jit
def looked_up(table, codes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """table[codes], [BLOCK_N, BLOCK_K], of a table of 32 numbers."""
    # Each lane of a warp keeps a number of the table, and a lookup is one shuffle. Triton gives the 32 lanes the last
    # dimension and the warps the lowest part of the first: these are made of the rows and columns that lanes and warps
    # have in the sums of mma and wgmma instructions, so that nothing is moved before or after the shuffles.
    LOOKUPS: tl.constexpr = BLOCK_N * BLOCK_K // 32
    codes = tl.reshape(codes, [BLOCK_N // 16, 2, 8, 2, BLOCK_K // 16, 4, 2])
    codes = tl.reshape(tl.permute(codes, (6, 1, 4, 3, 0, 2, 5)), [LOOKUPS, 32])
    values = tl.gather(tl.broadcast_to(table[None, :], [LOOKUPS, 32]), codes, 1)
    values = tl.reshape(values, [2, 2, BLOCK_K // 16, 2, BLOCK_N // 16, 8, 4])
    return tl.reshape(tl.permute(values, (4, 1, 5, 3, 2, 6, 0)), [BLOCK_N, BLOCK_K])


@triton.jit
def _nibbles(weight, offs_n, mask_n, k, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The 4-bit codes of weight[offs_n, k : k + BLOCK_K], the high nibble first, 0 outside; [BLOCK_N, BLOCK_K]."""
    if FORMAT.group % 2 == 0:
        # K is even, so that the codes of a byte are neighbours in a row and each byte is loaded once: 2 instructions of
        # 16 bytes for the 64 codes that a thread has of a tile of 64 x 128. A byte for each code would take 64
        row_bytes = known_multiple(weight.numbers[0], FORMAT.group // 2)
        offs_byte = tl.multiple_of(k // 2, BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2).to(tl.int64)
        rows = Matrix(weight.pointers[0], row_bytes, 1)
        packed = load(rows, offs_n, offs_byte, mask_n, offs_byte < row_bytes)  # [BLOCK_N, BLOCK_K // 2]
        codes = tl.interleave(packed >> 4, packed & 15)
    else:
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        element = offs_n[:, None] * K + offs_k[None, :]
        packed = tl.load(weight.pointers[0] + element // 2, mask=mask_n[:, None] & (offs_k < K)[None, :], other=0)
        codes = tl.where(element % 2 == 0, packed >> 4, packed & 15)
    return codes.to(tl.int32)


@triton.jit
def _load_numbers(pointer, index, mask, FORMAT: tl.constexpr):
    """pointer[index], 0 outside the mask."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    BITS: tl.constexpr = dtype.primitive_bitwidth
    if FORMAT.words and BITS < 32:
        # out of the word it lies in: asynchronous copies have 4 bytes at least, and Triton loads nothing else ahead
        word = tl.load(pointer.to(tl.pointer_type(tl.uint32)) + index // (32 // BITS), mask=mask, other=0)
        numbers = word >> (index % (32 // BITS) * BITS).to(tl.uint32)
        if BITS == 8:
            numbers = numbers.to(tl.uint8)
        else:
            numbers = numbers.to(tl.uint16)
        numbers = numbers.to(dtype, bitcast=True)
    else:
        numbers = tl.load(pointer + index, mask=mask, other=0)
    return numbers


@triton.jit
def _groups(offs_n, mask_n, k, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first element, in the flat weight, of each run of GROUP columns, and which runs there are."""
    offs_k = k + tl.arange(0, BLOCK_K // GROUP).to(tl.int64) * GROUP
    # unsigned: to divide it by the size of a block is to shift it, without a case for numbers below 0
    element = (offs_n[:, None] * K + offs_k[None, :]).to(tl.uint64)
    return element, mask_n[:, None] & (offs_k < K)[None, :]


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
def _wrapped(offs_n, k, K, period, WHOLE_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(n * K + k) % period; WHOLE_ROWS: period is a multiple of K, and one remainder a row will do."""
    offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
    if WHOLE_ROWS:
        result = (offs_n * K % period)[:, None] + offs_k[None, :]
    else:
        result = (offs_n[:, None] * K + offs_k[None, :]) % period
    return result
