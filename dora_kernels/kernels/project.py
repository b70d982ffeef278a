"""The low-rank projection: x @ lora_A.T."""

import torch
import triton
import triton.language as tl

from dora_kernels import gemm
from dora_kernels.kernels.tile import (
    Launch,
    add_dot,
    add_splits,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    matrix,
    rank_multiple,
)
from dora_kernels.planning import plan
from dora_kernels.planning.configs import ceil_div


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    rows,  # (M, K)
    factor,  # (K, R)
    scale_ptr,  # (K,) in DTYPES.accumulate, contiguous, or None
    partial_ptr,  # (splits, M, R), contiguous
    M,
    K,
    R,
    columns_per_split,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """partial[split, m, r] = sum over the split's k of rows[m, k] * scale[k] * factor[k, r].

    One program owns a [BLOCK_M, BLOCK_R] tile of one split; those that read the same rows start one after the other.
    """
    R, factor = known_multiple(R, R_MULTIPLE), known_rows(factor, R_MULTIPLE)
    blocks_r = tl.cdiv(R, BLOCK_R)
    offs_r = block_offsets(tl.program_id(0) % blocks_r, BLOCK_R)
    # not on an axis of its own: CUDA's second and third end at 65535 programs
    offs_m = block_offsets(tl.program_id(0) // blocks_r, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=DTYPES.accumulate)
    for k in range(start, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < end
        rows_tile = load(rows, offs_m, offs_k, mask_m, mask_k)  # [BLOCK_M, BLOCK_K]
        factor_tile = load(factor, offs_k, offs_r, mask_k, mask_r)  # [BLOCK_K, BLOCK_R]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)  # [BLOCK_K]
            factor_tile = scale[:, None] * factor_tile.to(DTYPES.accumulate)
        acc = add_dot(acc, rows_tile, factor_tile, DTYPES)
    pointers = partial_ptr + (split * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(pointers, acc.to(partial_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["size", "splits"])
def _finish_project_kernel(
    partial_ptr,  # (splits, size), contiguous
    result_ptr,  # (size,), contiguous
    size,
    splits,
    BLOCK_M: tl.constexpr,
):
    """result = sum of the partial products, in a fixed order. One program owns BLOCK_M elements."""
    offs = block_offsets(tl.program_id(0), BLOCK_M)
    mask = offs < size
    acc = tl.zeros([BLOCK_M], dtype=partial_ptr.dtype.element_ty)
    acc = add_splits(acc, partial_ptr, splits, size, offs, mask)
    tl.store(result_ptr + offs, acc.to(result_ptr.dtype.element_ty), mask=mask)


def project(
    rows: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """rows (M, K) @ (factor (R, K) * scale (K,)).T -> (M, R); as `reference.project`."""
    dtype = factor.dtype
    out_dtype = out_dtype or dtype
    M, K = rows.shape
    R = factor.shape[0]
    if not plan.project_by_kernel(R, scaled=scale is not None, same_dtype=rows.dtype == dtype):
        return gemm.project(rows, factor, scale, out_dtype)
    launch = Launch.of(rows, dtype)
    config = launch.config("project")
    tiles = config.tiles(R)
    blocks = ceil_div(R, tiles["BLOCK_R"]) * ceil_div(M, config.BLOCK_M)
    columns_per_split, splits = launch.split(blocks, K, config.BLOCK_K, config)
    result = rows.new_empty((M, R), dtype=out_dtype)
    if M == 0:
        return result
    partial = result if splits == 1 else rows.new_empty((splits, M, R), dtype=launch.accumulate)
    factor_T = factor.T
    _project_kernel[blocks, splits](
        matrix(rows),
        matrix(factor_T),
        scale,
        partial,
        M,
        K,
        R,
        columns_per_split,
        R_MULTIPLE=rank_multiple(R, factor_T),
        DTYPES=launch.dtypes,
        **tiles,
    )
    if splits > 1:
        finish = launch.config("finish_project")
        _finish_project_kernel[ceil_div(M * R, finish.BLOCK_M),](partial, result, M * R, splits, **finish.tiles())
    return result
