"""The row norm of weight + scaling * lora_B @ lora_A, and with it the gain.

With few rows or many columns the sum over K is split; the partial sums are added in a fixed order, so that the
result is bitwise the same in every call.
"""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.stored_weight import (
    direction_tile,
    elements,
    known_rank,
    update_argument,
    weight_arguments,
    weight_config,
    weight_stages,
)
from dora_kernels.kernels.tile import (
    Launch,
    add_parts,
    add_product,
    block_offsets,
    load,
    load_vector,
    rank_multiple,
    vector,
)
from dora_kernels.planning.configs import ceil_div
from dora_kernels.quant import Weight
from dora_kernels.types import Unfinished


@triton.jit
def row_squares(
    weight,  # (N, K) as stored
    update,  # (N, K)
    offs_n,
    mask_n,
    start,
    end,
    K,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum over k from start to end of (weight + scaling * lora_B @ lora_A)[offs_n, k]^2."""
    squares = tl.zeros([BLOCK_N], dtype=DTYPES.accumulate)
    if FORMAT.name == "dense" and not ONE_CHUNK and STAGES is not None:
        # one loop over k and r: Triton pipelines innermost loops only. Each step would wait twice, for the weight and
        # for the first chunks; here the weight comes with the last chunk, and the masks ask for nothing before
        chunks = tl.cdiv(update.R, BLOCK_R)
        steps = tl.cdiv((end - start).to(tl.int32), BLOCK_K) * chunks
        product = tl.zeros([BLOCK_N, BLOCK_K], dtype=DTYPES.accumulate)
        for step in tl.range(0, steps, num_stages=STAGES):
            chunk = step % chunks
            last = chunk == chunks - 1
            offs_k = start + (step // chunks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            mask_k_if_last = offs_k < tl.where(last, K, 0)
            w = load(elements(weight), offs_n, offs_k, mask_n, mask_k_if_last)  # [BLOCK_N, BLOCK_K]
            product = add_product(
                product, update.lora_B, update.lora_A, chunk * BLOCK_R,
                offs_n, offs_k, mask_n, mask_k, update.R, BLOCK_R, DTYPES,
            )  # fmt: skip
            if last:
                squares += _sum_squares(w.to(DTYPES.accumulate) + update.scaling * product, mask_k)
                product = tl.zeros([BLOCK_N, BLOCK_K], dtype=DTYPES.accumulate)
    else:
        for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
            _, direction = direction_tile(
                weight, update, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, ONE_CHUNK, DTYPES
            )
            squares += _sum_squares(direction, k + tl.arange(0, BLOCK_K) < K)
    return squares


@triton.jit
def _sum_squares(direction, mask_k):
    """Of each row of direction [BLOCK_N, BLOCK_K], the sum of the squares inside the mask."""
    # columns past K are zero in weight and lora_A, but not in the product where lora_B is inf or NaN
    return tl.sum(tl.where(mask_k[None, :], direction * direction, 0.0), axis=1)


@triton.jit
def _norm_kernel(
    weight,  # (N, K) as stored
    partial_ptr,  # (splits, N) in DTYPES.accumulate, contiguous
    N,
    K,
    columns_per_split,
    update,  # (N, K)
    FORMAT: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial[split, n] = sum over the split's k of (weight + scaling * lora_B @ lora_A)[n, k]^2.

    One program owns BLOCK_N rows and the columns of one split.
    """
    update = known_rank(update, R_MULTIPLE)
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    mask_n = offs_n < N
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    squares = row_squares(
        weight, update, offs_n, mask_n, start, end, K, FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, ONE_CHUNK, DTYPES, STAGES
    )
    tl.store(partial_ptr + split * N + offs_n, squares, mask=mask_n)


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
def _finish_norm_kernel(
    partial_ptr,  # (splits, N), contiguous
    magnitude,  # (N,) or None
    norm_ptr,  # (N,) in partial's dtype, contiguous
    gain_ptr,  # (N,) as norm; None without a magnitude
    N,
    splits,
    BLOCK_N: tl.constexpr,
):
    """norm = sqrt(sum of the partial sums); gain = magnitude / norm, 0 where norm is 0.

    One program owns BLOCK_N rows.
    """
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    squares = tl.zeros([BLOCK_N], dtype=partial_ptr.dtype.element_ty)
    norm = root(add_parts(squares, partial_ptr, splits, N, offs_n, mask_n))
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
    """norm (N,) and, with a magnitude, gain (N,); as `reference.norm`."""
    N, K = weight.shape
    R = lora_A.shape[0]
    launch = Launch.of(weight, lora_A.dtype)
    config = weight_config(launch, "norm", weight, R)
    tiles = config.tiles(R)
    rows = ceil_div(N, config.BLOCK_N)
    columns_per_split, splits = launch.split(rows, K, config.BLOCK_K, config)
    stored, weight_format = weight_arguments(weight, config.BLOCK_K)
    partial = weight.new_empty((splits, N), dtype=launch.accumulate)
    result = weight.new_empty((N,), dtype=launch.accumulate)
    gain = None if magnitude is None else torch.empty_like(result)
    if N == 0:
        return result, gain
    _norm_kernel[rows, splits](
        stored,
        partial,
        N,
        K,
        columns_per_split,
        update_argument(lora_A, lora_B, scaling),
        FORMAT=weight_format,
        R_MULTIPLE=rank_multiple(R, lora_B),
        STAGES=weight_stages(weight, config),
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        DTYPES=launch.dtypes,
        **tiles,
    )
    finish = launch.config("finish_norm")
    _finish_norm_kernel[ceil_div(N, finish.BLOCK_N),](
        partial, vector(magnitude), result, gain, N, splits, **finish.tiles()
    )
    return result, gain


def start_norm(
    weight: Weight, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, magnitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Unfinished | None]:
    """norm (N,), gain (N,) and what the step that reads gain first is to write them from; as `reference.start_norm`."""
    result, gain = norm(weight, lora_A, lora_B, scaling, magnitude)
    return result, gain, None
