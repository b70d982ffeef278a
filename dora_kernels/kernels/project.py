"""The low-rank projections: low = x @ lora_A.T, and P = dy @ (gain * lora_B)."""

import torch
import triton
import triton.language as tl

from dora_kernels import gemm
from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.parts import in_parts, store_parts
from dora_kernels.kernels.shares import add_parts, is_last, part_of, steps_of, steps_over, unit_range, zeroed
from dora_kernels.kernels.side import Side
from dora_kernels.kernels.tile import (
    Launch,
    add_dots,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    load_parts,
    rank_multiple,
    sum_of,
    sums_from,
)
from dora_kernels.planning import configs, plan
from dora_kernels.planning.configs import ceil_div


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    rows,  # (M, K)
    factor,  # (K, R)
    result,  # (M, R), or in parts
    partial_ptr,  # (parts, M, R) in DTYPES.accumulate, contiguous; None where no block is cut
    counters_ptr,  # (blocks,) int32, zeros; None as partial
    M,
    K,
    R,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """result[m, r] = sum over k of rows[m, k] * factor[k, r].

    A block is a [BLOCK_M, BLOCK_R] tile of the result; those of the same rows follow one another.
    """
    R, factor = known_multiple(R, R_MULTIPLE), known_rows(factor, R_MULTIPLE)
    blocks_r = tl.cdiv(R, BLOCK_R)
    steps = steps_over(K, BLOCK_K)
    units = tl.cdiv(M, BLOCK_M).to(tl.int64) * blocks_r * steps
    first, end = unit_range(units)
    for block in range(first // steps, tl.cdiv(end, steps)):
        start, stop = steps_of(block, steps, first, end)
        offs_m = block_offsets(block // blocks_r, BLOCK_M)
        offs_r = block_offsets(block % blocks_r, BLOCK_R)
        mask_m = offs_m < M
        mask_r = offs_r < R
        sums = sums_from(tl.zeros([BLOCK_M, BLOCK_R], dtype=DTYPES.accumulate), DTYPES)
        for step in range(start, stop):
            offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
            mask_k = offs_k < K
            rows_tile = load(rows, offs_m, offs_k, mask_m, mask_k)  # [BLOCK_M, BLOCK_K]
            factor_tile = load_parts(factor, offs_k, offs_r, mask_k, mask_r, R, 1, DTYPES)  # [BLOCK_K, BLOCK_R]
            sums = add_dots(sums, (rows_tile,), factor_tile, DTYPES)
        acc = sum_of(sums)
        offs = offs_m[:, None] * R + offs_r[None, :]
        mask = mask_m[:, None] & mask_r[None, :]
        if partial_ptr is None:
            store_parts(result, offs_m, offs_r, mask_m, mask_r, R, acc, DTYPES)
        else:
            part, parts = part_of(block, steps, units)
            size = M.to(tl.int64) * R
            tl.store(partial_ptr + part * size + offs, acc, mask=mask)
            if is_last(counters_ptr + block, parts):
                acc = add_parts(tl.zeros_like(acc), partial_ptr, parts, size, offs, mask)
                store_parts(result, offs_m, offs_r, mask_m, mask_r, R, acc, DTYPES)


@planned
def _plan(launch: Launch, tiles: str, R: int, factor: tuple[int, ...]) -> LaunchPlan:
    """tiles: "low" for whole blocks, "project" for those that programs share. factor: the strides of (K, R)."""
    config = launch.config(tiles)
    return LaunchPlan(
        _project_kernel, config, R_MULTIPLE=rank_multiple(R, factor), DTYPES=launch.dtypes, **config.tiles(R)
    )


def _blocks(M: int, R: int, plan: LaunchPlan) -> int:
    """The number of blocks that the kernel makes of a result (M, R)."""
    return ceil_div(M, plan.config.BLOCK_M) * ceil_div(R, plan.constants["BLOCK_R"])


def project(
    rows: torch.Tensor,
    factor: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    counters: torch.Tensor | None = None,
    as_factor: bool = False,
    side: Side | None = None,
) -> torch.Tensor:
    """rows (M, K) @ factor (R, K).T -> (M, R); as `reference.project`.

    counters: int32 zeros, of which one for each block is used up. Without them a block has to be small enough that the
    device is filled with whole ones, or they are made here, in a launch of their own.
    side: where the product is formed beside a GEMM; never by the GEMM library, then.
    """
    dtype = factor.dtype
    out_dtype = out_dtype or (dtype if factor.dim() == 2 else torch.float32)
    M, K = rows.shape
    R = factor.shape[-2]
    launch = Launch.of(rows, dtype, side is not None)
    same, counted = rows.dtype == dtype and factor.dim() == 2, counters is not None
    if side is None and not plan.project_by_kernel(
        M, K, R, rows.itemsize, launch.facts, same_dtype=same, counted=counted
    ):
        return gemm.project(rows, factor, out_dtype)
    if rows.dtype == torch.bfloat16:  # one part: a float16 has too many bits for that
        launch, factor = in_parts(launch, factor)
    if as_factor and launch.parts > 1:
        result = rows.new_empty(M, launch.parts, R, dtype=torch.bfloat16).transpose(0, 1)
    else:
        result = rows.new_empty(M, R, dtype=out_dtype)
    if result.numel() == 0:
        return result
    factor_T, partial, cut = factor.mT, None, counted or side is not None
    if not cut or not launch.counts:
        chosen = _plan(launch, "low", R, factor_T.stride())
        programs = _blocks(M, R, chosen)
        cut = programs < configs.FILLED * launch.facts.multiprocessors
    if cut and launch.counts:
        chosen = _plan(launch, "project", R, factor_T.stride())
        blocks, steps = _blocks(M, R, chosen), ceil_div(K, chosen.config.BLOCK_K)
        programs = launch.programs(blocks, steps, chosen.config, sums=True)
        parts = configs.most_parts(blocks, steps, programs)
        if parts > 1:
            partial = rows.new_empty(parts, M, R, dtype=launch.accumulate)
            counters = zeroed(counters, blocks, rows.device)
    counters = None if partial is None else counters
    chosen.launch((programs,), rows, factor_T, result, partial, counters, M, K, R, side=side)
    return result
