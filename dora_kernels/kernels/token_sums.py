"""Steps of the backward pass: sums over the tokens, from which dB, dmagnitude, dbias and dA fall out."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dora_kernels.gemm import matmul
from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.parts import in_parts
from dora_kernels.kernels.shares import add_parts, is_last, part_of, steps_of, steps_over, unit_range, zeroed
from dora_kernels.kernels.side import Side
from dora_kernels.kernels.tile import (
    Launch,
    add_dots,
    known_multiple,
    known_rows,
    load,
    load_parts,
    rank_multiple,
    store,
    sum_of,
    sums_from,
)
from dora_kernels.planning import configs, plan
from dora_kernels.planning.configs import ceil_div
from dora_kernels.planning.tiles import Config


class Sums(NamedTuple):
    """Partial sums over the tokens, in DTYPES.accumulate, contiguous; None where not wanted."""

    dB: torch.Tensor | None  # (parts, blocks, BLOCK_N, BLOCK_R); (N, R) where the GEMM library has summed it
    dot: torch.Tensor | None  # (parts, N)
    total: torch.Tensor | None  # (parts, N)


@triton.jit
def _fold_rows(tile, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums [ROWS, BLOCK_N] of every ROWS-th row of tile [BLOCK_M, BLOCK_N]."""
    return tl.sum(tl.reshape(tile, [BLOCK_M // ROWS, ROWS, BLOCK_N]), axis=0)


@triton.jit(do_not_specialize=["M"])
def _token_sums_kernel(
    dy,  # (M, N); where outer_product makes dA, x
    low,  # (M, R), or None where dB is not wanted or the GEMM library has summed it
    saved,  # (M, N), or None without dot
    dy_again,  # dy, and
    low_again,  # low: what is read for a gain that is infinite
    lora_B,  # (N, R), or None where dot lacks nothing
    gain_ptr,  # (N,) in DTYPES.accumulate, contiguous, or None
    norm_ptr,  # (N,), contiguous
    partial,  # Sums
    counters_ptr,  # (blocks of columns,) int32, zeros
    dB,  # (N, R), or None
    dmagnitude_ptr,  # (N,), contiguous, or None
    dbias_ptr,  # (N,), contiguous, or None
    dz_ptr,  # (M, N), contiguous, or None
    M,
    N,
    R,
    scaling,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """Over the tokens m: dB[n, r] = sum dy[m, n] low[m, r]; dot[n] = sum dy * saved; total[n] = sum dy; and
    dz = gain * dy. Then what `_finish` makes of the sums.

    A block is a [BLOCK_N, BLOCK_R] tile of dB. Those of the same columns follow one another: they read the same dy,
    from memory once and then from the L2 cache; what has no r belongs to the first of them. The last program of a
    column finishes its sums, behind its own blocks: within the loop over these, it would take 90 registers from it.
    dot and total are SUM_ROWS sums each until the end: in the loop no thread waits for what another one has summed.
    """
    blocks_r = 1
    if low is not None:
        R, low = known_multiple(R, R_MULTIPLE), known_rows(low, R_MULTIPLE)
        blocks_r = steps_over(R, BLOCK_R)
    steps = steps_over(M, BLOCK_M)
    blocks = tl.cdiv(N, BLOCK_N) * blocks_r
    units = blocks * steps  # below 2^31: so many are a dy of more than a terabyte
    first_unit, end_unit = unit_range(units)
    first_unit, end_unit = first_unit.to(tl.int32), end_unit.to(tl.int32)  # 8 registers
    for block in range(first_unit // steps, tl.cdiv(end_unit, steps)):
        start, stop = steps_of(block, steps, first_unit, end_unit)
        offs_n = block // blocks_r * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        offs_r = block % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_n = offs_n < N
        mask_r = offs_r < R
        # bounds and not `mask & first`: with that the loops are 1 to 4% shorter on sm_90, but take more registers
        first = block % blocks_r == 0
        end_if_first = tl.where(first, M, 0)
        mask_n_if_first = offs_n < tl.where(first, N, 0)
        products = sums_from(tl.zeros([BLOCK_N, BLOCK_R], dtype=DTYPES.accumulate), DTYPES)
        dot = tl.zeros([SUM_ROWS, BLOCK_N], dtype=DTYPES.accumulate)
        total = tl.zeros([SUM_ROWS, BLOCK_N], dtype=DTYPES.accumulate)
        if dz_ptr is not None:
            gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        for step in tl.range(start, stop, num_stages=STAGES):
            offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            mask_m = tl.arange(0, BLOCK_M) < M - step * BLOCK_M  # in 32 bits: 4 registers
            mask_m_if_first = tl.arange(0, BLOCK_M) < end_if_first - step * BLOCK_M
            tile = load(dy, offs_m, offs_n, mask_m, mask_n)  # [BLOCK_M, BLOCK_N]
            if low is not None:
                low_tile = load_parts(low, offs_m, offs_r, mask_m, mask_r, R, 1, DTYPES)  # [BLOCK_M, BLOCK_R]
                products = add_dots(products, (tl.trans(tile.to(DTYPES.operand)),), low_tile, DTYPES)
            if saved is not None:
                saved_tile = load(saved, offs_m, offs_n, mask_m_if_first, mask_n)  # [BLOCK_M, BLOCK_N]
                product = tile.to(DTYPES.accumulate) * saved_tile.to(DTYPES.accumulate)
                dot += _fold_rows(product, SUM_ROWS, BLOCK_M, BLOCK_N)
            if partial.total is not None:
                total += _fold_rows(tile.to(DTYPES.accumulate), SUM_ROWS, BLOCK_M, BLOCK_N)
            if dz_ptr is not None:
                dz = gain[None, :] * tile.to(DTYPES.accumulate)
                pointers = dz_ptr + offs_m[:, None] * N + offs_n[None, :]
                mask = mask_m_if_first[:, None] & mask_n[None, :]
                tl.store(pointers, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        part, _ = part_of(block, steps, units)
        if low is not None:
            # whole tiles: offsets that the compiler knows, where those of (N, R) would take 30 registers of the loop
            tile_ptr = partial.dB + (part * blocks + block) * BLOCK_N * BLOCK_R
            tl.store(
                tile_ptr + tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :], sum_of(products)
            )
        if saved is not None:
            tl.store(partial.dot + part * N + offs_n, tl.sum(dot, axis=0), mask=mask_n_if_first)
        if partial.total is not None:
            tl.store(partial.total + part * N + offs_n, tl.sum(total, axis=0), mask=mask_n_if_first)
    steps_of_column = blocks_r * steps
    for column in range(first_unit // steps_of_column, tl.cdiv(end_unit, steps_of_column)):
        _, programs = part_of(column, steps_of_column, units)
        if is_last(counters_ptr + column, programs):
            _finish(
                dy_again, low_again, lora_B, gain_ptr, norm_ptr, partial, dB, dmagnitude_ptr, dbias_ptr, column,
                M, N, R, scaling, blocks, blocks_r, steps, low is not None, BLOCK_N, BLOCK_R,
                16 if low is not None else min(BLOCK_R, 32), DTYPES.accumulate,
            )  # fmt: skip


@triton.jit
def _finish(
    dy,
    low,
    lora_B,
    gain_ptr,
    norm_ptr,
    partial,
    dB,
    dmagnitude_ptr,
    dbias_ptr,
    column,
    M,
    N,
    R,
    scaling,
    blocks,
    blocks_r,
    steps,
    SUMMED_HERE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FINISH_R: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """dB = scaling * gain * sum of the partial dB; dmagnitude = dot / norm, 0 where norm is 0; dbias = total.

    Where the saved tensor was base, the low-rank part of dot is scaling * sum_r dB[n, r] lora_B[n, r]. The parts are
    summed in order. An infinite gain stays in the sum (inf - inf and inf * 0 are NaN): dy and low are read for it.
    FINISH_R columns are finished at a time: of 16, four parts are loaded at once, and 128 registers are enough.
    """
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    mask_n_of_dB = mask_n
    if dB is not None and gain_ptr is not None:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        is_infinite = tl.abs(gain) == float("inf")
        mask_n_of_dB = mask_n & (tl.abs(gain) != float("inf"))
    low_rank_dot = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
    if partial.dB is not None:
        for chunk in range(0, tl.cdiv(R, FINISH_R)):
            offs_r = chunk * FINISH_R + tl.arange(0, FINISH_R).to(tl.int64)
            mask_r = offs_r < R
            mask = mask_n[:, None] & mask_r[None, :]
            if SUMMED_HERE:
                block = column * blocks_r + chunk // (BLOCK_R // FINISH_R)
                _, parts = part_of(block, steps, blocks * steps)
                tile_ptr = partial.dB + tl.cast(block, tl.int64) * BLOCK_N * BLOCK_R
                tile_ptr += chunk % (BLOCK_R // FINISH_R) * FINISH_R
                offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, FINISH_R)[None, :]
                sums = tl.zeros([BLOCK_N, FINISH_R], dtype=ACC_DTYPE)
                sums = add_parts(sums, tile_ptr, parts, tl.cast(blocks, tl.int64) * BLOCK_N * BLOCK_R, offs, mask)
            else:
                sums = tl.load(partial.dB + offs_n[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
            if lora_B is not None:
                lora_B_tile = load(lora_B, offs_n, offs_r, mask_n, mask_r).to(ACC_DTYPE)  # [BLOCK_N, FINISH_R]
                # nor may an infinite lora_B leave the sum over the tokens: NaN, as its norm makes of it anyway
                lora_B_tile = tl.where(tl.abs(lora_B_tile) == float("inf"), float("nan"), lora_B_tile)
                low_rank_dot += tl.sum(sums * lora_B_tile, axis=1)
            if dB is not None:
                if gain_ptr is not None:
                    sums = gain[:, None] * sums
                store(dB, offs_n, offs_r, mask_n_of_dB, mask_r, scaling * sums)
        if dB is not None and gain_ptr is not None:
            if tl.max(is_infinite.to(tl.int32), axis=0) > 0:
                for chunk in range(0, tl.cdiv(R, FINISH_R)):
                    offs_r = chunk * FINISH_R + tl.arange(0, FINISH_R).to(tl.int64)
                    mask_r = offs_r < R
                    of_scaled = _dB_of_dz(dy, low, gain, offs_n, offs_r, mask_n, mask_r, M)
                    store(dB, offs_n, offs_r, mask_n & is_infinite, mask_r, scaling * of_scaled)
    _, parts = part_of(column * blocks_r, steps, blocks * steps)
    if dmagnitude_ptr is not None:
        dot = add_parts(scaling * low_rank_dot, partial.dot, parts, tl.cast(N, tl.int64), offs_n, mask_n)
        norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=0.0)
        divisor = tl.where(norm == 0, 1.0, norm)
        dmagnitude = tl.where(norm == 0, 0.0, dot / divisor)
        tl.store(dmagnitude_ptr + offs_n, dmagnitude.to(dmagnitude_ptr.dtype.element_ty), mask=mask_n)
    if dbias_ptr is not None:
        total = tl.zeros([BLOCK_N], dtype=ACC_DTYPE)
        total = add_parts(total, partial.total, parts, tl.cast(N, tl.int64), offs_n, mask_n)
        tl.store(dbias_ptr + offs_n, total.to(dbias_ptr.dtype.element_ty), mask=mask_n)


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
    """sum_m (gain[n] * dy[m, n]) * low[m, r], [BLOCK_N, FINISH_R], one token after the other."""
    dy_ptrs = dy.ptr + offs_n * dy.stride_1
    low_ptrs = low.ptr + offs_r * low.stride_1
    dB = tl.zeros([offs_n.shape[0], offs_r.shape[0]], dtype=gain.dtype)
    for _ in range(0, M):
        dy_row = tl.load(dy_ptrs, mask=mask_n, other=0.0).to(gain.dtype)  # [BLOCK_N]
        low_row = tl.load(low_ptrs, mask=mask_r, other=0.0).to(gain.dtype)  # [FINISH_R]
        dB += (gain * dy_row)[:, None] * low_row[None, :]
        dy_ptrs += dy.stride_0
        low_ptrs += low.stride_0
    return dB


def _programs(launch: Launch, columns: int, blocks: int, steps: int, config: Config) -> int:
    """The number of programs that share the blocks; as many as columns where these may not be cut.

    Of p parts of a block each has steps / p steps, and the last program adds p tiles, a tile in about the time of a
    step. sqrt(steps) parts would be the fastest if programs shared nothing, but they share the memory: half as many (a
    prediction). At 8192 x 4096 they are 8, at 8192 x 1024 too: there, more would be added longer than the sums take.
    """
    if not launch.counts:
        return columns
    return min(launch.programs(blocks, steps, config, sums=True), blocks * max(4, math.isqrt(steps) // 2))


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
    side: Side | None = None,
) -> None:
    """Sums over the tokens of dy (M, N), written into the tensors given; as `reference.token_sums`.

    counters: int32 zeros, of which one for each block of columns is used up; without them they are made here.
    side: where the sums are formed beside a GEMM; never by the GEMM library, then.
    """
    M, N = dy.shape
    R = 0 if low is None else low.shape[-1]
    if N == 0:
        return
    launch = Launch.of(dy, dy.dtype if low is None else low.dtype, side is not None)
    others = dmagnitude is not None or dbias is not None or dz is not None
    by_library, summed = False, low
    if low is not None and side is None:
        same = low.dim() == 2 and low.dtype == dy.dtype
        by_library = not plan.outer_by_kernel(M, N, R, dy.itemsize, launch.facts, same_dtype=same, beside=others)
    if by_library:
        summed = None
    elif low is not None and dy.dtype == torch.bfloat16:  # one part: a float16 has too many bits for that
        launch, _, summed = in_parts(launch, None, low)
    saved = None if dmagnitude is None else saved
    chosen = _plan(
        launch,
        N,
        R,
        None if low is None else low.stride(),
        dy.dtype,
        None if saved is None else saved.dtype,
        dz is not None,
    )
    config, BLOCK_R = chosen.config, chosen.constants["BLOCK_R"]
    columns = ceil_div(N, config.BLOCK_N)
    blocks = columns * (1 if summed is None else max(1, ceil_div(R, BLOCK_R)))
    steps = ceil_div(M, config.BLOCK_M)
    programs = _programs(launch, columns, blocks, steps, config)
    parts = configs.most_parts(blocks, steps, programs)
    partial_dB = partial_dot = partial_total = None
    if by_library:
        partial_dB = matmul(dy.T, low, launch.accumulate)
    elif low is not None:
        partial_dB = dy.new_empty(parts, blocks, config.BLOCK_N, BLOCK_R, dtype=launch.accumulate)
    if dmagnitude is not None:
        partial_dot = dy.new_empty(parts, N, dtype=launch.accumulate)
    if dbias is not None:
        partial_total = dy.new_empty(parts, N, dtype=launch.accumulate)
    chosen.launch(
        (programs,),
        dy,
        summed,
        saved,
        dy,
        low,
        lora_B,
        gain,
        norm,
        Sums(partial_dB, partial_dot, partial_total),
        zeroed(counters, columns, dy.device),
        dB,
        dmagnitude,
        dbias,
        dz,
        M,
        N,
        R,
        scaling,
        side=side,
    )


@planned
def _plan(
    launch: Launch,
    N: int,
    R: int,
    low: tuple[int, ...] | None,
    dy: torch.dtype,
    saved: torch.dtype | None,
    writes_dz: bool,
) -> LaunchPlan:
    """low: its strides."""
    config = launch.config("token_sums")
    # 8 registers for the gain and 6 for addresses; where rows are not loaded in vectors, an address for each element
    if writes_dz or N % 16:
        config = configs.unlimited(config)
    # as many rows as the threads of a program load at once, 16 bytes each: those between are a thread's own to sum
    rows_at_once = 16 * launch.threads(config) // (dy.itemsize * config.BLOCK_N)
    stages = config.num_stages
    if saved is not None and saved.itemsize > dy.itemsize:  # takes as much room again as dy and base in bfloat16
        stages = max(2, stages - 2)
    if launch.beside and saved is None:  # its room is for one more
        stages += 1
    return LaunchPlan(
        _token_sums_kernel,
        config,
        R_MULTIPLE=rank_multiple(R, low),
        SUM_ROWS=max(1, min(rows_at_once, config.BLOCK_M)),
        STAGES=stages,
        DTYPES=launch.dtypes,
        **config.tiles(R),
    )
