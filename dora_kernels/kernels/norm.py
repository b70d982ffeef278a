"""The row norm of weight + scaling * lora_B @ lora_A, and with it the gain.

`norm` takes one launch. So does `start_norm`, which shares the rows' columns among as many programs as the device
holds, and leaves their sums of squares to the step that reads gain first: `finished_gain` adds them up in a fixed
order, so that the result is bitwise the same in every call.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dora_kernels import types
from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.parts import in_parts
from dora_kernels.kernels.shares import add_parts, part_of, steps_of, steps_over, unit_range
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
from dora_kernels.kernels.tile import Launch, Vector, block_offsets, load_vector, rank_multiple, resident
from dora_kernels.planning import configs
from dora_kernels.planning.configs import ceil_div
from dora_kernels.planning.tiles import Config
from dora_kernels.quant import Weight
from dora_kernels.reference import accumulate_dtype


class UnfinishedNorm(NamedTuple):
    """types.Unfinished as one argument of a kernel."""

    squares: torch.Tensor  # (parts, N), contiguous
    parts: int
    magnitude: torch.Tensor  # (N,)
    magnitude_stride: int
    norm: torch.Tensor  # (N,) in squares' dtype, contiguous
    gain: torch.Tensor  # (N,) as norm


def unfinished_argument(unfinished: types.Unfinished | None) -> UnfinishedNorm | None:
    """types.Unfinished as an argument; None where `start_norm` has left nothing."""
    if unfinished is None:
        return None
    squares, magnitude, norm, gain = unfinished
    return UnfinishedNorm(squares, squares.shape[0], magnitude, magnitude.stride(0), norm, gain)


@triton.jit
def root(squares):
    """sqrt(squares), rounded to nearest: tl.sqrt is approximate in float32, and its exact form exists for that only."""
    if squares.dtype == tl.float32:
        result = tl.sqrt_rn(squares)
    else:
        result = tl.sqrt(squares)
    return result


@triton.jit
def gain_of(magnitude, norm):
    """magnitude / norm, rounded to nearest as in `root`; 0 where norm is 0."""
    divisor = tl.where(norm == 0, 1.0, norm)
    if norm.dtype == tl.float32:
        gain = tl.div_rn(magnitude, divisor)
    else:
        gain = magnitude / divisor
    return tl.where(norm == 0, 0.0, gain)


@triton.jit
def finished_gain(unfinished, N, offs_n, mask_n, writes):
    """gain[offs_n] of an UnfinishedNorm over N rows; where `writes`, norm and gain are written, too."""
    squares = tl.zeros([offs_n.shape[0]], dtype=unfinished.squares.dtype.element_ty)
    norm = root(add_parts(squares, unfinished.squares, unfinished.parts, N, offs_n, mask_n))
    magnitude = load_vector(Vector(unfinished.magnitude, unfinished.magnitude_stride), offs_n, mask_n)
    gain = gain_of(magnitude.to(norm.dtype), norm)
    tl.store(unfinished.norm + offs_n, norm, mask=mask_n & writes)
    tl.store(unfinished.gain + offs_n, gain, mask=mask_n & writes)
    return gain


@triton.jit
def squares_of(direction, k, K, BLOCK_K: tl.constexpr):
    """The sum of direction^2 in each row, direction being the BLOCK_K columns from k of a matrix of K."""
    if k + BLOCK_K > K:
        # columns past K are zero in weight and lora_A, but not in the product where lora_B is inf or NaN
        direction = tl.where((k + tl.arange(0, BLOCK_K) < K)[None, :], direction, 0.0)
    return tl.sum(direction * direction, axis=1)


@triton.jit
def store_squares(squares_ptr, parts, squares, block, steps, units, N, offs_n, mask_n):
    """squares_ptr (parts, N) of a block's rows: this program's part = squares, and 0 in parts that there are not."""
    part, parts_of_block = part_of(block, steps, units)
    tl.store(squares_ptr + part * N + offs_n, squares, mask=mask_n)
    if part == parts_of_block - 1:
        for empty in range(parts_of_block, parts):
            tl.store(squares_ptr + tl.cast(empty, tl.int64) * N + offs_n, tl.zeros_like(squares), mask=mask_n)


@triton.jit
def row_squares(
    weight,  # (N, K) as stored
    update,  # (N, K)
    offs_n,
    mask_n,
    start,
    stop,
    K,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum over k in steps start to stop of BLOCK_K of (weight + scaling * lora_B @ lora_A)[offs_n, k]^2."""
    lora_B = resident(update.lora_B, offs_n, mask_n, update.R, CHUNKS, BLOCK_R, DTYPES)
    squares = tl.zeros([BLOCK_N], dtype=DTYPES.accumulate)
    for step in tl.range(tl.cast(start, tl.int32), tl.cast(stop, tl.int32), num_stages=STAGES):
        k = step * BLOCK_K
        _, direction = direction_tile(
            weight, update, lora_B, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, CHUNKS, DTYPES
        )
        squares += squares_of(direction, k, K, BLOCK_K)
    return squares


@triton.jit
def _norm_kernel(
    weight,  # (N, K) as stored
    squares_ptr,  # (parts, N) in DTYPES.accumulate, contiguous, or None
    magnitude,  # (N,) or None
    norm_ptr,  # (N,) in DTYPES.accumulate, contiguous; None with squares_ptr
    gain_ptr,  # (N,) as norm; None without a magnitude
    N,
    K,
    update,  # (N, K)
    parts,
    FORMAT: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """squares[part, n] = sum over the part's k of (weight + scaling * lora_B @ lora_A)[n, k]^2, 0 in parts there are
    not; or, without squares, norm = sqrt(sum over all k) and gain = magnitude / norm, 0 where norm is 0.

    One program owns a range of steps of BLOCK_K columns, in blocks of BLOCK_N rows; without squares, whole blocks.
    """
    update = known_rank(update, R_MULTIPLE)
    weight = with_tables(weight, FORMAT)
    steps = steps_over(K, BLOCK_K)
    units = tl.cast(tl.cdiv(N, BLOCK_N), tl.int64) * steps
    first, end = unit_range(units)
    for block in range(first // steps, tl.cdiv(end, steps)):
        offs_n = block_offsets(block, BLOCK_N)
        mask_n = offs_n < N
        start, stop = steps_of(block, steps, first, end)
        squares = row_squares(
            weight, update, offs_n, mask_n, start, stop, K,
            FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, CHUNKS, DTYPES, STAGES,
        )  # fmt: skip
        if squares_ptr is not None:
            store_squares(squares_ptr, parts, squares, block, steps, units, N, offs_n, mask_n)
        else:
            norm = root(squares)
            tl.store(norm_ptr + offs_n, norm, mask=mask_n)
            if magnitude is not None:
                magnitude_tile = load_vector(magnitude, offs_n, mask_n).to(norm.dtype)  # [BLOCK_N]
                tl.store(gain_ptr + offs_n, gain_of(magnitude_tile, norm), mask=mask_n)


def norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """norm (N,) and, with a magnitude, gain (N,), of whole rows; as `reference.norm`."""
    norm = weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))
    gain = None if magnitude is None else torch.empty_like(norm)
    _launch(weight, lora_A, lora_B, scaling, magnitude, norm, gain)
    return norm, gain


def start_norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, types.Unfinished | None]:
    """norm (N,) and gain (N,), and what they are still to be written by; as `reference.start_norm`."""
    squares = _launch(weight, lora_A, lora_B, scaling)
    assert squares is not None  # there is no norm to write
    return unfinished_norm(squares, magnitude)


def unfinished_norm(
    squares: torch.Tensor, magnitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, types.Unfinished]:
    """norm (N,) and gain (N,), not written yet, and what they are to be written by: squares (parts, N)."""
    norm, gain = (squares.new_empty(squares.shape[1]) for _ in range(2))
    return norm, gain, types.Unfinished(squares, magnitude, norm, gain)


def partial_squares(launch: Launch, weight: Weight, config: Config) -> tuple[int, torch.Tensor]:
    """The number of programs that share a walk over the weight, and the squares (parts, N) that they are to write."""
    N, K = weight.shape
    blocks, steps = ceil_div(N, config.BLOCK_N), ceil_div(K, config.BLOCK_K)
    programs = launch.programs(blocks, steps, config, sums=True)
    return programs, weight.new_empty(configs.most_parts(blocks, steps, programs), N, dtype=launch.accumulate)


def _launch(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes norm and gain; without a norm to write, sums of squares (parts, N)."""
    N, K = weight.shape
    launch, lora_A, lora_B = in_parts(Launch.of(weight, lora_A.dtype), lora_A, lora_B)
    stored, layout = weight_argument(weight)
    plan = _plan(launch, layout, N, lora_A.shape[-2], lora_B.stride(), norm is not None)
    programs, parts, squares = ceil_div(N, plan.config.BLOCK_N), 1, None
    if norm is None:
        programs, squares = partial_squares(launch, weight, plan.config)
        parts = squares.shape[0]
    if N > 0:
        update = update_argument(lora_A, lora_B, scaling)
        plan.launch((programs,), stored, squares, magnitude, norm, gain, N, K, update, parts)
    return squares


@planned
def _plan(launch: Launch, layout: Layout, N: int, R: int, lora_B: tuple[int, ...], whole_rows: bool) -> LaunchPlan:
    """lora_B: its strides."""
    config = weight_config(launch, "norm", layout, R)
    if whole_rows:  # fewer in a block where there are not enough of them, if threads load 8 elements
        rows, least = config.BLOCK_N, max(16, 8 * launch.threads(config) // config.BLOCK_K)
        while rows > least and ceil_div(N, rows) < launch.facts.multiprocessors:
            rows //= 2
        config = configs.of_rows(config, rows)
    config, chunks = walk_config(launch, config, layout, R)
    return LaunchPlan(
        _norm_kernel,
        config,
        FORMAT=weight_format(layout, config.BLOCK_K),
        R_MULTIPLE=rank_multiple(R, lora_B),
        STAGES=weight_stages(layout, config),
        CHUNKS=chunks,
        DTYPES=launch.dtypes,
        **config.tiles(R),
    )
