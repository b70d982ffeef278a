"""The merged weight: gain * (weight + scaling * lora_B @ lora_A); beside it, on the same way over the weight, what a
backward pass begins with, or the squares that the norm is made of.

lora_B @ lora_A is formed in registers and never stands in device memory.
"""

import torch
import triton
import triton.language as tl

from dora_kernels import types
from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.norm import (
    finished_gain,
    partial_squares,
    squares_of,
    store_squares,
    unfinished_argument,
    unfinished_norm,
)
from dora_kernels.kernels.parts import in_parts, store_parts, whole
from dora_kernels.kernels.shares import steps_of, steps_over, unit_range
from dora_kernels.kernels.stored_weight import (
    Layout,
    direction_tile,
    known_rank,
    update_argument,
    walk_config,
    weight_argument,
    weight_config,
    weight_format,
    weight_stages,
    with_tables,
)
from dora_kernels.kernels.tile import Launch, Matrix, block_offsets, load_parts, rank_multiple, resident, store
from dora_kernels.planning.configs import ceil_div
from dora_kernels.quant import Weight


@triton.jit
def _scale_rows(scaled_B, lora_B, factor, gain, offs_n, mask_n, R, BLOCK_R: tl.constexpr, DTYPES: tl.constexpr):
    """scaled_B[offs_n] = factor * gain * lora_B[offs_n], rounded once."""
    # 128 at a time would spill 1552 bytes a thread at R = 100, where rows begin at no multiple of 16 bytes; 32 of three
    # parts, 80 beside a weight of nf4_torchao
    COLUMNS: tl.constexpr = min(BLOCK_R, 32 if DTYPES.parts == 1 else 16)
    for r in range(0, R, COLUMNS):
        offs_r = r + tl.arange(0, COLUMNS).to(tl.int64)
        tile = whole(load_parts(lora_B, offs_n, offs_r, mask_n, offs_r < R, R, 1, DTYPES), gain.dtype)
        scaled = (factor * gain)[:, None] * tile  # [BLOCK_N, COLUMNS]
        store_parts(scaled_B, offs_n, offs_r, mask_n, offs_r < R, R, scaled, DTYPES)


@triton.jit
def _zero(counters_ptr, count, BLOCK: tl.constexpr):
    """counters = 0, by all programs together."""
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(counters_ptr + offs, tl.zeros([BLOCK], dtype=tl.int32), mask=offs < count)


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(
    weight,  # (N, K) as stored
    gain_ptr,  # (N,) in DTYPES.accumulate, contiguous, or None
    merged_ptr,  # (N, K), contiguous
    N,
    K,
    update,  # (N, K) or None
    unfinished,  # what gain is made of, or None
    scaled_B,  # (N, R) or None
    factor,
    counters_ptr,  # (count,) or None
    count,
    squares_ptr,  # (parts, N) in DTYPES.accumulate, contiguous, or None
    parts,
    FORMAT: tl.constexpr,
    SUBTRACT_WEIGHT: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """merged = gain * (weight + scaling * lora_B @ lora_A) [- weight]; scaled_B = factor * gain * lora_B; counters = 0;
    squares as in `_norm_kernel`.

    One program owns a range of steps of BLOCK_K columns, in blocks of BLOCK_N rows.
    """
    if counters_ptr is not None:
        _zero(counters_ptr, count, BLOCK_N)
    if update is not None:
        update = known_rank(update, R_MULTIPLE)
    weight = with_tables(weight, FORMAT)
    is_unfinished: tl.constexpr = unfinished is not None  # Triton 3.6 cannot ask a tuple inside a loop
    steps = steps_over(K, BLOCK_K)
    units = tl.cast(tl.cdiv(N, BLOCK_N), tl.int64) * steps
    first, end = unit_range(units)
    for block in range(first // steps, tl.cdiv(end, steps)):
        offs_n = block_offsets(block, BLOCK_N)
        mask_n = offs_n < N
        start, stop = steps_of(block, steps, first, end)
        if is_unfinished:
            gain = finished_gain(unfinished, N, offs_n, mask_n, start == 0)  # [BLOCK_N]
        elif gain_ptr is not None:
            gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
        lora_B = ()
        if update is not None:
            lora_B = resident(update.lora_B, offs_n, mask_n, update.R, CHUNKS, BLOCK_R, DTYPES)
        if scaled_B is not None:
            if start == 0:
                _scale_rows(scaled_B, update.lora_B, factor, gain, offs_n, mask_n, update.R, BLOCK_R, DTYPES)
        if squares_ptr is not None:
            squares = tl.zeros([BLOCK_N], dtype=DTYPES.accumulate)
        for step in tl.range(start.to(tl.int32), stop.to(tl.int32), num_stages=STAGES):
            k = step * BLOCK_K
            w, merged = direction_tile(
                weight, update, lora_B, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, CHUNKS, DTYPES
            )  # [BLOCK_N, BLOCK_K], both
            if squares_ptr is not None:
                squares += squares_of(merged, k, K, BLOCK_K)
            if gain_ptr is not None:
                merged = gain[:, None] * merged
            if SUBTRACT_WEIGHT:
                merged -= w
            offs_k = tl.arange(0, BLOCK_K)
            store(Matrix(merged_ptr + tl.cast(k, tl.int64), K, 1), offs_n, offs_k, mask_n, offs_k < K - k, merged)
        if squares_ptr is not None:
            store_squares(squares_ptr, parts, squares, block, steps, units, N, offs_n, mask_n)


def merge(
    weight: Weight,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gain: torch.Tensor | None,
    scaling: float,
    subtract_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    *,
    unfinished: types.Unfinished | None = None,
    prepared: types.Prepared | None = None,
) -> torch.Tensor:
    """The merged weight (N, K); as `reference.merge`, and without an adapter weight itself."""
    merged = weight.new_empty(*weight.shape, dtype=out_dtype or weight.dtype)
    if merged.numel() == 0 and unfinished is None and prepared is None:
        return merged
    _launch(weight, lora_A, lora_B, gain, scaling, merged, subtract_weight, unfinished, prepared)
    return merged


def merge_and_start_norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, types.Unfinished]:
    """The merged weight without a gain (N, K), and norm, gain and what they are still to be written by.

    As `merge` and `start_norm`, in one pass over the weight: the norm is that of what is not rounded to out_dtype.
    """
    merged = weight.new_empty(*weight.shape, dtype=out_dtype)
    squares = _launch(weight, lora_A, lora_B, None, scaling, merged, with_squares=True)
    assert squares is not None  # they were asked for
    return merged, *unfinished_norm(squares, magnitude)


def _launch(
    weight: Weight,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gain: torch.Tensor | None,
    scaling: float,
    merged: torch.Tensor,
    subtract_weight: bool = False,
    unfinished: types.Unfinished | None = None,
    prepared: types.Prepared | None = None,
    with_squares: bool = False,
) -> torch.Tensor | None:
    """Writes merged; returns sums of squares (parts, N) if they are wanted."""
    N, K = weight.shape
    launch = Launch.of(weight, weight.dtype if lora_A is None else lora_A.dtype)
    R, strides = 0, None
    if lora_A is not None:
        launch, lora_A, lora_B = in_parts(launch, lora_A, lora_B)
        R, strides = lora_A.shape[-2], lora_B.stride()
    stored, layout = weight_argument(weight)
    plan = _merge_plan(launch, layout, R, strides, merged.dtype, subtract_weight, with_squares)
    config, squares = plan.config, None
    if with_squares:
        programs, squares = partial_squares(launch, weight, config)
    else:
        programs = launch.programs(ceil_div(N, config.BLOCK_N), ceil_div(K, config.BLOCK_K), config, sums=False)
    scaled_B, factor, counters = (None, 1.0, None) if prepared is None else prepared
    plan.launch(
        (programs,),
        stored,
        gain,
        merged,
        N,
        K,
        update_argument(lora_A, lora_B, scaling),
        unfinished_argument(unfinished),
        scaled_B,
        factor,
        counters,
        0 if counters is None else counters.numel(),
        squares,
        None if squares is None else squares.shape[0],
    )
    return squares


@planned
def _merge_plan(
    launch: Launch,
    layout: Layout,
    R: int,
    lora_B: tuple[int, ...] | None,
    out: torch.dtype,
    subtract_weight: bool,
    squares: bool,
) -> LaunchPlan:
    """lora_B: its strides."""
    config = weight_config(launch, "merge", layout, R, squares)
    config, chunks = walk_config(launch, config, layout, R, out.itemsize)
    return LaunchPlan(
        _merge_kernel,
        config,
        FORMAT=weight_format(layout, config.BLOCK_K),
        SUBTRACT_WEIGHT=subtract_weight,
        R_MULTIPLE=rank_multiple(R, lora_B),
        CHUNKS=chunks,
        STAGES=weight_stages(layout, config),
        DTYPES=launch.dtypes,
        **config.tiles(R),
    )


@triton.jit(do_not_specialize=["count"])
def _prepare_kernel(
    lora_B,  # (N, R)
    gain_ptr,  # (N,), contiguous
    scaled_B,  # (N, R) or None
    factor,
    counters_ptr,  # (count,) or None
    count,
    N,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """scaled_B = factor * gain * lora_B, counters = 0. One program owns BLOCK_N rows."""
    if counters_ptr is not None:
        _zero(counters_ptr, count, BLOCK_N)
    if scaled_B is not None:
        offs_n = block_offsets(tl.program_id(0), BLOCK_N)
        mask_n = offs_n < N
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        _scale_rows(scaled_B, lora_B, factor, gain, offs_n, mask_n, R, BLOCK_R, DTYPES)


def prepare(prepared: types.Prepared, lora_B: torch.Tensor, gain: torch.Tensor) -> None:
    """prepared.scaled_B (N, R) and the counters, where no `merge` writes them; as `reference.prepare`."""
    scaled_B, factor, counters = prepared
    N, R = lora_B.shape[-2:]
    launch, _, lora_B = in_parts(Launch.of(lora_B, lora_B.dtype), None, lora_B)
    plan = _prepare_plan(launch, R)
    programs = max(1, ceil_div(N, plan.config.BLOCK_N))
    count = 0 if counters is None else counters.numel()
    plan.launch((programs,), lora_B, gain, scaled_B, factor, counters, count, N, R)


@planned
def _prepare_plan(launch: Launch, R: int) -> LaunchPlan:
    config = launch.config("prepare")
    return LaunchPlan(_prepare_kernel, config, DTYPES=launch.dtypes, **config.tiles(R))


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """weight (N, K) itself or, of a quantized one, a dense copy in dtype; as `reference.dense`."""
    return weight if isinstance(weight, torch.Tensor) else merge(weight, None, None, None, 0.0, out_dtype=dtype)
