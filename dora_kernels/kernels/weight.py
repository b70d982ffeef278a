"""What reads the weight: the row norm of weight + scaling * lora_B @ lora_A, and the merged weight.

lora_B @ lora_A is formed in registers and never stands in device memory.

With few rows or many columns the sum over K is split; the partial sums are added in a fixed order, so that the
result is bitwise the same in every call.
"""

import torch
import triton
import triton.language as tl

from dora_kernels import launch
from dora_kernels.kernels.common import Launch, block_offsets, load_tile, low_rank_tile


@triton.jit
def direction_tile(
    weight_ptr,  # (N, K)
    lora_A_ptr,  # (R, K)
    lora_B_ptr,  # (N, R)
    offs_n,
    offs_k,
    mask_n,
    mask_k,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scaling,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """The [BLOCK_N, BLOCK_K] tiles at offs_n, offs_k of weight and of weight + scaling * lora_B @ lora_A."""
    w = load_tile(weight_ptr, offs_n, offs_k, mask_n, mask_k, stride_wn, stride_wk).to(ACC_DTYPE)
    low_rank = low_rank_tile(
        lora_B_ptr,
        lora_A_ptr,
        offs_n,
        offs_k,
        mask_n,
        mask_k,
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
    return w, w + scaling * low_rank


@triton.jit
def _norm_kernel(
    weight_ptr,  # (N, K)
    lora_A_ptr,  # (R, K)
    lora_B_ptr,  # (N, R)
    partial_ptr,  # (splits, N) in ACC_DTYPE, contiguous
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    columns_per_split,
    scaling,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """partial[split, n] = sum over the split's k of (weight + scaling * lora_B @ lora_A)[n, k]^2.

    One program owns BLOCK_N rows and the columns of one split.
    """
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    mask_n = offs_n < N
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    squares = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
    for k in range(start, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < end
        _, direction = direction_tile(
            weight_ptr,
            lora_A_ptr,
            lora_B_ptr,
            offs_n,
            offs_k,
            mask_n,
            mask_k,
            R,
            stride_wn,
            stride_wk,
            stride_ar,
            stride_ak,
            stride_bn,
            stride_br,
            scaling,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
            ONE_CHUNK,
            OPERAND_DTYPE,
            ACC_DTYPE,
            DOT_PRECISION,
        )
        # columns past K are zero in weight and lora_A, but not in the product where lora_B is inf or NaN
        squares += tl.sum(tl.where(mask_k[None, :], direction * direction, 0.0), axis=1)
    tl.store(partial_ptr + split * N + offs_n, squares, mask=mask_n)


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
    # tl.sqrt and "/" are approximate in float32; their exact forms exist for float32 only
    if ACC_DTYPE == tl.float32:
        norm = tl.sqrt_rn(squares)
    else:
        norm = tl.sqrt(squares)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    if HAS_MAGNITUDE:
        magnitude = tl.load(magnitude_ptr + offs_n * stride_magnitude, mask=mask_n, other=0.0).to(ACC_DTYPE)
        divisor = tl.where(norm == 0, 1.0, norm)
        if ACC_DTYPE == tl.float32:
            gain = tl.div_rn(magnitude, divisor)
        else:
            gain = magnitude / divisor
        tl.store(gain_ptr + offs_n, tl.where(norm == 0, 0.0, gain), mask=mask_n)


def norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """norm (N,) and, with a magnitude, gain (N,); as `reference.norm_ref`."""
    N, K = weight.shape
    R = lora_A.shape[0]
    how = Launch.of(weight, lora_A.dtype)
    config = how.config("norm" if R <= launch.HIGH_RANK else "norm_high_rank")
    tiles = config.tiles(R)
    rows = triton.cdiv(N, config.BLOCK_N)
    columns_per_split, splits = how.split(rows, K, config.BLOCK_K, config)
    partial = weight.new_empty((splits, N), dtype=how.accumulate)
    result = weight.new_empty((N,), dtype=how.accumulate)
    gain = None if magnitude is None else torch.empty_like(result)
    if N == 0:
        return result, gain
    _norm_kernel[rows, splits](
        weight,
        lora_A,
        lora_B,
        partial,
        N,
        K,
        R,
        *weight.stride(),
        *lora_A.stride(),
        *lora_B.stride(),
        columns_per_split,
        scaling,
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        **how.dtypes(),
        **tiles,
    )
    finish = how.config("finish_norm")
    _finish_norm_kernel[triton.cdiv(N, finish.BLOCK_N),](
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


@triton.jit
def _merge_kernel(
    weight_ptr,  # (N, K)
    lora_A_ptr,  # (R, K)
    lora_B_ptr,  # (N, R)
    gain_ptr,  # (N,) in ACC_DTYPE
    merged_ptr,  # (N, K), contiguous
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scaling,
    HAS_GAIN: tl.constexpr,
    SUBTRACT_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """merged = gain * (weight + scaling * lora_B @ lora_A) [- weight]. One program owns a [BLOCK_N, BLOCK_K] tile."""
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    offs_k = block_offsets(tl.program_id(1), BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    w, merged = direction_tile(
        weight_ptr,
        lora_A_ptr,
        lora_B_ptr,
        offs_n,
        offs_k,
        mask_n,
        mask_k,
        R,
        stride_wn,
        stride_wk,
        stride_ar,
        stride_ak,
        stride_bn,
        stride_br,
        scaling,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
        ONE_CHUNK,
        OPERAND_DTYPE,
        ACC_DTYPE,
        DOT_PRECISION,
    )
    if HAS_GAIN:
        merged = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[:, None] * merged
    if SUBTRACT_WEIGHT:
        merged -= w
    pointers = merged_ptr + offs_n[:, None] * K + offs_k[None, :]
    tl.store(pointers, merged.to(merged_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def merge(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    gain: torch.Tensor | None,
    scaling: float,
    subtract_weight: bool = False,
) -> torch.Tensor:
    """The merged weight (N, K) in weight.dtype; as `reference.merge_ref`."""
    N, K = weight.shape
    R = lora_A.shape[0]
    how = Launch.of(weight, lora_A.dtype)
    config = how.config("merge" if R <= launch.HIGH_RANK else "merge_high_rank")
    tiles = config.tiles(R)
    merged = weight.new_empty((N, K))
    if merged.numel() == 0:
        return merged
    _merge_kernel[triton.cdiv(N, config.BLOCK_N), triton.cdiv(K, config.BLOCK_K)](
        weight,
        lora_A,
        lora_B,
        gain,
        merged,
        N,
        K,
        R,
        *weight.stride(),
        *lora_A.stride(),
        *lora_B.stride(),
        scaling,
        HAS_GAIN=gain is not None,
        SUBTRACT_WEIGHT=subtract_weight,
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        **how.dtypes(),
        **tiles,
    )
    return merged
