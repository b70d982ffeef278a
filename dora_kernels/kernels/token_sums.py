"""Steps of the backward pass: sums over the tokens, from which dB, dmagnitude, dbias and dA fall out."""

import torch
import triton
import triton.language as tl

from dora_kernels.gemm import matmul
from dora_kernels.kernels.tile import TL_DTYPE, Launch, block_offsets, known_multiple, load_tile, rank_multiple
from dora_kernels.planning import plan
from dora_kernels.planning.configs import ceil_div


@triton.jit
def _fold_rows(tile, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums [ROWS, BLOCK_N] of every ROWS-th row of tile [BLOCK_M, BLOCK_N]."""
    return tl.sum(tl.reshape(tile, [BLOCK_M // ROWS, ROWS, BLOCK_N]), axis=0)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _token_sums_kernel(
    columns_ptr,  # (M, N)
    low_ptr,  # (M, R)
    kept_ptr,  # (M, N)
    gain_ptr,  # (N,) in ACC_DTYPE
    outer_ptr,  # (splits, N, R) in ACC_DTYPE, contiguous
    dot_ptr,  # (splits, N)
    total_ptr,  # (splits, N)
    scaled_ptr,  # (M, N), contiguous
    M,
    N,
    R,
    stride_cm,
    stride_cn,
    stride_lm,
    stride_lr,
    stride_km,
    stride_kn,
    rows_per_split,
    HAS_LOW: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    WANT_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over the split's rows m: outer[n, r] = sum columns[m, n] low[m, r]; dot[n] = sum columns * kept;
    total[n] = sum columns; and scaled = gain * columns.

    One program owns a [BLOCK_N, BLOCK_R] tile of one split; what has no r belongs to the first block of r. The blocks
    of r of one tile start one after the other: they read the same columns, from memory once and then from the L2 cache.
    dot and total are SUM_ROWS sums each until the end: in the loop no thread waits for what another one has summed.
    """
    R, stride_lm = known_multiple(R, R_MULTIPLE), known_multiple(stride_lm, R_MULTIPLE)
    offs_r = block_offsets(tl.program_id(0), BLOCK_R)
    offs_n = block_offsets(tl.program_id(1), BLOCK_N)
    split = tl.program_id(2).to(tl.int64)
    mask_n = offs_n < N
    mask_r = offs_r < R
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, M)
    # bounds and not `mask & first`: with that the loops are 1 to 4% shorter on sm_90, but at R = 64 the sums without a
    # bias take 136 registers and not 128, and a multiprocessor holds one program and not two (Triton 3.7.1)
    first = tl.program_id(0) == 0
    end_if_first = tl.where(first, end, start)
    mask_n_if_first = offs_n < tl.where(first, N, 0)
    outer = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC_DTYPE)
    dot = tl.zeros([SUM_ROWS, BLOCK_N], dtype=ACC_DTYPE)
    total = tl.zeros([SUM_ROWS, BLOCK_N], dtype=ACC_DTYPE)
    if WANT_SCALED:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
    for m in tl.range(start, end, BLOCK_M, num_stages=STAGES):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < end
        columns = load_tile(columns_ptr, offs_m, offs_n, mask_m, mask_n, stride_cm, stride_cn)  # [BLOCK_M, BLOCK_N]
        if HAS_LOW:
            low = load_tile(low_ptr, offs_m, offs_r, mask_m, mask_r, stride_lm, stride_lr)  # [BLOCK_M, BLOCK_R]
            outer = tl.dot(
                tl.trans(columns.to(OPERAND_DTYPE)),
                low.to(OPERAND_DTYPE),
                outer,
                input_precision=DOT_PRECISION,
                out_dtype=ACC_DTYPE,
            )
        if HAS_KEPT:
            kept = load_tile(kept_ptr, offs_m, offs_n, offs_m < end_if_first, mask_n, stride_km, stride_kn)
            dot += _fold_rows(columns.to(ACC_DTYPE) * kept.to(ACC_DTYPE), SUM_ROWS, BLOCK_M, BLOCK_N)
        if WANT_TOTAL:
            total += _fold_rows(columns.to(ACC_DTYPE), SUM_ROWS, BLOCK_M, BLOCK_N)
        if WANT_SCALED:
            scaled = gain[None, :] * columns.to(ACC_DTYPE)
            pointers = scaled_ptr + offs_m[:, None] * N + offs_n[None, :]
            mask = (offs_m < end_if_first)[:, None] & mask_n[None, :]
            tl.store(pointers, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)
    if HAS_LOW:
        pointers = outer_ptr + (split * N + offs_n)[:, None] * R + offs_r[None, :]
        tl.store(pointers, outer, mask=mask_n[:, None] & mask_r[None, :])
    if HAS_KEPT:
        tl.store(dot_ptr + split * N + offs_n, tl.sum(dot, axis=0), mask=mask_n_if_first)
    if WANT_TOTAL:
        tl.store(total_ptr + split * N + offs_n, tl.sum(total, axis=0), mask=mask_n_if_first)


@triton.jit
def _outer_of_scaled(
    columns_ptr,
    low_ptr,
    gain,
    offs_n,
    offs_r,
    mask_n,
    mask_r,
    M,
    stride_cm,
    stride_cn,
    stride_lm,
    stride_lr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """sum_m (gain[n] * columns[m, n]) * low[m, r], [BLOCK_N, BLOCK_R], one token after the other."""
    columns_ptrs = columns_ptr + offs_n * stride_cn
    low_ptrs = low_ptr + offs_r * stride_lr
    outer = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC_DTYPE)
    for _ in range(0, M):
        columns = tl.load(columns_ptrs, mask=mask_n, other=0.0).to(ACC_DTYPE)
        low = tl.load(low_ptrs, mask=mask_r, other=0.0).to(ACC_DTYPE)
        outer += (gain * columns)[:, None] * low[None, :]
        columns_ptrs += stride_cm
        low_ptrs += stride_lm
    return outer


@triton.jit(do_not_specialize=["M", "outer_splits", "dot_splits", "total_splits"])
def _finish_sums_kernel(
    columns_ptr,  # (M, N)
    low_ptr,  # (M, R)
    outer_ptr,  # (outer_splits, N, R)
    dot_ptr,  # (dot_splits, N)
    total_ptr,  # (total_splits, N)
    lora_B_ptr,  # (N, R)
    gain_ptr,  # (N,)
    norm_ptr,  # (N,)
    scaled_outer_ptr,  # (N, R) through its strides
    dmagnitude_ptr,  # (N,)
    dbias_ptr,  # (N,)
    M,
    N,
    R,
    outer_splits,
    dot_splits,
    total_splits,
    stride_cm,
    stride_cn,
    stride_lm,
    stride_lr,
    stride_bn,
    stride_br,
    stride_on,
    stride_or,
    scaling,
    HAS_LOW: tl.constexpr,
    WANT_OUTER: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DOT: tl.constexpr,
    DOT_LACKS_LOW_RANK: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """scaled_outer = scaling * gain * outer; dmagnitude = dot / norm, 0 where norm is 0; dbias = total.

    Where the kept tensor was base, the low-rank part of dot is scaling * sum_r outer[n, r] lora_B[n, r]. The splits are
    summed in order. An infinite gain stays in the sum (inf - inf and inf * 0 are NaN): columns and low are read for it.
    """
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    if WANT_OUTER and HAS_GAIN:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
        is_infinite = tl.abs(gain) == float("inf")
        any_infinite = tl.max(is_infinite.to(tl.int32), axis=0) > 0
    low_rank_dot = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
    if HAS_LOW:
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
            mask_r = offs_r < R
            mask = mask_n[:, None] & mask_r[None, :]
            outer = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC_DTYPE)
            for split in range(0, outer_splits):
                rows = split * N + offs_n
                outer += tl.load(outer_ptr + rows[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
            if DOT_LACKS_LOW_RANK:
                lora_B = load_tile(lora_B_ptr, offs_n, offs_r, mask_n, mask_r, stride_bn, stride_br)
                lora_B = lora_B.to(ACC_DTYPE)
                # nor may an infinite lora_B leave the sum over the tokens: NaN, as its norm makes of it anyway
                low_rank_dot += tl.sum(outer * tl.where(tl.abs(lora_B) == float("inf"), float("nan"), lora_B), axis=1)
            if WANT_OUTER:
                if HAS_GAIN:
                    outer = gain[:, None] * outer
                    if any_infinite:
                        of_scaled = _outer_of_scaled(
                            columns_ptr, low_ptr, gain, offs_n, offs_r, mask_n, mask_r, M,
                            stride_cm, stride_cn, stride_lm, stride_lr, ACC_DTYPE, BLOCK_N, BLOCK_R,
                        )  # fmt: skip
                        outer = tl.where(is_infinite[:, None], of_scaled, outer)
                pointers = scaled_outer_ptr + offs_n[:, None] * stride_on + offs_r[None, :] * stride_or
                tl.store(pointers, (scaling * outer).to(scaled_outer_ptr.dtype.element_ty), mask=mask)
    if HAS_DOT:
        dot = scaling * low_rank_dot
        for split in range(0, dot_splits):
            dot += tl.load(dot_ptr + split * N + offs_n, mask=mask_n, other=0.0)
        norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=0.0)
        divisor = tl.where(norm == 0, 1.0, norm)
        dmagnitude = tl.where(norm == 0, 0.0, dot / divisor)
        tl.store(dmagnitude_ptr + offs_n, dmagnitude.to(dmagnitude_ptr.dtype.element_ty), mask=mask_n)
    if WANT_TOTAL:
        total = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
        for split in range(0, total_splits):
            total += tl.load(total_ptr + split * N + offs_n, mask=mask_n, other=0.0)
        tl.store(dbias_ptr + offs_n, total.to(dbias_ptr.dtype.element_ty), mask=mask_n)


def _partial_sums(
    how: Launch,
    columns: torch.Tensor,
    low: torch.Tensor | None,
    gain: torch.Tensor | None,
    kept: torch.Tensor | None,
    want_total: bool,
    scaled: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """outer (splits, N, R), dot and total (splits, N) over the tokens of each split, None where not wanted."""
    M, N = columns.shape
    R = 0 if low is None else low.shape[1]
    config = how.config("token_sums")
    tiles = config.tiles(R)
    blocks_r, blocks_n = max(1, ceil_div(R, tiles["BLOCK_R"])), ceil_div(N, config.BLOCK_N)
    rows_per_split, splits = how.split(blocks_r * blocks_n, M, config.BLOCK_M, config)
    # as many rows as the threads of a program load at once, 16 bytes each: those between are a thread's own to sum
    rows_at_once = 16 * how.threads(config) // (columns.itemsize * config.BLOCK_N)
    # a base in float32 takes the room of two steps more: on sm_120 three would need 102 KB of 99
    stages = min(config.num_stages, 2) if kept is not None and kept.itemsize > columns.itemsize else config.num_stages

    def partial(wanted: bool, *shape: int) -> torch.Tensor | None:
        return columns.new_empty((splits, *shape), dtype=how.accumulate) if wanted else None

    sums = partial(low is not None, N, R), partial(kept is not None, N), partial(want_total, N)
    _token_sums_kernel[blocks_r, blocks_n, splits](
        columns,
        low,
        kept,
        gain,
        *sums,
        scaled,
        M,
        N,
        R,
        *columns.stride(),
        *((0, 0) if low is None else low.stride()),
        *((0, 0) if kept is None else kept.stride()),
        rows_per_split,
        HAS_LOW=low is not None,
        HAS_KEPT=kept is not None,
        WANT_TOTAL=want_total,
        WANT_SCALED=scaled is not None,
        R_MULTIPLE=rank_multiple(R, low),
        SUM_ROWS=max(1, min(rows_at_once, config.BLOCK_M)),
        STAGES=stages,
        **how.dtypes(),
        **tiles,
    )
    return sums


def token_sums(
    columns: torch.Tensor,
    low: torch.Tensor | None,
    scaling: float,
    *,
    outer: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    dmagnitude: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
) -> None:
    """Sums over the tokens of columns (M, N), written into the tensors given; as `reference.token_sums_ref`."""
    M, N = columns.shape
    R = 0 if low is None else low.shape[1]
    how = Launch.of(columns, columns.dtype if low is None else low.dtype)
    if N == 0:
        return
    by_kernel = low is not None and plan.outer_by_kernel(R, same_dtype=low.dtype == columns.dtype)
    want_dot, want_total = dmagnitude is not None, dbias is not None
    partials = (None, None, None)  # of outer, dot and total
    if by_kernel or want_dot or want_total or scaled is not None:
        kept = kept if want_dot else None
        partials = _partial_sums(how, columns, low if by_kernel else None, gain, kept, want_total, scaled)
    if low is not None and not by_kernel:
        partials = (matmul(columns.T, low, how.accumulate)[None], *partials[1:])
    if outer is None and dmagnitude is None and dbias is None:
        return
    finish = how.config("finish_sums")
    _finish_sums_kernel[ceil_div(N, finish.BLOCK_N),](
        columns,
        low,
        *partials,
        lora_B,
        gain,
        norm,
        outer,
        dmagnitude,
        dbias,
        M,
        N,
        R,
        *(0 if partial is None else len(partial) for partial in partials),
        *columns.stride(),
        *((0, 0) if low is None else low.stride()),
        *((0, 0) if lora_B is None else lora_B.stride()),
        *((0, 0) if outer is None else outer.stride()),
        scaling,
        HAS_LOW=low is not None,
        WANT_OUTER=outer is not None,
        HAS_GAIN=gain is not None,
        HAS_DOT=want_dot,
        DOT_LACKS_LOW_RANK=lora_B is not None,
        WANT_TOTAL=want_total,
        ACC_DTYPE=TL_DTYPE[how.accumulate],
        **finish.tiles(R),
    )
