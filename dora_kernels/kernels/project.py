"""The low-rank projection: x @ lora_A.T."""

import torch
import triton
import triton.language as tl

from dora_kernels import gemm
from dora_kernels.kernels.tile import TL_DTYPE, Launch, block_offsets, known_multiple, load_tile, rank_multiple
from dora_kernels.planning import plan
from dora_kernels.planning.configs import ceil_div


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    rows_ptr,  # (M, K)
    factor_ptr,  # (R, K) through its strides
    scale_ptr,  # (K,) in ACC_DTYPE
    partial_ptr,  # (splits, M, R), contiguous
    M,
    K,
    R,
    stride_rm,
    stride_rk,
    stride_fr,
    stride_fk,
    columns_per_split,
    HAS_SCALE: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """partial[split, m, r] = sum over the split's k of rows[m, k] * scale[k] * factor[r, k].

    One program owns a [BLOCK_M, BLOCK_R] tile of one split; those that read the same rows start one after the other.
    """
    R, stride_fk = known_multiple(R, R_MULTIPLE), known_multiple(stride_fk, R_MULTIPLE)
    blocks_r = tl.cdiv(R, BLOCK_R)
    offs_r = block_offsets(tl.program_id(0) % blocks_r, BLOCK_R)
    # not on an axis of its own: CUDA's second and third end at 65535 programs
    offs_m = block_offsets(tl.program_id(0) // blocks_r, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC_DTYPE)
    for k in range(start, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < end
        rows = load_tile(rows_ptr, offs_m, offs_k, mask_m, mask_k, stride_rm, stride_rk)  # [BLOCK_M, BLOCK_K]
        factor = load_tile(factor_ptr, offs_k, offs_r, mask_k, mask_r, stride_fk, stride_fr)  # [BLOCK_K, BLOCK_R]
        if HAS_SCALE:
            scale = tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)
            factor = scale[:, None] * factor.to(ACC_DTYPE)
        acc = tl.dot(
            rows.to(OPERAND_DTYPE),
            factor.to(OPERAND_DTYPE),
            acc,
            input_precision=DOT_PRECISION,
            out_dtype=ACC_DTYPE,
        )
    pointers = partial_ptr + (split * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(pointers, acc.to(partial_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["size", "splits"])
def _finish_project_kernel(
    partial_ptr,  # (splits, size)
    result_ptr,  # (size,)
    size,
    splits,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """result = sum of the partial products, in a fixed order. One program owns BLOCK_M elements."""
    offsets = block_offsets(tl.program_id(0), BLOCK_M)
    mask = offsets < size
    acc = tl.zeros([BLOCK_M], dtype=ACC_DTYPE)
    for split in range(0, splits):
        # no int64 needed: there are several splits only where the output is small (configs.splits)
        acc += tl.load(partial_ptr + split * size + offsets, mask=mask, other=0.0)
    tl.store(result_ptr + offsets, acc.to(result_ptr.dtype.element_ty), mask=mask)


def project(
    rows: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """rows (M, K) @ (factor (R, K) * scale (K,)).T -> (M, R); as `reference.project_ref`."""
    dtype = factor.dtype
    out_dtype = out_dtype or dtype
    M, K = rows.shape
    R = factor.shape[0]
    if not plan.project_by_kernel(R, scaled=scale is not None, same_dtype=rows.dtype == dtype):
        return gemm.project(rows, factor, scale, out_dtype)
    how = Launch.of(rows, dtype)
    config = how.config("project")
    tiles = config.tiles(R)
    blocks = ceil_div(R, tiles["BLOCK_R"]) * ceil_div(M, config.BLOCK_M)
    columns_per_split, splits = how.split(blocks, K, config.BLOCK_K, config)
    result = rows.new_empty((M, R), dtype=out_dtype)
    if M == 0:
        return result
    partial = result if splits == 1 else rows.new_empty((splits, M, R), dtype=how.accumulate)
    _project_kernel[blocks, splits](
        rows,
        factor,
        scale,
        partial,
        M,
        K,
        R,
        *rows.stride(),
        *factor.stride(),
        columns_per_split,
        HAS_SCALE=scale is not None,
        R_MULTIPLE=rank_multiple(R, factor.T),
        **how.dtypes(),
        **tiles,
    )
    if splits > 1:
        finish = how.config("finish_project")
        _finish_project_kernel[ceil_div(M * R, finish.BLOCK_M),](
            partial, result, M * R, splits, ACC_DTYPE=TL_DTYPE[how.accumulate], **finish.tiles()
        )
    return result
