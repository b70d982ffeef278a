"""The row norm of weight + scaling * lora_B @ lora_A, and with it the gain.

With few rows or many columns the sum over K is split; the partial sums are added in a fixed order, so that the
result is bitwise the same in every call.
"""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.stored_weight import arguments, direction_tile, weight_config, weight_stages
from dora_kernels.kernels.tile import Launch, add_chunk, block_offsets, known_multiple, load_tile, rank_multiple
from dora_kernels.planning.configs import ceil_div
from dora_kernels.quant import Weight


@triton.jit
def row_squares(
    weight_ptrs,  # (N, K), in the storage of its format
    weight_numbers,
    lora_A_ptr,  # (R, K)
    lora_B_ptr,  # (N, R)
    offs_n,
    mask_n,
    start,
    end,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum over k from start to end of (weight + scaling * lora_B @ lora_A)[offs_n, k]^2."""
    squares = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
    if FORMAT == "dense" and not ONE_CHUNK and STAGES is not None:
        # one loop over k and r: Triton pipelines innermost loops only. Each step would wait twice, for the weight and
        # for the first chunks; here the weight comes with the last chunk, and the masks ask for nothing before
        chunks = tl.cdiv(R, BLOCK_R)
        steps = tl.cdiv((end - start).to(tl.int32), BLOCK_K) * chunks
        product = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC_DTYPE)
        for step in tl.range(0, steps, num_stages=STAGES):
            chunk = step % chunks
            last = chunk == chunks - 1
            offs_k = start + (step // chunks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            mask_k_if_last = offs_k < tl.where(last, K, 0)
            w = load_tile(weight_ptrs[0], offs_n, offs_k, mask_n, mask_k_if_last, weight_numbers[0], weight_numbers[1])
            product = add_chunk(
                product, lora_B_ptr, lora_A_ptr, chunk * BLOCK_R, offs_n, offs_k, mask_n, mask_k, R,
                stride_bn, stride_br, stride_ak, stride_ar, BLOCK_R, OPERAND_DTYPE, ACC_DTYPE, DOT_PRECISION,
            )  # fmt: skip
            if last:
                direction = w.to(ACC_DTYPE) + scaling * product
                squares += tl.sum(tl.where(mask_k[None, :], direction * direction, 0.0), axis=1)
                product = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC_DTYPE)
    else:
        for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
            _, direction = direction_tile(
                weight_ptrs,
                weight_numbers,
                lora_A_ptr,
                lora_B_ptr,
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
                FORMAT,
                SIZES,
                GROUP,
                WEIGHT_DTYPE,
                True,
                BLOCK_N,
                BLOCK_K,
                BLOCK_R,
                ONE_CHUNK,
                OPERAND_DTYPE,
                ACC_DTYPE,
                DOT_PRECISION,
            )
            # columns past K are zero in weight and lora_A, but not in the product where lora_B is inf or NaN
            mask_k = k + tl.arange(0, BLOCK_K) < K
            squares += tl.sum(tl.where(mask_k[None, :], direction * direction, 0.0), axis=1)
    return squares


@triton.jit
def _norm_kernel(
    weight_ptrs,  # (N, K), in the storage of its format
    weight_numbers,
    lora_A_ptr,  # (R, K)
    lora_B_ptr,  # (N, R)
    partial_ptr,  # (splits, N) in ACC_DTYPE, contiguous
    N,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    columns_per_split,
    scaling,
    FORMAT: tl.constexpr,
    SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial[split, n] = sum over the split's k of (weight + scaling * lora_B @ lora_A)[n, k]^2.

    One program owns BLOCK_N rows and the columns of one split.
    """
    R, stride_bn = known_multiple(R, R_MULTIPLE), known_multiple(stride_bn, R_MULTIPLE)
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    mask_n = offs_n < N
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    squares = row_squares(
        weight_ptrs,
        weight_numbers,
        lora_A_ptr,
        lora_B_ptr,
        offs_n,
        mask_n,
        start,
        end,
        K,
        R,
        stride_ar,
        stride_ak,
        stride_bn,
        stride_br,
        scaling,
        FORMAT,
        SIZES,
        GROUP,
        WEIGHT_DTYPE,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
        ONE_CHUNK,
        OPERAND_DTYPE,
        ACC_DTYPE,
        DOT_PRECISION,
        STAGES,
    )
    tl.store(partial_ptr + split * N + offs_n, squares, mask=mask_n)


@triton.jit
def root(squares, ACC_DTYPE: tl.constexpr):
    """sqrt(squares), rounded to nearest: tl.sqrt is approximate in float32, and its exact form exists for that only."""
    if ACC_DTYPE == tl.float32:
        result = tl.sqrt_rn(squares)
    else:
        result = tl.sqrt(squares)
    return result


@triton.jit
def gain_of(magnitude, norm, ACC_DTYPE: tl.constexpr):
    """magnitude / norm, rounded to nearest as in `root`; 0 where norm is 0."""
    divisor = tl.where(norm == 0, 1.0, norm)
    if ACC_DTYPE == tl.float32:
        gain = tl.div_rn(magnitude, divisor)
    else:
        gain = magnitude / divisor
    return tl.where(norm == 0, 0.0, gain)


@triton.jit
def _finish_norm_kernel(
    partial_ptr,  # (splits, N)
    magnitude_ptr,  # (N,)
    norm_ptr,  # (N,)
    gain_ptr,  # (N,)
    N,
    splits,
    stride_magnitude,
    HAS_MAGNITUDE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """norm = sqrt(sum of the partial sums); gain = magnitude / norm, 0 where norm is 0.

    One program owns BLOCK_N rows.
    """
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    squares = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
    for split in range(0, splits):
        squares += tl.load(partial_ptr + split * N + offs_n, mask=mask_n, other=0.0)
    norm = root(squares, ACC_DTYPE)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    if HAS_MAGNITUDE:
        magnitude = tl.load(magnitude_ptr + offs_n * stride_magnitude, mask=mask_n, other=0.0).to(ACC_DTYPE)
        tl.store(gain_ptr + offs_n, gain_of(magnitude, norm, ACC_DTYPE), mask=mask_n)


def norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """norm (N,) and, with a magnitude, gain (N,); as `reference.norm_ref`."""
    N, K = weight.shape
    R = lora_A.shape[0]
    how = Launch.of(weight, lora_A.dtype)
    config = weight_config(how, "norm", weight, R)
    tiles = config.tiles(R)
    rows = ceil_div(N, config.BLOCK_N)
    columns_per_split, splits = how.split(rows, K, config.BLOCK_K, config)
    weight_ptrs, numbers, constexprs = arguments(weight, config.BLOCK_K)
    partial = weight.new_empty((splits, N), dtype=how.accumulate)
    result = weight.new_empty((N,), dtype=how.accumulate)
    gain = None if magnitude is None else torch.empty_like(result)
    if N == 0:
        return result, gain
    _norm_kernel[rows, splits](
        weight_ptrs,
        numbers,
        lora_A,
        lora_B,
        partial,
        N,
        K,
        R,
        *lora_A.stride(),
        *lora_B.stride(),
        columns_per_split,
        scaling,
        R_MULTIPLE=rank_multiple(R, lora_B),
        STAGES=weight_stages(weight, config),
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        **constexprs,
        **how.dtypes(),
        **tiles,
    )
    finish = how.config("finish_norm")
    _finish_norm_kernel[ceil_div(N, finish.BLOCK_N),](
        partial,
        magnitude,
        result,
        gain,
        N,
        splits,
        0 if magnitude is None else magnitude.stride(0),
        HAS_MAGNITUDE=magnitude is not None,
        ACC_DTYPE=how.dtypes()["ACC_DTYPE"],
        **finish.tiles(),
    )
    return result, gain
