"""Steps of the backward pass: sums over the tokens, from which dB, dmagnitude, dbias and dA fall out."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dora_kernels.gemm import matmul
from dora_kernels.kernels.tile import (
    Launch,
    Matrix,
    add_dot,
    add_parts,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    matrix,
    rank_multiple,
    store,
)
from dora_kernels.planning import plan
from dora_kernels.planning.configs import ceil_div


@triton.jit
def _fold_rows(tile, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums [ROWS, BLOCK_N] of every ROWS-th row of tile [BLOCK_M, BLOCK_N]."""
    return tl.sum(tl.reshape(tile, [BLOCK_M // ROWS, ROWS, BLOCK_N]), axis=0)


class Sums(NamedTuple):
    """Partial sums over the tokens, one of each split, in DTYPES.accumulate, contiguous; None where not wanted."""

    dB: torch.Tensor | None = None  # (splits, N, R)
    dot: torch.Tensor | None = None  # (splits, N)
    total: torch.Tensor | None = None  # (splits, N)


class Results(NamedTuple):
    """The results of the sums; None if not wanted."""

    dB: Matrix | None  # (N, R)
    dmagnitude: torch.Tensor | None  # (N,), contiguous
    dbias: torch.Tensor | None  # (N,), contiguous


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _token_sums_kernel(
    dy,  # (M, N); where outer_product makes dA, x
    low,  # (M, R), or None without dB
    saved,  # (M, N), or None without dot
    gain_ptr,  # (N,) in DTYPES.accumulate, contiguous; read for dz
    partial,  # Sums
    dz_ptr,  # (M, N), contiguous, or None
    M,
    N,
    R,
    rows_per_split,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """Over the split's rows m: dB[n, r] = sum dy[m, n] low[m, r]; dot[n] = sum dy * saved;
    total[n] = sum dy; and dz = gain * dy.

    One program owns a [BLOCK_N, BLOCK_R] tile of one split; what has no r belongs to the first block of r. The blocks
    of r of one tile start one after the other: they read the same dy, from memory once and then from the L2 cache.
    dot and total are SUM_ROWS sums each until the end: in the loop no thread waits for what another one has summed.
    """
    if low is not None:
        R, low = known_multiple(R, R_MULTIPLE), known_rows(low, R_MULTIPLE)
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
    dB = tl.zeros([BLOCK_N, BLOCK_R], dtype=DTYPES.accumulate)
    dot = tl.zeros([SUM_ROWS, BLOCK_N], dtype=DTYPES.accumulate)
    total = tl.zeros([SUM_ROWS, BLOCK_N], dtype=DTYPES.accumulate)
    if dz_ptr is not None:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
    for m in tl.range(start, end, BLOCK_M, num_stages=STAGES):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < end
        tile = load(dy, offs_m, offs_n, mask_m, mask_n)  # [BLOCK_M, BLOCK_N]
        if low is not None:
            low_tile = load(low, offs_m, offs_r, mask_m, mask_r)  # [BLOCK_M, BLOCK_R]
            dB = add_dot(dB, (tl.trans(tile.to(DTYPES.operand)),), (low_tile,), DTYPES)
        if saved is not None:
            saved_tile = load(saved, offs_m, offs_n, offs_m < end_if_first, mask_n)  # [BLOCK_M, BLOCK_N]
            product = tile.to(DTYPES.accumulate) * saved_tile.to(DTYPES.accumulate)
            dot += _fold_rows(product, SUM_ROWS, BLOCK_M, BLOCK_N)
        if partial.total is not None:
            total += _fold_rows(tile.to(DTYPES.accumulate), SUM_ROWS, BLOCK_M, BLOCK_N)
        if dz_ptr is not None:
            dz = gain[None, :] * tile.to(DTYPES.accumulate)
            pointers = dz_ptr + offs_m[:, None] * N + offs_n[None, :]
            mask = (offs_m < end_if_first)[:, None] & mask_n[None, :]
            tl.store(pointers, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if low is not None:
        pointers = partial.dB + (split * N + offs_n)[:, None] * R + offs_r[None, :]
        tl.store(pointers, dB, mask=mask_n[:, None] & mask_r[None, :])
    if saved is not None:
        tl.store(partial.dot + split * N + offs_n, tl.sum(dot, axis=0), mask=mask_n_if_first)
    if partial.total is not None:
        tl.store(partial.total + split * N + offs_n, tl.sum(total, axis=0), mask=mask_n_if_first)


@triton.jit
def _dB_of_dz(
    dy,  # (M, N)
    low,  # (M, R)
    gain,  # [BLOCK_N]
    offs_n,
    offs_r,
    mask_n,
    mask_r,
    M,
):
    """sum_m (gain[n] * dy[m, n]) * low[m, r], [BLOCK_N, BLOCK_R], one token after the other."""
    dy_ptrs = dy.ptr + offs_n * dy.stride_1
    low_ptrs = low.ptr + offs_r * low.stride_1
    dB = tl.zeros([offs_n.shape[0], offs_r.shape[0]], dtype=gain.dtype)
    for _ in range(0, M):
        dy_row = tl.load(dy_ptrs, mask=mask_n, other=0.0).to(gain.dtype)  # [BLOCK_N]
        low_row = tl.load(low_ptrs, mask=mask_r, other=0.0).to(gain.dtype)  # [BLOCK_R]
        dB += (gain * dy_row)[:, None] * low_row[None, :]
        dy_ptrs += dy.stride_0
        low_ptrs += low.stride_0
    return dB


@triton.jit(do_not_specialize=["M", "dB_splits", "splits"])
def _finish_sums_kernel(
    dy,  # (M, N)
    low,  # (M, R), or None
    partial,  # Sums
    lora_B,  # (N, R), or None where dot lacks nothing
    gain_ptr,  # (N,), or None
    norm_ptr,  # (N,)
    results,  # Results
    M,
    N,
    R,
    dB_splits,
    splits,
    scaling,
    ACC_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dB = scaling * gain * sum of the partial dB; dmagnitude = dot / norm, 0 where norm is 0; dbias = total.

    Where the saved tensor was base, the low-rank part of dot is scaling * sum_r dB[n, r] lora_B[n, r]. The splits are
    summed in order. An infinite gain stays in the sum (inf - inf and inf * 0 are NaN): dy and low are read for it.
    """
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    # Triton 3.6 cannot compare a field of a tuple with None inside a loop
    result = results.dB
    if result is not None and gain_ptr is not None:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        is_infinite = tl.abs(gain) == float("inf")
        any_infinite = tl.max(is_infinite.to(tl.int32), axis=0) > 0
    low_rank_dot = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
    if low is not None:
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
            mask_r = offs_r < R
            mask = mask_n[:, None] & mask_r[None, :]
            dB = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC_DTYPE)
            for split in range(0, dB_splits):
                rows = split * N + offs_n
                dB += tl.load(partial.dB + rows[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
            if lora_B is not None:
                lora_B_tile = load(lora_B, offs_n, offs_r, mask_n, mask_r).to(ACC_DTYPE)  # [BLOCK_N, BLOCK_R]
                # nor may an infinite lora_B leave the sum over the tokens: NaN, as its norm makes of it anyway
                lora_B_tile = tl.where(tl.abs(lora_B_tile) == float("inf"), float("nan"), lora_B_tile)
                low_rank_dot += tl.sum(dB * lora_B_tile, axis=1)
            if result is not None:
                if gain_ptr is not None:
                    dB = gain[:, None] * dB
                    if any_infinite:
                        of_scaled = _dB_of_dz(dy, low, gain, offs_n, offs_r, mask_n, mask_r, M)
                        dB = tl.where(is_infinite[:, None], of_scaled, dB)
                store(result, offs_n, offs_r, mask_n, mask_r, scaling * dB)
    if results.dmagnitude is not None:
        dot = add_parts(scaling * low_rank_dot, partial.dot, splits, N, offs_n, mask_n)
        norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=0.0)
        divisor = tl.where(norm == 0, 1.0, norm)
        dmagnitude = tl.where(norm == 0, 0.0, dot / divisor)
        tl.store(results.dmagnitude + offs_n, dmagnitude.to(results.dmagnitude.dtype.element_ty), mask=mask_n)
    if results.dbias is not None:
        total = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
        total = add_parts(total, partial.total, splits, N, offs_n, mask_n)
        tl.store(results.dbias + offs_n, total.to(results.dbias.dtype.element_ty), mask=mask_n)


def _partial_sums(
    launch: Launch,
    dy: torch.Tensor,
    low: torch.Tensor | None,
    gain: torch.Tensor | None,
    saved: torch.Tensor | None,
    want_total: bool,
    dz: torch.Tensor | None,
) -> Sums:
    """dB (splits, N, R), dot and total (splits, N) over the tokens of each split, None where not wanted."""
    M, N = dy.shape
    R = 0 if low is None else low.shape[1]
    config = launch.config("token_sums")
    tiles = config.tiles(R)
    blocks_r, blocks_n = max(1, ceil_div(R, tiles["BLOCK_R"])), ceil_div(N, config.BLOCK_N)
    rows_per_split, splits = launch.split(blocks_r * blocks_n, M, config.BLOCK_M, config)
    # as many rows as the threads of a program load at once, 16 bytes each: those between are a thread's own to sum
    rows_at_once = 16 * launch.threads(config) // (dy.itemsize * config.BLOCK_N)
    # a base in float32 takes the room of two steps more: on sm_120 three would need 102 KB of 99
    stages = min(config.num_stages, 2) if saved is not None and saved.itemsize > dy.itemsize else config.num_stages

    def partial(wanted: bool, *shape: int) -> torch.Tensor | None:
        return dy.new_empty((splits, *shape), dtype=launch.accumulate) if wanted else None

    sums = Sums(partial(low is not None, N, R), partial(saved is not None, N), partial(want_total, N))
    _token_sums_kernel[blocks_r, blocks_n, splits](
        matrix(dy),
        matrix(low),
        matrix(saved),
        gain,
        sums,
        dz,
        M,
        N,
        R,
        rows_per_split,
        R_MULTIPLE=rank_multiple(R, low),
        SUM_ROWS=max(1, min(rows_at_once, config.BLOCK_M)),
        STAGES=stages,
        DTYPES=launch.dtypes,
        **tiles,
    )
    return sums


def token_sums(
    dy: torch.Tensor,
    low: torch.Tensor | None,
    scaling: float,
    *,
    dB: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    saved: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    dmagnitude: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Sums over the tokens of dy (M, N), written into the tensors given; as `reference.token_sums`."""
    M, N = dy.shape
    R = 0 if low is None else low.shape[1]
    launch = Launch.of(dy, dy.dtype if low is None else low.dtype)
    if N == 0:
        return
    want_dot, want_total = dmagnitude is not None, dbias is not None
    beside = want_dot or want_total or dz is not None
    by_kernel = low is not None and plan.outer_by_kernel(
        M, N, R, dy.itemsize, launch.facts, same_dtype=low.dtype == dy.dtype, beside=beside
    )
    sums = Sums()
    if by_kernel or beside:
        saved = saved if want_dot else None
        sums = _partial_sums(launch, dy, low if by_kernel else None, gain, saved, want_total, dz)
    if low is not None and not by_kernel:
        sums = sums._replace(dB=matmul(dy.T, low, launch.accumulate)[None])
    if dB is None and dmagnitude is None and dbias is None:
        return
    finish = launch.config("finish_sums")
    splits = len(sums.dot) if want_dot else len(sums.total) if want_total else 0
    _finish_sums_kernel[ceil_div(N, finish.BLOCK_N),](
        matrix(dy),
        matrix(low),
        sums,
        matrix(lora_B),
        gain,
        norm,
        Results(matrix(dB), dmagnitude, dbias),
        M,
        N,
        R,
        0 if sums.dB is None else len(sums.dB),
        splits,
        scaling,
        ACC_DTYPE=launch.dtypes.accumulate,
        **finish.tiles(R),
    )
